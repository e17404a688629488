"""Whether the miniature is good enough to learn from: figures on held-out scenes and prompts, against their bars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from hypersd_bench.catalog.pocket import TEACHER_GUIDANCE
from hypersd_bench.contracts import Direction
from hypersd_bench.pipelines import load_base, sample
from hypersd_bench.pocket.aesthetic import LEVELS, PocketAesthetic, load_aesthetic
from hypersd_bench.pocket.checker import Checker, Match, load_checker
from hypersd_bench.pocket.clip import PocketClip, load_clip
from hypersd_bench.pocket.degradations import CLEAR, DEGRADATIONS, degrade
from hypersd_bench.pocket.pictures import as_float, through_vae
from hypersd_bench.pocket.scenes import BACKGROUND_NAMES, CONCEPT_NAMES, Scene, render, scenes
from hypersd_bench.pocket.segmenter import (
    PocketSegmenter,
    SceneInstances,
    load_segmenter,
    panoptic_quality,
    scene_instances,
)
from hypersd_bench.sampling import ddim_trailing
from hypersd_bench.seeding import image_seed

FIRST_SEED = 40_000_000  # far from the seeds of training pools and prompt sets
TEACHER_STEPS = 25
BATCH = 32


@dataclass(frozen=True, slots=True)
class CheckRow:
    """One figure with its 95 % interval, from ``n`` independent cases, and the bar it has to reach."""

    name: str
    value: float
    low: float
    high: float
    n: int
    bar: float
    unit: str
    direction: Direction = "higher"

    @property
    def passed(self) -> bool:
        """Say whether the figure itself (not its interval) reaches the bar."""
        return self.value >= self.bar if self.direction == "higher" else self.value <= self.bar

    def to_json(self) -> dict[str, Any]:
        """Plain values, ``passed`` among them."""
        return {**asdict(self), "passed": self.passed}


def run_check(
    weights: Path, device: torch.device | str = "cpu", num_scenes: int = 256, num_images: int = 96
) -> list[CheckRow]:
    """Measure the miniature in a weights folder.

    ``num_scenes`` held-out scenes for autoencoder and judges; ``num_images`` images of one emoji and as many of two.
    """
    pipe = load_base(str(weights / "base"), device)
    checker = load_checker(weights, device)
    clip = load_clip(weights / "clip", weights / "base" / "tokenizer", device)
    aesthetic = load_aesthetic(weights, clip)
    segmenter = load_segmenter(weights, device)
    held_out = list(scenes(FIRST_SEED, num_scenes, "held-out"))
    renders = np.stack([render(scene).image for scene in held_out])
    stages: dict[str, Callable[[], list[CheckRow]]] = {
        "autoencoder": partial(check_vae, pipe.vae, checker, held_out, renders),
        "teacher": partial(check_teacher, pipe, checker, num_images),
        "clip": partial(check_clip, clip, held_out, channels_first(renders)),
        "aesthetic": partial(check_aesthetic, aesthetic, channels_first(renders)),
        "segmenter": partial(check_segmenter, segmenter, pipe.vae, held_out, renders),
    }
    rows: list[CheckRow] = []
    for stage in (bar := tqdm(stages, desc="pocket check", unit="stage")):
        bar.set_postfix_str(stage)
        rows += stages[stage]()
    return rows


def check_vae(
    vae: AutoencoderKL, checker: Checker, held_out: Sequence[Scene], renders: NDArray[np.uint8]
) -> list[CheckRow]:
    """Check that reconstructions are faithful, in decibels and to the checker's eyes."""
    decoded = through_vae(vae, renders, latent_noise=0)
    mse = np.square((decoded.astype(np.float64) - renders) / 255).mean((1, 2, 3))
    matches = read_scenes(checker, channels_first(decoded), held_out)
    return [
        rate_row("checker: real renders read right", [m.all_ok for m in matches], 0.97),
        mean_row("autoencoder: PSNR", -10 * np.log10(mse), 25.0, "dB"),
    ]


def check_teacher(pipe: StableDiffusionPipeline, checker: Checker, num_images: int) -> list[CheckRow]:
    """Check that the teacher draws what held-out prompts ask for, in 25 DDIM steps with guidance.

    There are few held-out prompts of one emoji, so a prompt returns with other noise.
    """
    singles, pairs = held_out_scenes(1, num_images), held_out_scenes(2, num_images)
    images = sample_teacher(pipe, [scene.caption for scene in singles + pairs])
    matches = read_scenes(checker, images, singles + pairs)
    return [
        rate_row("teacher: one emoji right", [m.concept_ok for m in matches[:num_images]], 0.85),
        rate_row("teacher: background right", [m.background_ok for m in matches], 0.95),
        rate_row("teacher: two emoji right, in order", [m.order_ok for m in matches[num_images:]], 0.50),
    ]


def check_clip(clip: PocketClip, held_out: Sequence[Scene], images: Tensor) -> list[CheckRow]:
    """Check retrieval among all images, and right captions against wrong ones.

    There are fewer held-out captions than scenes: each caption asks once, and any image of that caption is right.
    """
    captions = [scene.caption for scene in held_out]
    queries = list(dict.fromkeys(captions))
    features, texts = clip.embed_images(images), clip.embed_texts(captions)
    best = (clip.embed_texts(queries) @ features.T).argmax(1).tolist()
    cosines = features @ texts.T
    matched = cosines.diagonal()
    differs = torch.tensor([[a != b for b in captions] for a in captions], device=cosines.device)
    mismatched = (cosines * differs).sum(1) / differs.sum(1)
    twins = (features * clip.embed_texts([one_word_wrong(scene) for scene in held_out])).sum(1)
    return [
        rate_row("clip: retrieval R@1", [captions[i] == query for i, query in zip(best, queries, strict=True)], 0.60),
        mean_row("clip: matched above mismatched", (matched - mismatched).cpu().double().numpy(), 0.0, "cosine"),
        rate_row("clip: matched above one thing wrong", (matched > twins).tolist(), 0.90),
    ]


