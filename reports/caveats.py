"""What would spoil the reading of a report, in sentences: said beside the verdict, not below it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from reports.data import ReportData
from reports.strings import Said, counted, listed, say, semicolons
from reports.training import Made


def caveats(data: ReportData) -> list[str]:
    """Say what would spoil the reading: a run not finished, missing scores, metrics trained on, proxies."""
    found: list[str] = [*unfinished(data)]
    if any(run.base == "pocket" for run in data.runs):
        found.append(say("caveat.miniature"))
    if data.runs and not data.cells:
        found.append(say("caveat.unscored"))
    found += data.notes
    if data.study is not None:
        found += [say("caveat.study", deviation=deviation) for deviation in data.study.deviations]
    found += _missing(data)
    found += _unequal_sets(data)
    if len(data.runs) > 1 and (data.latencies or data.memories):
        found.append(say("caveat.several_costs"))
    found += _single_seeds(data.made)
    found += _unequal_training(data.made)
    for metric in data.metrics:
        trained = [model.label for model in data.models if model.was_trained_on(metric.id)]
        if trained:
            key = "caveat.was_trained" if len(trained) == 1 else "caveat.were_trained"
            found.append(say(key, models=listed(trained), metric=metric.label))
    found += [f"{metric.label} ({metric.id}): {metric.note}." for metric in data.metrics if metric.note]
    return found


def unfinished(data: ReportData) -> Iterator[Said]:
    """Name the runs that have fewer images than their specs ask for."""
    for run in data.runs:
        if run.num_images < run.num_expected:
            which = f"{run.name}: " if len(data.runs) > 1 else ""
            yield say("caveat.unfinished", which=which, n=f"{run.num_images:,}", of=f"{run.num_expected:,}")


def _missing(data: ReportData) -> Iterator[Said]:
    """Count the images without a score, by model, step count and reason, with the metrics that lack them."""
    groups: dict[tuple[str, int, int, str], list[str]] = {}
    for cell in data.cells:
        if cell.missing:
            key = (cell.model, cell.steps, cell.missing, cell.reason)
            groups.setdefault(key, []).append(data.metric(cell.metric).label)
    for (model, steps, missing, reason), metrics in groups.items():
        yield say(
            "caveat.missing",
            images=counted(missing, "image"),
            model=data.model(model).label,
            at=counted(steps, "step"),
            metrics=listed(metrics),
            reason=f": {reason}" if reason else "",
        )


def _unequal_sets(data: ReportData) -> Iterator[Said]:
    """Name the set metrics that are of unequal numbers of images, which moves them by itself."""
    for metric in data.metrics:
        sizes = sorted({c.n for c in data.cells if c.metric == metric.id and c.value is not None})
        if metric.kind == "set" and len(sizes) > 1:
            yield say("caveat.unequal_sets", metric=metric.label, low=f"{sizes[0]:,}", high=f"{sizes[-1]:,}")


def _single_seeds(made: Sequence[Made]) -> Iterator[Said]:
    """Name those whose recipe, the command without its seed, was trained once."""
    seeds: dict[str, set[int]] = defaultdict(set)
    recipes: dict[str, set[str]] = defaultdict(set)
    for one in made:
        if {"command", "seed"} <= one.card.keys():
            recipe = re.sub(r" --seed \d+\b", "", one.card["command"])
            seeds[recipe].add(one.card["seed"])
            recipes[one.label].add(recipe)
    once = [label for label, mine in recipes.items() if all(len(seeds[recipe]) == 1 for recipe in mine)]
    if once:
        yield say("caveat.one_seed", models=listed(once))


def _unequal_training(made: Sequence[Made]) -> Iterator[Said]:
    """Say where the models did not get the same: images, rank, teacher."""
    for key in ("images_seen", "rank"):
        values: dict[str, list[int]] = defaultdict(list)
        for one in made:
            if key in one.card:
                values[one.label].append(one.card[key])
        if len({value for mine in values.values() for value in mine}) > 1:
            spans = [say("caveat.span", model=label, span=span(mine)) for label, mine in values.items()]
            yield say(f"caveat.unequal_{key}", models=semicolons(spans))
    if len({one.card["base_unet_sha256"] for one in made if "base_unet_sha256" in one.card}) > 1:
        yield say("caveat.teachers")


def span(values: Sequence[int]) -> str:
    """The range of some numbers, or the one number."""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else say("verdict.span", low=f"{low:,}", high=f"{high:,}")
