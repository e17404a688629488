"""CLIP (Radford et al. 2103.00020) as an extractor of images and texts: the miniature's own, and published ones.

Each published set of weights was trained with one activation, OpenAI's with QuickGELU, LAION's with GELU; open_clip
only warns when they don't fit, and every score is wrong. It is checked here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hypersd_bench.contracts import MetricContext
from hypersd_bench.errors import InputError
from hypersd_bench.hub import file_sha256
from metrics.extractors.network import Source, extract, file_fingerprint, fingerprint, full_precision
from metrics.weights import HubFile, loading

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor, nn

    from hypersd_bench.pocket.clip import PocketClip

TEXT_BATCH = 256
PREPROCESSING = 1  # version of what happens to an image on its way in
FILE = "open_clip_model.safetensors"
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
class ClipExtractor:
    """An Extractor that also embeds texts, each once; all embeddings are of unit length."""

    id: str
    fingerprint: str
    encoder: Encoder
    texts: dict[str, NDArray[np.float32]] = field(default_factory=dict, repr=False, compare=False)

    def __call__(self, images: Tensor) -> NDArray[np.float32]:
        """Embed images (N, 3, H, W) uint8 RGB: (N, d) float32."""
        return extract(self.encoder.embed_images, images)

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed N texts: (N, d) float32. What was embedded is kept: all models of a run have the same prompts."""
        new = [text for text in dict.fromkeys(texts) if text not in self.texts]
        with full_precision():
            for start in range(0, len(new), TEXT_BATCH):
                batch = new[start : start + TEXT_BATCH]
                embedded = self.encoder.embed_texts(batch).float().cpu().numpy()
                self.texts.update(zip(batch, embedded, strict=True))
        return np.stack([self.texts[text] for text in texts])


@dataclass(frozen=True, slots=True)
class PublishedClip:
    """Published weights, open_clip's config for them, and whether they were trained with QuickGELU."""

    config: str
    weights: HubFile
    quick_gelu: bool


@dataclass(frozen=True, slots=True)
class OpenClip:
    """A published CLIP through open_clip: its tokenizer, and its preprocessing on PIL images. digest: of its file."""

    model: Any
    preprocess: Callable[[Any], Tensor]
    tokenizer: Any
    device: str
    digest: str = ""

    def embed_images(self, images: Tensor) -> Tensor:
        """Embed images (N, 3, H, W) uint8 RGB: (N, d), unit length."""
        import torch
        from torchvision.transforms.functional import to_pil_image

        pixels = torch.stack([self.preprocess(to_pil_image(image.cpu())) for image in images])
        embedded: Tensor = self.model.encode_image(pixels.to(self.device), normalize=True)
        return embedded

    def embed_texts(self, texts: list[str]) -> Tensor:
        """Embed texts: (N, d), unit length; what does not fit the context is cut before its end token, and logged."""
        tokens = self.tokenizer(texts)
        full = int((tokens[:, -1] != 0).sum())
        if full:
            _log.warning("%d of %d prompts fill CLIP's %d tokens and may be cut", full, len(texts), tokens.shape[1])
        embedded: Tensor = self.model.encode_text(tokens.to(self.device), normalize=True)
        return embedded


def load_open_clip(published: PublishedClip, device: str) -> OpenClip:
    """Build a published CLIP in float32; raises InputError for missing or foreign weights, or a wrong activation."""
    import open_clip

    path = published.weights.path()
    with loading(published.weights.what, path):
        model, _, preprocess = open_clip.create_model_and_transforms(
            published.config, pretrained=str(path), device=device
        )
    require_activation(model, published)
    tokenizer = open_clip.get_tokenizer(published.config)
    return OpenClip(model.eval().requires_grad_(False), preprocess, tokenizer, device, file_sha256(path))


def require_activation(model: nn.Module, published: PublishedClip) -> None:
    """Raise InputError unless the model has the activation its weights were trained with, and no other."""
    from open_clip.transformer import QuickGELU
    from torch import nn

    found = {kind.__name__ for kind in map(type, model.modules()) if kind in (QuickGELU, nn.GELU)}
    wanted = "QuickGELU" if published.quick_gelu else "GELU"
    built = " and ".join(sorted(found)) or "neither"
    if built != wanted:
        raise InputError(
            f"{published.weights.what}: this open_clip builds {published.config} with {built}, "
            f"its weights were trained with {wanted}; install the open_clip_torch of requirements.lock"
        )


def dmd2_square(image: Image) -> Image:
    """The centre square at 256 pixels by Lanczos, as DMD2's ``compute_clip_score`` makes it before CLIP's own."""
    from PIL.Image import Resampling
    from torchvision.transforms.functional import center_crop

    square: Image = center_crop(image, min(image.size))
    return square.resize((256, 256), Resampling.LANCZOS)


