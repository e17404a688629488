"""``pocket build``: everything the miniature ships, from artwork to weights, in resumable stages.

    vae -> teacher -> clip -> aesthetic -> checker -> segmenter -> what ``pocket check`` measures

Each stage keeps its training state under ``<out>/work`` and its product in ``<out>``; a stage that the card has is
done. ``card.json`` and ``README.md`` record recipe, time and machine of every stage.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

from hypersd_bench.errors import unknown_name
from hypersd_bench.host import keep_freed_memory
from hypersd_bench.pocket.aesthetic import save_aesthetic, train_aesthetic
from hypersd_bench.pocket.card import read_card, thinned_curve, write_card
from hypersd_bench.pocket.check import run_check
from hypersd_bench.pocket.checker import save_checker, train_checker
from hypersd_bench.pocket.clip import load_clip, save_clip, train_clip
from hypersd_bench.pocket.segmenter import save_segmenter, train_segmenter
from hypersd_bench.pocket.teacher import train_teacher
from hypersd_bench.pocket.tokenizer import build_tokenizer
from hypersd_bench.pocket.training import Schedule
from hypersd_bench.pocket.vae import train_vae
from hypersd_bench.provenance import collect


@dataclass(frozen=True)
class Recipe:
    """How long each stage trains, and on how many scenes."""

    vae: Schedule
    teacher: Schedule
    clip: Schedule
    aesthetic: Schedule
    checker: Schedule
    segmenter: Schedule
    pool_size: int


SHIPPED = Recipe(
    vae=Schedule(steps=2600, batch_size=32, learning_rate=2e-3),
    teacher=Schedule(steps=3500, batch_size=64, learning_rate=1e-3),
    clip=Schedule(steps=900, batch_size=64, learning_rate=2e-3, ema=0.99),
    aesthetic=Schedule(steps=250, batch_size=28, learning_rate=2e-3, warmup=10, ema=0.97),
    checker=Schedule(steps=900, batch_size=64, learning_rate=2e-3, ema=0.99),
    segmenter=Schedule(steps=350, batch_size=64, learning_rate=2e-3, ema=0.99),
    pool_size=40_000,
)
"""What the shipped miniature was made with."""


def build(out: Path, device: torch.device, recipe: Recipe = SHIPPED, only: tuple[str, ...] = ()) -> None:
    """Run the stages that have no product yet, or those named in ``only``; then measure the whole."""
    keep_freed_memory()
    for name in only:
        if name not in STAGES:
            raise unknown_name("stage", name, STAGES)
    for name, stage in STAGES.items():
        if name in only or (not only and name not in read_card(out)["stages"]):
            _record(out, name, stage(out, recipe, device), device)
    card = read_card(out)
    if set(card["stages"]) == set(STAGES):
        write_card(out, {**card, "check": [row.to_json() for row in run_check(out, device)]})


def _record(out: Path, name: str, facts: dict[str, Any], device: torch.device) -> None:
    card = read_card(out)
    provenance = collect(str(device)).to_json()
    curve = thinned_curve(out / "work" / f"{name}.jsonl")
    card["stages"][name] = {**facts, "provenance": provenance, "curve": curve}
    write_card(out, card)


def _vae(out: Path, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    vae, facts = train_vae(out / "work", recipe.vae, recipe.pool_size, device)
    nn.Module.half(vae.cpu()).save_pretrained(out / "base" / "vae")
    return facts


def _teacher(out: Path, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    tokenizer = build_tokenizer(out / "base" / "tokenizer")
    vae = _load_vae(out, device)
    pipe, facts = train_teacher(out / "work", recipe.teacher, recipe.pool_size, vae, tokenizer, device)
    fresh = out / "work" / "base"
    shutil.rmtree(fresh, ignore_errors=True)
    for module in (pipe.vae, pipe.unet, pipe.text_encoder):
        nn.Module.half(module.cpu())  # to store, not to run; diffusers' own .to() warns of running
    pipe.save_pretrained(fresh)
    shutil.rmtree(out / "base")
    fresh.rename(out / "base")
    return facts


def _clip(out: Path, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    tokenizer = out / "base" / "tokenizer"
    build_tokenizer(tokenizer)
    clip, facts = train_clip(out / "work", tokenizer, recipe.clip, recipe.pool_size, device, vae=_load_vae(out, device))
    save_clip(clip.model, out / "clip")
    return facts


def _aesthetic(out: Path, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    clip = load_clip(out / "clip", out / "base" / "tokenizer", device)
    vae = _load_vae(out, device)
    judge, facts = train_aesthetic(out / "work", clip, recipe.aesthetic, recipe.pool_size, device, vae=vae)
    save_aesthetic(judge, out)
    return facts


def _checker(out: Path, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    vae = _load_vae(out, device)
    checker, facts = train_checker(out / "work", recipe.checker, recipe.pool_size, device, vae=vae)
    save_checker(checker, out)
    return facts


def _segmenter(out: Path, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    vae = _load_vae(out, device)
    segmenter, facts = train_segmenter(out / "work", recipe.segmenter, recipe.pool_size, device, vae=vae)
    save_segmenter(segmenter, out)
    return facts


STAGES: dict[str, Callable[[Path, Recipe, torch.device], dict[str, Any]]] = {
    "vae": _vae,
    "teacher": _teacher,
    "clip": _clip,
    "aesthetic": _aesthetic,
    "checker": _checker,
    "segmenter": _segmenter,
}


def _load_vae(out: Path, device: torch.device) -> AutoencoderKL:
    vae: AutoencoderKL = AutoencoderKL.from_pretrained(out / "base" / "vae", dtype=torch.float32)
    vae.register_to_config(_name_or_path="")  # or the folder of this machine would be saved with the weights
    return vae.to(device).eval().requires_grad_(False)


def shortened(recipe: Recipe, factor: float) -> Recipe:
    """The same recipe with every stage's steps scaled, for trials."""
    stages = {name: replace(getattr(recipe, name), steps=max(2, round(getattr(recipe, name).steps * factor)))
              for name in STAGES}  # fmt: skip
    return replace(recipe, **stages)
