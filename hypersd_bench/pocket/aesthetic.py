"""Stage ``aesthetic``: a head on the first stage of the miniature's CLIP that prefers clean pictures to spoiled ones.

It is a proxy and nothing more: nobody rated anything. It learns to rank renders by how strongly they were spoiled
(RankIQA's idea, Liu et al. 1707.08347), so it sees technical flaws, not beauty, and its numbers are not those of
LAION's predictor. It reads texture statistics, not the embedding: from the embedding, 84 % of clearly spoiled pictures
were told from clean ones in a trial, from the first stage all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from hypersd_bench.pocket.clip import TEXTURE, PocketClip
from hypersd_bench.pocket.degradations import DEGRADATIONS, STRENGTHS, degrade
from hypersd_bench.pocket.pictures import Pictures, as_float, weights_file
from hypersd_bench.pocket.training import Schedule, fit, scene_pool
from hypersd_bench.sampling import read_safetensors_metadata
from hypersd_bench.store import write_bytes

WEIGHTS_FILE = "aesthetic.safetensors"
CLEAN_RATING, SPOILED_RATING = 8.0, 2.0  # of clean renders and of strength 4, by the affine fit after training
LEVELS = (0, *STRENGTHS)


class AestheticHead(nn.Module):
    """(N, 192) texture features to (N,) ratings, about 0 to 10."""

    mean: Tensor
    spread: Tensor

    def __init__(self) -> None:
        """Build it untrained."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(TEXTURE))
        self.register_buffer("spread", torch.ones(TEXTURE))
        self.layers = nn.Sequential(nn.Linear(TEXTURE, 128), nn.SiLU(), nn.Linear(128, 1))

    def standardise(self, features: Tensor) -> None:
        """Take the scale of every input from features (N, 192)."""
        self.mean.copy_(features.mean(0))
        self.spread.copy_(features.std(0) + 1e-3)

    def forward(self, features: Tensor) -> Tensor:
        """Rate features; differentiable."""
        rating: Tensor = self.layers((features - self.mean) / self.spread)[:, 0]
        return rating


@dataclass(frozen=True)
class PocketAesthetic:
    """The head with the CLIP it was trained on."""

    clip: PocketClip
    head: AestheticHead

    @torch.no_grad()
    def rate_images(self, images: Tensor) -> Tensor:
        """Rate images (N, 3, 64, 64) uint8: (N,) float32."""
        return torch.cat([self.rating(as_float(part, self.clip.device)) for part in images.split(256)])

    def rating(self, x: Tensor) -> Tensor:
        """Rate images (N, 3, 64, 64) in [0, 1], with gradient: (N,) float32."""
        rating: Tensor = self.head(self.clip.texture_features(x))
        return rating


def train_aesthetic(
    folder: Path,
    clip: PocketClip,
    schedule: Schedule,
    pool_size: int,
    device: torch.device,
    vae: AutoencoderKL | None = None,
) -> tuple[PocketAesthetic, dict[str, Any]]:
    """Train the head on renders spoiled at all strengths; returns it and the facts of the training.

    ``schedule.batch_size`` counts scenes; each is seen clean and at every strength.
    """
    pictures = Pictures(scene_pool(folder, pool_size), vae, folder)
    torch.manual_seed(0)
    judge = PocketAesthetic(clip, AestheticHead().to(device))

    def ladder(step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([step, 6])
        x = pictures.draw(rng.integers(pool_size, size=schedule.batch_size), rng, device)
        with torch.no_grad():
            return spoiled_ladder(x, seed=step)

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        x, level = ladder(step)
        with torch.no_grad():
            features = clip.texture_features(x)
        return ranking_loss(judge.head(features).float(), level)

    with torch.no_grad():
        judge.head.standardise(clip.texture_features(ladder(0)[0]))
    facts = fit("aesthetic", judge.head, loss_at, schedule, folder, device)
    with torch.no_grad():
        rungs = [ladder(step) for step in range(schedule.steps, schedule.steps + 16)]
        ratings = torch.cat([judge.rating(x) for x, _ in rungs])
    scale_ratings(judge.head, ratings, torch.cat([level for _, level in rungs]))
    return judge, facts


def spoiled_ladder(x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Spoil each image (N, 3, H, W) at strengths 0 to 4, a share of the images in each kind.

    Returns images (5 N, 3, H, W) and the strength of each, (5 N,).
    """
    shares = zip(DEGRADATIONS, x.tensor_split(len(DEGRADATIONS)), strict=True)
    rungs = [(degrade(kind, share, level, seed), level) for kind, share in shares for level in LEVELS]
    levels = torch.cat([torch.full((len(share),), level, device=x.device) for share, level in rungs])
    return torch.cat([share for share, _ in rungs]), levels


def ranking_loss(ratings: Tensor, level: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Hinge over all pairs (N,), also of different scenes: a level cleaner must be rated 1 higher, per level."""
    gap = level[None, :] - level[:, None]  # > 0 where the row is the cleaner one
    pairs = gap > 0
    difference = (ratings[:, None] - ratings[None, :])[pairs]
    loss = F.relu(gap[pairs] - difference).mean()
    return loss, {"pairs_right": float((difference > 0).float().mean())}


@torch.no_grad()
def scale_ratings(head: AestheticHead, ratings: Tensor, level: Tensor) -> None:
    """Fold into the last layer that clean pictures rate 8 and the most spoiled 2 on average."""
    clean, spoiled = ratings[level == 0].mean(), ratings[level == LEVELS[-1]].mean()
    scale = (CLEAN_RATING - SPOILED_RATING) / (clean - spoiled).clamp(min=1e-6)
    last = head.layers[-1]
    assert isinstance(last, nn.Linear)
    last.weight *= scale
    last.bias.copy_(scale * (last.bias - clean) + CLEAN_RATING)


def save_aesthetic(judge: PocketAesthetic, folder: Path) -> None:
    """Write the head's weights."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in judge.head.state_dict().items()}
    write_bytes(folder / WEIGHTS_FILE, safetensors.torch.save(tensors))


def load_aesthetic(folder: Path, clip: PocketClip) -> PocketAesthetic:
    """Load the head for its CLIP; raises InputError when its file is missing or broken."""
    path = weights_file(folder, WEIGHTS_FILE, "aesthetic")
    read_safetensors_metadata(path)
    head = AestheticHead()
    head.load_state_dict(safetensors.torch.load_file(path))
    return PocketAesthetic(clip, head.eval().requires_grad_(False).to(clip.device))