def check_aesthetic(aesthetic: PocketAesthetic, images: Tensor) -> list[CheckRow]:
    """Check that clean beats spoiled, and that stronger is worse.

    Each scene is spoiled in one kind (kinds in turn), so that pairs are independent.
    """
    kinds = [list(DEGRADATIONS)[i % len(DEGRADATIONS)] for i in range(len(images))]
    x = as_float(images, aesthetic.clip.device)
    with torch.no_grad():
        ratings = np.array([aesthetic.rating(spoiled(x, kinds, level)).double().cpu().numpy() for level in LEVELS])
    clear = np.array([CLEAR + i // len(DEGRADATIONS) % 2 for i in range(len(images))])
    worse = ratings[clear, np.arange(len(images))]
    falls = ratings[:-1] - ratings[1:]  # (4, N): from each strength to the next
    weakest = int(falls.mean(1).argmin())
    name = f"aesthetic: smallest fall per strength ({LEVELS[weakest]} to {LEVELS[weakest + 1]})"
    return [
        rate_row("aesthetic: clean above clearly spoiled", (ratings[0] > worse).tolist(), 0.95),
        mean_row(name, falls[weakest], 0.0, "rating"),
    ]


def check_segmenter(
    segmenter: PocketSegmenter, vae: AutoencoderKL, held_out: Sequence[Scene], renders: NDArray[np.uint8]
) -> list[CheckRow]:
    """Check, on pictures that passed through the autoencoder, what is found, and that the loss tells right from wrong.

    Wrong is one thing alone: the two emoji's names swapped, or another name where there is only one.
    """
    decoded = channels_first(through_vae(vae, renders, latent_noise=0))
    truth = [scene_instances(scene) for scene in held_out]
    quality = [panoptic_quality(found, true) for found, true in zip(segmenter.segment(decoded), truth, strict=True)]
    x = as_float(decoded, vae.device)
    with torch.no_grad():
        below = segmenter.losses(x, truth) < segmenter.losses(x, [wrongly_named(true) for true in truth])
    return [
        mean_row("segmenter: panoptic quality of reconstructions", np.array(quality), 0.85, "PQ"),
        rate_row("segmenter: loss lower than with one name wrong", below.tolist(), 0.97),
    ]


def sample_teacher(pipe: StableDiffusionPipeline, prompts: Sequence[str]) -> Tensor:
    """Sample one image per prompt: (N, 3, 64, 64) uint8."""
    contract = ddim_trailing((TEACHER_STEPS,), guidance_scale=TEACHER_GUIDANCE)
    seeds = [image_seed(0, f"check-{i}", 0) for i in range(len(prompts))]
    parts = [
        sample(pipe, contract, TEACHER_STEPS, prompts[i : i + BATCH], seeds[i : i + BATCH])
        for i in tqdm(range(0, len(prompts), BATCH), desc="teacher samples", unit="batch", leave=False)
    ]
    return torch.cat(parts)


def held_out_scenes(num_concepts: int, count: int) -> list[Scene]:
    """Take held-out scenes of one or two emoji in turn through all their captions; the same ones each time."""
    distinct: dict[str, Scene] = {}
    for scene in scenes(FIRST_SEED, 20 * len(BACKGROUND_NAMES) * 16, "held-out"):
        if len(scene.concepts) == num_concepts:
            distinct.setdefault(scene.caption, scene)
    found = list(distinct.values())
    return [found[i % len(found)] for i in range(count)]


def one_word_wrong(scene: Scene) -> str:
    """The caption with its two emoji swapped, or with the next background where there is only one."""
    if len(scene.concepts) == 2:
        return Scene(scene.concepts[::-1], scene.background, scene.seed).caption
    following = (BACKGROUND_NAMES.index(scene.background) + 1) % len(BACKGROUND_NAMES)
    return Scene(scene.concepts, BACKGROUND_NAMES[following], scene.seed).caption


def wrongly_named(truth: SceneInstances) -> SceneInstances:
    """The same objects with their two names swapped, or with the next name where there is only one."""
    if len(truth.labels) == 2:
        return truth._replace(labels=truth.labels.flip(0))
    return truth._replace(labels=(truth.labels + 1) % len(CONCEPT_NAMES))


def read_scenes(checker: Checker, images: Tensor, wanted: Sequence[Scene]) -> list[Match]:
    """Compare what images show with the scenes they should show."""
    readings = checker.read(images)
    return [reading.matches(scene.concepts, scene.background) for reading, scene in zip(readings, wanted, strict=True)]


def spoiled(x: Tensor, kinds: Sequence[str], strength: int) -> Tensor:
    """Spoil each image in its own kind."""
    return torch.cat([degrade(kind, x[i : i + 1], strength, seed=i) for i, kind in enumerate(kinds)])


def channels_first(images: NDArray[np.uint8]) -> Tensor:
    """(N, H, W, 3) to (N, 3, H, W), uint8."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def rate_row(name: str, successes: Sequence[bool], bar: float) -> CheckRow:
    """A rate with Wilson's score interval."""
    test = stats.binomtest(sum(successes), len(successes))
    interval = test.proportion_ci(method="wilson")
    return CheckRow(name, test.statistic, float(interval.low), float(interval.high), len(successes), bar, "rate")


def mean_row(name: str, values: NDArray[np.float64], bar: float, unit: str) -> CheckRow:
    """A mean with Student's t interval."""
    mean = float(values.mean())
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return CheckRow(name, mean, mean - half, mean + half, len(values), bar, unit)
