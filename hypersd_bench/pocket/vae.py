"""Stage ``vae``: a small AutoencoderKL, 64x64 pixels to 8x8 latents of 16 channels.

After training, the mean and spread of every latent channel are folded into the 1x1 convolutions next to the latent
(``quant_conv``, ``post_quant_conv``), so that latents have unit spread with ``scaling_factor`` 1 and the stock
pipeline decodes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn

from hypersd_bench.pocket.training import Schedule, fit, scene_pool, to_unit

CHANNELS = 16
KL_WEIGHT = 1e-4  # per latent element; keeps the latents smooth without costing sharpness


def new_vae() -> AutoencoderKL:
    """An untrained autoencoder in the miniature's size."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
    )


def train_vae(
    folder: Path, schedule: Schedule, pool_size: int, device: torch.device
) -> tuple[AutoencoderKL, dict[str, Any]]:
    """Train on rendered scenes; returns the normalised autoencoder and the facts of the training."""
    pool = scene_pool(folder, pool_size)
    torch.manual_seed(0)
    vae = new_vae().to(device)

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([step, 2])
        x = to_unit(pool[np.sort(rng.integers(len(pool), size=schedule.batch_size))], device)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(step)).to(device)
        y = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        mse = F.mse_loss(y, x)
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        psnr = 10 * float(torch.log10(4 / mse.detach()))
        return mse + 0.1 * F.l1_loss(y, x) + KL_WEIGHT * kl, {"psnr_db": psnr, "kl": float(kl.detach())}

    facts = fit("vae", vae, loss_at, schedule, folder, device)
    normalise_latents(vae, pool[:2048], device)
    return vae, facts


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: NDArray[np.uint8], device: torch.device) -> None:
    """Fold the channels' mean and spread into the convolutions beside the latent, in place."""
    means = torch.cat([vae.encode(to_unit(images[i : i + 64], device)).latent_dist.mean
                       for i in range(0, len(images), 64)])  # fmt: skip
    mu, sd = means.mean((0, 2, 3)), means.std((0, 2, 3))
    quant, post = vae.quant_conv, vae.post_quant_conv
    assert isinstance(quant, nn.Conv2d)
    assert isinstance(post, nn.Conv2d)
    assert quant.bias is not None
    assert post.bias is not None
    # moments = (mean, logvar): mean' = (mean - mu) / sd, logvar' = logvar - 2 log sd
    quant.weight[:CHANNELS] /= sd[:, None, None, None]
    quant.bias[:CHANNELS] = (quant.bias[:CHANNELS] - mu) / sd
    quant.bias[CHANNELS:] -= 2 * sd.log()
    # decoder input z = z' sd + mu
    post.bias += torch.einsum("oi,i->o", post.weight[:, :, 0, 0], mu)
    post.weight *= sd[None, :, None, None]
