"""The curve over steps while training: a grid of pictures and a few metrics of the harness, teacher beside student.

Looks are taken between steps, never inside one, and no oftener than their cost allows (``MAX_SHARE`` of the time).
Prompts are those of training, not those that results are measured on.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from distill.pictures import as_grid, write_grid
from distill.roles import Roles
from distill.stages import Stage
from hypersd_bench import registry
from hypersd_bench.contracts import ImageMetric, MetricContext, PromptMetric
from hypersd_bench.errors import InputError
from hypersd_bench.pipelines import Pipeline, sample, with_unet
from hypersd_bench.prompts import Prompt
from hypersd_bench.sampling import SamplerContract, ddim_trailing, skipping, trailing
from hypersd_bench.seeding import image_seed

STEPS = (1, 2, 4, 8)
TEACHER_STEPS = 25
REPLICATES = 2  # of every prompt, so that diversity can be seen
MAX_SHARE = 0.05  # of the time may go into looking


class Scoreboard:
    """Samples the running mean of a training student at 1, 2, 4 and 8 steps, on the same noise every time."""

    def __init__(
        self, pipe: Pipeline, roles: Roles, folder: Path, prompts: Sequence[Prompt], metrics: Sequence[str],
        guidance: float, every_s: float,
    ) -> None:  # fmt: skip
        self._pipe, self._roles, self._folder, self._guidance = pipe, roles, folder, guidance
        self._prompts = [prompt for prompt in prompts for _ in range(REPLICATES)]
        self._seeds = [image_seed(0, prompt.id, replicate) for prompt in prompts for replicate in range(REPLICATES)]
        self._metric_ids, self._every_s = metrics, every_s
        self._next = time.monotonic() + every_s
        self.missing: dict[str, str] = {}
        self.grid = np.zeros((0, 1, 1, 3), np.uint8)  # the last look's, (1, H, W, 3), for trackers

    @property
    def due(self) -> bool:
        """Whether it is time for another look."""
        return self._every_s > 0 and time.monotonic() >= self._next

    @torch.no_grad()
    def look(self, stage: Stage, images_seen: int) -> list[dict[str, Any]]:
        """Write a grid and append rows to ``scoreboard.jsonl``; returns the rows, the teacher's first."""
        began = time.monotonic()
        contract = any_steps(replace(stage.contract, prediction_type=self._roles.predicts("ema")))
        pictures = {steps: self._sample("ema", contract, steps) for steps in STEPS}
        rows = [self._row(stage, images_seen, "teacher", TEACHER_STEPS, self._teacher, True)]
        rows += [
            self._row(stage, images_seen, "student", steps, images, steps in stage.contract.timesteps)
            for steps, images in pictures.items()
        ]
        with (self._folder / "scoreboard.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        shown = slice(0, None, REPLICATES)
        grid = [self._teacher[shown], *(images[shown] for images in pictures.values())]
        self.grid = np.asarray(as_grid(grid))[None]
        write_grid(self._folder / "samples" / f"{stage.name}-{images_seen}.png", grid)
        spent = time.monotonic() - began
        self._next = time.monotonic() + max(self._every_s, spent / MAX_SHARE)
        return rows

    @cached_property
    def _teacher(self) -> Tensor:
        return self._sample("teacher", ddim_trailing((TEACHER_STEPS,), self._guidance), TEACHER_STEPS)

    def _sample(self, role: Any, contract: SamplerContract, steps: int) -> Tensor:
        with self._roles.acting(role) as unet:
            pipe = self._pipe if unet is self._pipe.unet else with_unet(self._pipe, unet)
            return sample(pipe, contract, steps, [prompt.text for prompt in self._prompts], self._seeds)

    @cached_property
    def _metrics(self) -> dict[str, ImageMetric | PromptMetric]:
        """The metrics that can run here; why the others cannot is kept in ``missing``."""
        found = {}
        for name in self._metric_ids:
            try:
                found[name] = registry.resolve("metric", name)(MetricContext(str(self._pipe.device)))
            except InputError as error:
                self.missing[name] = str(error)
                tqdm.write(f"scoreboard: without {name}: {error}", file=sys.stderr)
        return found

    def _row(
        self, stage: Stage, images_seen: int, model: str, steps: int, images: Tensor, supported: bool
    ) -> dict[str, Any]:
        values = {name: self._mean(metric, images) for name, metric in self._metrics.items()}
        diversity = next((value for name, value in values.items() if name.startswith("diversity/")), None)
        row: dict[str, Any] = {
            "kind": "scoreboard", "stage": stage.name, "images_seen": images_seen, "model": model, "steps": steps,
            "supported": supported, "n": len(images), "metrics": values,
        }  # fmt: skip
        return row if diversity is None else {**row, "diversity": diversity}

    def _mean(self, metric: ImageMetric | PromptMetric, images: Tensor) -> float:
        if isinstance(metric, PromptMetric):
            groups = images.split(REPLICATES)
            texts = [prompt.text for prompt in self._prompts[::REPLICATES]]
            return float(np.mean([metric.score_group(g, text) for g, text in zip(groups, texts, strict=True)]))
        return float(metric.score(images, [prompt.text for prompt in self._prompts]).mean())


def any_steps(contract: SamplerContract) -> SamplerContract:
    """The contract with 1, 2, 4 and 8 steps, in its own spacing where it does not say them: to look, not to publish."""
    spacing = skipping if contract.scheduler in ("LCMScheduler", "TCDScheduler") else trailing
    return replace(contract, timesteps={steps: spacing(steps) for steps in STEPS} | dict(contract.timesteps))


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Scoreboard rows as flat figures for a tracker: ``student@4/clip-score/pocket``."""
    return {f"{row['model']}@{row['steps']}/{name}": value for row in rows for name, value in row["metrics"].items()}
