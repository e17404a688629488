"""What the judges learn from: renders, renders seen through the autoencoder, and mild flaws on top.

A judge that knows only clean renders would judge an autoencoder's softness, not a picture.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from hypersd_bench.errors import InputError
from hypersd_bench.pocket.degradations import blurred
from hypersd_bench.pocket.scenes import SIZE
from hypersd_bench.pocket.training import fast_bf16, to_unit

NUM_DECODED = 4096
LATENT_NOISE = 0.4  # latents have unit spread; more noise than this hides small emoji


def through_vae(vae: AutoencoderKL, images: NDArray[np.uint8], latent_noise: float, seed: int = 0) -> NDArray[np.uint8]:
    """Encode and decode images (N, 64, 64, 3) uint8.

    Each image's latent gets noise of a strength drawn uniformly from [0, ``latent_noise``]: the softness and the
    smears of generated pictures. 0 is plain reconstruction.
    """
    device = vae.device
    generator = torch.Generator().manual_seed(seed)
    decoded = np.empty_like(images)
    for i in range(0, len(images), 64):
        with torch.no_grad():
            z = vae.encode(to_unit(images[i : i + 64].copy(), device)).latent_dist.mode()
            strength = latent_noise * torch.rand((len(z), 1, 1, 1), generator=generator)
            z = z + (strength * torch.randn(z.shape, generator=generator)).to(device)
            pixels = vae.decode(z).sample.clamp(-1, 1).float()
        decoded[i : i + 64] = ((pixels + 1) * 127.5).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
    return decoded


def decoded_pool(folder: Path, clean: NDArray[np.uint8], vae: AutoencoderKL) -> NDArray[np.uint8]:
    """Pass renders through the autoencoder once and keep the result in ``folder`` for all judges."""
    path = folder / f"decoded-{len(clean)}.npy"
    if not path.exists():
        with torch.autocast(vae.device.type, torch.bfloat16, enabled=fast_bf16(vae.device)):
            parts = [through_vae(vae, clean[i : i + 256], LATENT_NOISE, seed=i)
                     for i in tqdm(range(0, len(clean), 256), desc="pocket decoded", unit="batch")]  # fmt: skip
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.save(file, np.concatenate(parts))
        os.replace(partial, path)
    decoded: NDArray[np.uint8] = np.load(path)
    return decoded


class Pictures:
    """A pool of renders, part of it also as seen through the autoencoder."""

    def __init__(self, clean: NDArray[np.uint8], vae: AutoencoderKL | None, folder: Path) -> None:
        """Take renders (N, 64, 64, 3) uint8; the first NUM_DECODED pass through ``vae`` if there is one."""
        self.clean = clean
        self.decoded = clean[:0] if vae is None else decoded_pool(folder, clean[:NUM_DECODED], vae)

    def draw(self, index: NDArray[np.int64], rng: np.random.Generator, device: torch.device) -> Tensor:
        """Pictures of the scenes at ``index``, (N, 3, 64, 64) float32 in [0, 1]; half of those decoded are taken so."""
        images = self.clean[index]
        decoded = np.flatnonzero((index < len(self.decoded)) & (rng.random(len(index)) < 0.5))
        images[decoded] = self.decoded[index[decoded]]
        return as_float(torch.from_numpy(images).permute(0, 3, 1, 2), device)


def flawed(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Give each image (N, 3, H, W) in [0, 1] its own mild blur, contrast and noise."""

    def per_image(low: float, high: float) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (len(x), 1, 1, 1)).astype(np.float32)).to(x.device)

    x = torch.lerp(x, blurred(x, 1.2), per_image(0, 1))
    x = 0.5 + per_image(0.8, 1.2) * (x - 0.5)
    noise = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32)).to(x.device)
    return (x + per_image(0, 0.06) * noise).clamp(0, 1)


def as_float(images: Tensor, device: torch.device) -> Tensor:
    """(N, 3, 64, 64) uint8 to float32 in [0, 1] on a device; InputError for pictures not of this world."""
    if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != (3, SIZE, SIZE):
        raise InputError(
            f"the miniature's judges read uint8 images (N, 3, {SIZE}, {SIZE}), not {images.dtype} "
            f"{tuple(images.shape)}; for other pictures choose metrics that are not */pocket"
        )
    return images.to(device).float() / 255


def weights_file(folder: Path, name: str, stage: str) -> Path:
    """The file a stage left in a folder; InputError with the remedy when it is not there."""
    if not (folder / name).is_file():
        raise InputError(f"no {stage} in {folder} ({name} is missing); build it with: hypersd-bench pocket build")
    return folder / name
