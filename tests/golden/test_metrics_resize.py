"""How images become a network's input, beside formulas and filters that are not ours, on sizes and modes that occur."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from metrics.extractors import clip, dinov2, inception

CASES = ["1024", "640x480", "64", "grey", "rgba", "jpeg"]
CONVENTIONS: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "tf1": (inception.tf1_input, 128, 128),
    "pytorch-fid": (inception.pytorch_fid_input, 127.5, 127.5),
    "torchmetrics": (inception.torchmetrics_input, 128, 128),
    "clean": (inception.clean_input, 128, 128),
}  # with the centre and scale that each papers' code has
pytest.importorskip("torch_fidelity")


def _textured(height: int, width: int) -> Image.Image:
    """Shades, a sharp edge, and stripes as fine as pixels: what filters disagree on."""
    y, x = np.mgrid[:height, :width]
    shades = [255 * x / width, 255 * y / height, 127.5 + 127.5 * np.sin((x + y) * 1.3)]
    pixels = np.stack(shades, axis=2)
    pixels[height // 3 : height // 2] = 255 * ((x + y) % 2 == 0)[height // 3 : height // 2, :, None]
    return Image.fromarray(pixels.round().astype(np.uint8))


def _case(name: str) -> Tensor:
    size = {"1024": (1024, 1024), "64": (64, 64), "jpeg": (512, 512)}.get(name, (480, 640))
    image = _textured(*size)
    if name == "grey":
        image = image.convert("L")
    if name == "rgba":
        image.putalpha(image.convert("L"))
    if name == "jpeg":
        image.save(buffer := io.BytesIO(), "JPEG", quality=75)
        image = Image.open(buffer)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]


def _levels(name: str, images: Tensor) -> NDArray[np.float64]:
    """A convention's input, its scaling undone: (N, 3, 299, 299), 0 to 255."""
    prepare, centre, scale = CONVENTIONS[name]
    x = prepare(images)
    assert x.dtype == torch.float32
    assert x.shape == (len(images), 3, 299, 299)
    levels: NDArray[np.float64] = x.double().numpy() * scale + centre
    return levels


def _bilinear(images: Tensor, offset: float) -> NDArray[np.float64]:
    """Bilinear by its formula: output i looks at (i + offset) * scale - offset. offset 0: TensorFlow 1; 1/2: torch."""

    def along(x: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        size = x.shape[axis]
        at = ((np.arange(299) + offset) * size / 299 - offset).clip(0, size - 1)
        low = np.floor(at).astype(int)
        high = (low + 1).clip(max=size - 1)
        weight = (at - low).reshape([-1 if i == axis else 1 for i in range(4)])
        found: NDArray[np.float64] = x.take(low, axis) * (1 - weight) + x.take(high, axis) * weight
        return found

    return along(along(images.double().numpy(), 2), 3)


@pytest.mark.parametrize("case", CASES)
def test_tf1_and_pytorch_fid_are_bilinear_with_and_without_centred_pixels(case: str) -> None:
    images = _case(case)
    np.testing.assert_allclose(_levels("tf1", images), _bilinear(images, 0), atol=0.02)
    np.testing.assert_allclose(_levels("pytorch-fid", images), _bilinear(images, 0.5), atol=0.02)


@pytest.mark.parametrize("case", CASES)
def test_torchmetrics_is_pils_bilinear(case: str) -> None:
    """PIL's bilinear antialiases with the same triangle; in float it rounds nothing."""
    images = _case(case)
    channels = [Image.fromarray(channel.numpy().astype(np.float32)) for channel in images[0]]
    want = [np.array(channel.resize((299, 299), Image.Resampling.BILINEAR)) for channel in channels]
    np.testing.assert_allclose(_levels("torchmetrics", images)[0], want, atol=0.02)


@pytest.mark.parametrize("case", CASES)
def test_clean_is_torchs_antialiased_bicubic_clipped(case: str) -> None:
    images = _case(case)
    raw = interpolate(images.double(), size=(299, 299), mode="bicubic", antialias=True)
    assert case in ("grey", "jpeg") or raw.max() > 256  # what is clipped
    got = _levels("clean", images)
    np.testing.assert_allclose(got, raw.clamp(0, 255), atol=0.02)
    assert np.abs(got - got.round()).max() > 0.3  # and not rounded


def test_filters_differ_where_they_should() -> None:
    images = _case("1024")
    levels = {name: _levels(name, images) for name in CONVENTIONS}
    for one, other in combinations(levels, 2):
        assert np.abs(levels[one] - levels[other]).mean() > 0.1, (one, other)
    stripes = {name: x[:, :, 110:140].std() for name, x in levels.items()}
    assert min(stripes["tf1"], stripes["pytorch-fid"]) > 3 * max(stripes["clean"], stripes["torchmetrics"])


def test_filters_coincide_at_299() -> None:
    images = torch.from_numpy(np.array(_textured(299, 299))).permute(2, 0, 1)[None]
    for name in CONVENTIONS:
        np.testing.assert_allclose(_levels(name, images), images, atol=1e-3)
    patch = inception.patch_input(images)
    assert torch.equal(patch, inception.clean_input(images))


@pytest.mark.parametrize(("height", "width"), [(1024, 1024), (300, 641), (299, 299)])
def test_patch_is_the_middle_as_it_is(height: int, width: int) -> None:
    image = _textured(height, width)
    left, top = round((width - 299) / 2), round((height - 299) / 2)
    want = np.array(image.crop((left, top, left + 299, top + 299)), np.float64)
    got = inception.patch_input(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])
    np.testing.assert_allclose(got[0].permute(1, 2, 0), (want - 128) / 128)


