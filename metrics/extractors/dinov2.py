"""DINOv2 ViT-L/14 (Oquab et al. 2304.07193) as dgm-eval reads it for FD-DINOv2 (Stein et al. 2306.04675).

Its class token after the last norm, (N, 1024), of the whole image squeezed to 224 pixels by PIL's bicubic, 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypersd_bench.contracts import MetricContext
from hypersd_bench.errors import InputError
from metrics.extractors.network import NetworkExtractor, Source, file_fingerprint
from metrics.weights import HubFolder, loading

if TYPE_CHECKING:
    from torch import Tensor

SIZE = 224
MEAN = (0.485, 0.456, 0.406)  # ImageNet's
STD = (0.229, 0.224, 0.225)
OFFSET = 0.1  # of the positions' interpolation, as the weights' owners load them
PREPROCESSING = 1
WEIGHTS = HubFolder(
    "DINOv2 ViT-L/14", "HYPERSD_DINOV2_VIT_L_14", "facebook/dinov2-large", ("config.json", "model.safetensors")
)


def dinov2_input(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) uint8 RGB to (N, 3, 224, 224), normalised; the aspect ratio is not kept."""
    import torch
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import normalize, resize, to_pil_image, to_tensor

    squeezed = [resize(to_pil_image(image.cpu()), [SIZE, SIZE], InterpolationMode.BICUBIC) for image in images]
    normalised: Tensor = normalize(torch.stack([to_tensor(image) for image in squeezed]), MEAN, STD)
    return normalised


def load_dinov2(folder: Path, device: str) -> Any:
    """transformers' Dinov2Model for images of 224 pixels; raises InputError for missing or foreign weights."""
    import torch
    from transformers import Dinov2Model

    with loading(WEIGHTS.what, folder):
        model, told = Dinov2Model.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        _require_all(told)
        _fix_positions(model)
    return model.eval().requires_grad_(False).to(device)


def _require_all(told: dict[str, Iterable[Any]]) -> None:
    """Raise InputError where weights were left random or were not used: transformers only logs it."""
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(map(str, told.get(what) or ()))
        if keys:
            raise InputError(f"{WEIGHTS.what}: its file has {len(keys)} {what.replace('_', ' ')}, {keys[0]} the first; "
                             f"hf download {WEIGHTS.repo}, or set {WEIGHTS.variable} to another folder")  # fmt: skip


def _fix_positions(model: Any) -> None:
    """Interpolate the position embeddings to this size once, as facebookresearch/dinov2 does at every call.

    It asks for a tenth of a patch more than there are, which moves the sampling points; transformers does not.
    """
    from torch import cat, nn

    table = model.embeddings.position_embeddings.detach()
    old = round((table.shape[1] - 1) ** 0.5)
    new = SIZE // model.config.patch_size
    if old == new:
        return
    grid = table[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, scale_factor=((new + OFFSET) / old,) * 2, mode="bicubic")
    positions = cat([table[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
    model.embeddings.position_embeddings = nn.Parameter(positions)


def _build(id: str, context: MetricContext) -> NetworkExtractor:
    folder = WEIGHTS.path()
    model = load_dinov2(folder, context.device)

    def class_token(images: Tensor) -> Tensor:
        found: Tensor = model(dinov2_input(images).to(context.device)).pooler_output
        return found

    return NetworkExtractor(id, file_fingerprint(folder / "model.safetensors", PREPROCESSING), class_token)


VIT_L_14 = Source("dinov2/vit-l-14", _build, (WEIGHTS,))
