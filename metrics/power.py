"""How small a difference a run can show, and how many prompts a difference needs: for ``plan``, before a run is made.

What it rests on is how much the paired differences of one prompt spread. A scored run tells (a pilot of some 50 prompts
is enough for an idea); without one, only CLIP score has a figure to assume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, isnan, sqrt
from statistics import median

import numpy as np

from hypersd_bench.contracts import MetricInfo
from hypersd_bench.store import RunStore
from metrics.stats import VarianceSplit, minimum_detectable_difference, prompts_needed, variance_split

POWER, ALPHA = 0.8, 0.05
ASSUMED_UNIT = "cosine x100"
ASSUMED_SD, ASSUMED_CORRELATION = 3.2, 0.7  # of CLIP scores of photographs-like images, one seed; two models' alike
ASSUMED = f"assumed: sd {ASSUMED_SD} of an image's score, correlation {ASSUMED_CORRELATION} between models"


@dataclass(frozen=True, slots=True)
class Power:
    """What a run of some prompts and seeds can show under a metric, with 80 % power at a corrected level of 5 %.

    sd: of a prompt's mean paired difference; None where nothing tells, and ``source`` says why. comparisons: how many
    are corrected together. detectable: smallest true difference shown. prompts_needed: for ``effect``, where one was
    asked about. twice_the_prompts, twice_the_seeds: what ``detectable`` would become; None where no seeds tell.
    """

    metric: str
    unit: str
    sd: float | None
    source: str
    comparisons: int
    detectable: float | None = None
    effect: float | None = None
    prompts_needed: int | None = None
    twice_the_prompts: float | None = None
    twice_the_seeds: float | None = None


def power_of(
    infos: Sequence[MetricInfo],
    num_prompts: int,
    seeds: int,
    comparisons: int,
    effects: Mapping[str, float],
    pilot: RunStore | None,
) -> list[Power]:
    """The power of a plan under each of its metrics.

    seeds: images per prompt. comparisons: of all metrics together. effects: differences asked about, by metric id.
    pilot: a scored run to learn the spread from.
    """
    return [_power(info, _spread(info, pilot), num_prompts, seeds, comparisons, effects.get(info.id)) for info in infos]


def _power(
    info: MetricInfo,
    spread: tuple[VarianceSplit | float | None, str],
    num_prompts: int,
    seeds: int,
    comparisons: int,
    effect: float | None,
) -> Power:
    known, source = spread
    if known is None:
        return Power(info.id, info.unit, None, source, comparisons, effect=effect)
    split = known if isinstance(known, VarianceSplit) and not isnan(known.between) else None
    sd = split.sd(seeds) if split else float(known if isinstance(known, float) else 0.0)

    def detectable(sd: float, prompts: int) -> float:
        return minimum_detectable_difference(sd, prompts, POWER, ALPHA, comparisons)

    return Power(
        info.id, info.unit, sd, source, comparisons,
        detectable=detectable(sd, num_prompts),
        effect=effect,
        prompts_needed=prompts_needed(effect, sd, POWER, ALPHA, comparisons) if effect else None,
        twice_the_prompts=detectable(sd, 2 * num_prompts),
        twice_the_seeds=detectable(split.sd(2 * seeds), num_prompts) if split else None,
    )  # fmt: skip


def _spread(info: MetricInfo, pilot: RunStore | None) -> tuple[VarianceSplit | float | None, str]:
    """How paired differences of one prompt spread, by prompts and seeds where both are told, and where that is from."""
    if not info.per_image:
        return None, "a value of a whole set: score a pilot run, and `compare` shows its interval"
    if pilot:
        found = _measured(info, pilot)
        if found is not None:
            return found
    if info.unit == ASSUMED_UNIT and info.id.startswith("clip-score/"):
        return ASSUMED_SD * sqrt(2 * (1 - ASSUMED_CORRELATION)), ASSUMED
    return None, "nothing tells its spread: name a scored run with --like RUN"


def _measured(info: MetricInfo, pilot: RunStore) -> tuple[VarianceSplit | float, str] | None:
    """The median spread over the pilot's models beside its baseline; without several seeds, as it was with those."""
    splits, plain = [], []
    for d, prompts in _paired(info, pilot):
        if len(set(prompts)) < 2:
            continue
        split = variance_split(d, prompts)
        if isfinite(split.between):
            splits.append(split)
        plain.append(float(np.std(list(_means(d, prompts).values()), ddof=1)))
    if not plain:
        return None
    n = len(plain)
    source = f"measured in {pilot.folder}: median of {n} pair{'s' if n > 1 else ''} of configurations"
    if splits:
        between, within = median(s.between for s in splits), median(s.within for s in splits)
        return VarianceSplit(between, within, splits[0].num_clusters, splits[0].n), source
    return median(plain), f"{source}, seeds as in that run"


def _means(d: Sequence[float], prompts: Sequence[str]) -> dict[str, float]:
    by_prompt: dict[str, list[float]] = {}
    for value, prompt in zip(d, prompts, strict=True):
        by_prompt.setdefault(prompt, []).append(value)
    return {prompt: sum(values) / len(values) for prompt, values in by_prompt.items()}


def _paired(info: MetricInfo, pilot: RunStore) -> list[tuple[list[float], list[str]]]:
    """Differences from the baseline with their prompts, for each model and step count that both have."""
    scores = pilot.scores(info.id)
    cells: dict[tuple[str, int], dict[tuple[str, int], float]] = {}
    for row in pilot.images():
        score = scores.get(row.key_id)
        if score is not None and score.value is not None:
            cells.setdefault((row.model, row.steps), {})[row.prompt_id, row.replicate] = score.value
    baseline = str(pilot.manifest["baseline"])
    found = []
    for (model, steps), values in cells.items():
        base = cells.get((baseline, steps), {})
        shared = sorted(values.keys() & base.keys()) if model != baseline else []
        if shared:
            found.append(([values[key] - base[key] for key in shared], [prompt for prompt, _ in shared]))
    return found