def test_a_photo_smaller_than_a_patch_is_resized_as_dmd2_does() -> None:
    small = torch.from_numpy(np.array(_textured(298, 640))).permute(2, 0, 1)[None]
    assert torch.equal(inception.patch_input(small), inception.clean_input(small))


@pytest.mark.parametrize("case", CASES)
def test_dinov2_squeezes_by_antialiased_bicubic_in_8_bits(case: str) -> None:
    images = _case(case)
    mean, std = (np.array(x)[:, None, None] for x in (dinov2.MEAN, dinov2.STD))
    levels = dinov2.dinov2_input(images)[0].double().numpy() * std * 255 + mean * 255
    np.testing.assert_allclose(levels, levels.round(), atol=1e-3)
    _assert_levels(levels, _by_pil(images[0].double().numpy(), 224, _cubic))


@pytest.mark.parametrize("case", [*CASES, "odd"])
@pytest.mark.parametrize(("prepare", "size"), [(clip.cmmd_square, 336), (clip.dmd2_square, 256)])
def test_squares_of_cmmd_and_dmd2(prepare: Callable[[Image.Image], Image.Image], size: int, case: str) -> None:
    images = torch.from_numpy(np.array(_textured(333, 500))).permute(2, 0, 1)[None] if case == "odd" else _case(case)
    got = prepare(Image.fromarray(images[0].permute(1, 2, 0).numpy()))
    assert (got.size, got.mode) == ((size, size), "RGB")
    height, width = images.shape[-2:]
    side = min(height, width)
    halves = [(height - side) / 2, (width - side) / 2]
    top, left = [int(x) if size == 336 else round(x) for x in halves]
    square = images[0, :, top : top + side, left : left + side].double().numpy()
    want = _by_pil(square, size, _cubic if size == 336 else _lanczos)
    _assert_levels(np.array(got).transpose(2, 0, 1), want)


def _assert_levels(got: NDArray[Any], want: NDArray[np.float64]) -> None:
    """Equal but for what a half is rounded to, twice."""
    np.testing.assert_allclose(got, want, atol=2.01)
    assert np.abs(got - want).mean() < 0.1


def _by_pil(
    pixels: NDArray[np.float64], size: int, kernel: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> NDArray[np.float64]:
    """Rows first, then columns, each to 8 bits: (C, H, W) to (C, size, size)."""
    height, width = pixels.shape[1:]
    rows = np.floor(pixels @ _weights(width, size, kernel).T + 0.5).clip(0, 255)
    found: NDArray[np.float64] = np.floor(_weights(height, size, kernel) @ rows + 0.5).clip(0, 255)
    return found


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic with a = -1/2."""
    x = np.abs(x)
    return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))


def _lanczos(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lanczos with three lobes."""
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)


def _weights(old: int, new: int, kernel: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> NDArray[np.float64]:
    """An antialiased filter as a matrix (new, old): the kernel as wide as an output pixel, rows that add up to 1."""
    scale = old / new
    centres = (np.arange(new)[:, None] + 0.5) * scale
    found = kernel((np.arange(old)[None] + 0.5 - centres) / max(scale, 1))
    rows: NDArray[np.float64] = found / found.sum(axis=1, keepdims=True)
    return rows


def test_dmd2_s_squares_of_512_are_pil_s_lanczos_before_clean_fid_s_resize() -> None:
    square = torch.from_numpy(np.array(_textured(512, 512))).permute(2, 0, 1)[None]
    assert torch.equal(inception.clean_512_input(square), inception.clean_input(square))
    wide = _textured(480, 640)
    cropped = wide.crop((80, 0, 560, 480)).resize((512, 512), Image.Resampling.LANCZOS)
    want = inception.clean_input(torch.from_numpy(np.array(cropped)).permute(2, 0, 1)[None])
    got = inception.clean_512_input(torch.from_numpy(np.array(wide)).permute(2, 0, 1)[None])
    assert torch.equal(got, want)
