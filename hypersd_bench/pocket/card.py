"""The miniature's model card: ``card.json`` as the stages fill it, and the README.md made from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypersd_bench.pocket.scenes import ATTRIBUTION, BACKGROUND_NAMES, CONCEPT_NAMES, SIZE
from hypersd_bench.store import write_bytes, write_json

_WHAT = {
    "vae": "AutoencoderKL, 64x64 pixels to 8x8 latents of 16 channels, normalised per channel",
    "teacher": "UNet2DConditionModel and CLIPTextModel, noise prediction on Stable Diffusion's schedule",
    "clip": "CLIP through open_clip: judges `clip-score/pocket`",
    "aesthetic": "head on that CLIP, trained to rank clean renders above degraded ones: judges `aesthetic/pocket`",
    "checker": "fully convolutional reader of concepts, order and background: judges `concept/pocket`",
    "segmenter": "SOLO with a kernel per cell, on the scenes' exact masks: the perceptual reward of feedback learning",
}


def read_card(folder: Path) -> dict[str, Any]:
    """What ``card.json`` says of the stages done so far."""
    path = folder / "card.json"
    return json.loads(path.read_text()) if path.exists() else {"attribution": ATTRIBUTION, "stages": {}, "check": []}


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Write ``card.json`` and the README.md that says the same to people.

    ``remarks``, where somebody wrote them into the card, are sentences on how these very weights came to be.
    """
    write_json(folder / "card.json", card)
    write_bytes(folder / "README.md", _readme(card).encode())


def thinned_curve(log: Path, points: int = 25) -> list[dict[str, float]]:
    """A training log thinned to about ``points`` rows, the last one kept."""
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [*rows[: -1 : max(1, len(rows) // points)], *rows[-1:]]


def _readme(card: dict[str, Any]) -> str:
    stages, rows = card["stages"], card["check"]
    parts = [
        "# The miniature\n",
        "A complete small text-to-image world in the layout of Stable Diffusion 1.5, for learning, testing and method "
        "research at low cost. It says nothing about SDXL.\n",
        f"**Data.** Emoji scenes of {SIZE}x{SIZE} pixels, rendered endlessly from seeds: one emoji, or two side by "
        f"side, of {len(CONCEPT_NAMES)} concepts ({', '.join(CONCEPT_NAMES)}) on {len(BACKGROUND_NAMES)} backgrounds "
        f"({', '.join(BACKGROUND_NAMES)}). One in eight combinations of concept and background, and one in eight "
        f"pairs of concepts, are held out of every training. {card['attribution']}\n",
        "**Made by** `hypersd-bench pocket build`; seeds are in the code, so the same command makes the same weights "
        "up to floating-point rounding. Curves are in `card.json`.\n",
        "| part | what | steps x batch | minutes | last loss | machine |",
        "|---|---|---|---|---|---|",
        *(_stage_row(name, stages[name]) for name in _WHAT if name in stages),
        "",
        *(f"{remark}\n" for remark in card.get("remarks", ())),
    ]
    if rows:
        parts += [
            "**Measured by** `hypersd-bench pocket check`, on held-out prompts and scenes:\n",
            "| what | measured | 95 % interval | n | bar |",
            "|---|---|---|---|---|",
            *(f"| {r['name']} | {r['value']:.3g} {r['unit']} | {r['low']:.3g} to {r['high']:.3g} | {r['n']} | "
              f"{r['bar']:g}{'' if r['passed'] else ' **missed**'} |" for r in rows),
            "",
        ]  # fmt: skip
    return "\n".join(parts)


def _stage_row(name: str, facts: dict[str, Any]) -> str:
    loss = facts["curve"][-1]["loss"] if facts["curve"] else float("nan")
    return (
        f"| {name} | {_WHAT[name]} | {facts['steps']} x {facts['batch_size']} | {facts['seconds'] / 60:.0f} | "
        f"{loss:.4g} | {facts['provenance']['machine']}, {facts['provenance']['device']} |"
    )