def cmmd_square(image: Image) -> Image:
    """The centre square at 336 pixels by bicubic, 8 bits, as CMMD's ``io_util`` makes it (google-research/cmmd)."""
    from PIL.Image import Resampling

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((336, 336), Resampling.BICUBIC)


def load_pocket_clip(context: MetricContext) -> PocketClip:
    """The miniature's CLIP, loaded once for all metrics."""
    from hypersd_bench.pocket import WEIGHTS
    from hypersd_bench.pocket.clip import load_clip

    def load() -> PocketClip:
        return load_clip(WEIGHTS / "clip", WEIGHTS / "base" / "tokenizer", context.device)

    return context.share("clip network pocket", load)


def require_miniature(images: Tensor, what: str) -> None:
    """Raise InputError for images (N, 3, H, W) that are not of the miniature's size."""
    from hypersd_bench.pocket.scenes import SIZE

    height, width = images.shape[-2:]
    if (height, width) != (SIZE, SIZE):
        raise InputError(
            f"{what} is for the miniature's images of {SIZE}x{SIZE} pixels, these have {width}x{height}; leave it out"
        )


@dataclass(frozen=True, slots=True)
class _PocketEncoder:
    """The miniature's CLIP, on images of its size."""

    clip: PocketClip

    def embed_images(self, images: Tensor) -> Tensor:
        require_miniature(images, "clip/pocket")
        return self.clip.embed_images(images)

    def embed_texts(self, texts: list[str]) -> Tensor:
        return self.clip.embed_texts(texts)


def _pocket(id: str, context: MetricContext) -> ClipExtractor:
    from hypersd_bench.pocket import WEIGHTS

    clip = load_pocket_clip(context)  # says what is missing
    return ClipExtractor(id, file_fingerprint(WEIGHTS / "clip" / FILE, PREPROCESSING), _PocketEncoder(clip))


def _published(
    id: str, published: PublishedClip, prepare: Callable[[Image], Image] | None = None
) -> Source[ClipExtractor]:
    """The extractor of a published CLIP; ``prepare`` comes before its own preprocessing."""

    def build(id: str, context: MetricContext) -> ClipExtractor:
        key = f"clip network {published.config}"
        clip = context.share(key, lambda: load_open_clip(published, context.device))
        if prepare is not None:
            own = clip.preprocess
            clip = replace(clip, preprocess=lambda image: own(prepare(image)))
        return ClipExtractor(id, fingerprint(clip.digest, PREPROCESSING), clip)

    return Source(id, build, (published.weights,))


# repositories and files as open_clip's table of pretrained weights names them (tags openai, laion2b_s12b_b42k,
# laion2b_s39b_b160k)
OPENAI_B_32 = PublishedClip(
    "ViT-B-32-quickgelu",
    HubFile("CLIP ViT-B/32", "HYPERSD_CLIP_VIT_B_32", "timm/vit_base_patch32_clip_224.openai", FILE),
    quick_gelu=True,
)
OPENAI_L_14 = PublishedClip(
    "ViT-L-14-quickgelu",
    HubFile("CLIP ViT-L/14", "HYPERSD_CLIP_VIT_L_14", "timm/vit_large_patch14_clip_224.openai", FILE),
    quick_gelu=True,
)
OPENAI_L_14_336 = PublishedClip(
    "ViT-L-14-336-quickgelu",
    HubFile("CLIP ViT-L/14 at 336 px", "HYPERSD_CLIP_VIT_L_14_336", "timm/vit_large_patch14_clip_336.openai", FILE),
    quick_gelu=True,
)
LAION_G_14 = PublishedClip(
    "ViT-g-14",
    HubFile("CLIP ViT-g/14", "HYPERSD_CLIP_VIT_G_14", "laion/CLIP-ViT-g-14-laion2B-s12B-b42K", FILE),
    quick_gelu=False,
)
LAION_BIGG_14 = PublishedClip(
    "ViT-bigG-14",
    HubFile("CLIP ViT-bigG/14", "HYPERSD_CLIP_VIT_BIGG_14", "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", FILE),
    quick_gelu=False,
)
POCKET = Source("clip/pocket", _pocket)
VIT_B_32 = _published("clip/vit-b-32", OPENAI_B_32)
VIT_L_14 = _published("clip/vit-l-14", OPENAI_L_14)
VIT_L_14_336 = _published("clip/vit-l-14-336-crop", OPENAI_L_14_336, cmmd_square)
VIT_G_14 = _published("clip/vit-g-14", LAION_G_14)
VIT_G_14_256 = _published("clip/vit-g-14-256", LAION_G_14, dmd2_square)
VIT_BIGG_14 = _published("clip/vit-bigg-14", LAION_BIGG_14)
