"""Published numbers beside ours: one ``Cell`` for each, with the window, the verdict and likely causes. No torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from hypersd_bench.errors import InputError
from hypersd_bench.reference import IMAGE_SUFFIXES
from hypersd_bench.runner.doubtful import doubtful_images
from metrics.comparison import Summary, is_trained_on, summaries
from metrics.reproduce.causes import Cause, Evidence, likely_causes
from metrics.reproduce.preset import Column, Preset, Row, catalogue_entries, run_name
from metrics.reproduce.window import Verdict, Window, computed_window, is_biased_by_count, published_window

if TYPE_CHECKING:
    from hypersd_bench.store import RunStore
    from metrics.stats import Estimate


@dataclass(frozen=True)
class Cell:
    """One published number and ours.

    published: as printed; ours and window in the unit of our protocol ``metric`` (None: there is none). A window that
    the source gives is there without a number of ours, too. reason: why it is not comparable or not measured.
    trained_on: whether the model was optimised for this metric. confirmed: whether a primary source of the published
    number was read.
    """

    model: str
    steps: int
    column: str
    metric: str | None
    published: float
    confirmed: bool
    trained_on: bool
    verdict: Verdict
    reason: str = ""
    ours: Estimate | None = None
    window: Window | None = None
    causes: tuple[Cause, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What came of a run. store: its directory, None where nothing was run. absent: why a configuration,
    ``model@steps``, was not run. not_scored: why a metric was not computed. blocked: why nothing was run.
    """

    store: RunStore | None = None
    absent: Mapping[str, str] = field(default_factory=dict)
    not_scored: Mapping[str, str] = field(default_factory=dict)
    blocked: str = ""


def compare(preset: Preset, outcome: Outcome, models: Collection[str]) -> list[Cell]:
    """All numbers of the preset's table for these models, in the table's order, beside those of the run.

    Raises InputError for a run of another base.
    """
    run = _Run(outcome.store, preset) if outcome.store else None
    return [
        _cell(preset, row, name, outcome, run)
        for row in preset.rows
        if row.model in models
        for name in preset.columns
        if name in row.values
    ]


class _Run:
    """What the cells need to know of a run, read once."""

    def __init__(self, store: RunStore, preset: Preset) -> None:
        self.manifest: dict[str, Any] = store.manifest
        if self.manifest["spec"].get("base") != preset.spec.base:
            found = self.manifest["spec"].get("base")
            raise InputError(f"{store.folder} holds a run of base {found!r}, {preset.id} is of {preset.spec.base!r}; "
                             "choose another --out")  # fmt: skip
        self.levels = {(level.model, level.steps, level.metric): level for level in summaries(store)}
        self.doubtful = {(row.model, row.steps): row for row in doubtful_images(store.images())}
        self.of_the_list = _is_of_the_list(self.manifest, preset)
        self.references = {(row.model, row.steps, row.metric): row.reference for row in store.set_scores()}
        self._first_images: dict[tuple[str, int], Path] = {}
        for image in store.images():
            self._first_images.setdefault((image.model, image.steps), store.folder / image.file)
        reference = self.manifest["spec"].get("reference")
        self.reference_suffixes = _suffixes(reference) if reference else frozenset[str]()

    def level(self, row: Row, metric: str) -> Summary | None:
        """The level of a configuration under a metric; None where the run has neither images nor scores."""
        return self.levels.get((row.model, row.steps, metric))

    def size(self, row: Row) -> tuple[int, int] | None:
        """Width and height of a configuration's first image, from its header; None where it can't be read."""
        path = self._first_images.get((row.model, row.steps))
        try:
            with Image.open(path or "") as image:
                return image.size
        except (OSError, ValueError, Image.DecompressionBombError):
            return None

    def is_of_statistics(self, reference: str) -> bool:
        """Whether a set score's reference, by its id, is statistics from a .npz and no folder of images."""
        if _count_of(reference) == "statistics":
            return True
        name, found, _ = str(self.manifest["spec"].get("reference") or "").partition(".npz")
        return bool(found) and reference.rsplit("-", 2)[0] == Path(name).name


def _cell(preset: Preset, row: Row, name: str, outcome: Outcome, run: _Run | None) -> Cell:
    column, ends = preset.columns[name], row.windows.get(name)
    blank = Cell(
        row.model, row.steps, name, column.metric, row.values[name], row.confirmed and column.confirmed,
        column.metric is not None and is_trained_on(_trained_on(preset.spec.base, row.model, row.steps), column.metric),
        "not measured", window=published_window(ends, column.scale) if ends else None,
    )  # fmt: skip
    if column.metric is None:
        return replace(blank, verdict="not comparable", reason=column.reason)
    level = run.level(row, column.metric) if run else None
    if run is None or level is None or level.estimate is None:
        return replace(blank, reason=_why_not_measured(row, column.metric, outcome, level))
    return _judged(blank, preset, row, column, level.estimate, run)


def _why_not_measured(row: Row, metric: str, outcome: Outcome, level: Summary | None) -> str:
    reasons = (
        outcome.absent.get(row.label), outcome.not_scored.get(metric), level.reason if level else "", outcome.blocked,
    )  # fmt: skip
    return next((reason for reason in reasons if reason), "not run")


def _judged(blank: Cell, preset: Preset, row: Row, column: Column, ours: Estimate, run: _Run) -> Cell:
    """A number of ours with its window, its verdict, and likely causes where it is outside."""
    assert column.metric is not None, "a column without a metric is not judged"
    cell = replace(blank, ours=ours)
    if why := _why_other_run(preset, row, column.metric, run) or _why_unlike(cell, column.metric, preset):
        return replace(cell, verdict="not comparable", reason=why)
    window = cell.window or computed_window(
        cell.published, column.digits, _half_width(ours), ours.num_clusters, preset.protocol.count, column.metric,
        column.scale,
    )  # fmt: skip
    if window.holds(ours.value):
        return replace(cell, verdict="inside", window=window)
    causes = tuple(likely_causes(_evidence(cell, preset, row, column, ours, run)))
    return replace(cell, verdict="outside", window=window, causes=causes)


def _is_of_the_list(manifest: Mapping[str, Any], preset: Preset) -> bool:
    """Whether a run's prompts are the preset's set, its pinned list, or a list declared as the source's own.

    ``reproduce PRESET --prompts FILE`` declares it: the run has the preset's name, and the file as its prompts.
    A pin decides over all prompts; a part of them has another hash, and must be of a list of the right length.
    """
    protocol, spec, prompts = preset.protocol, manifest["spec"], manifest["prompts"]
    if protocol.prompts_sha256:
        if prompts.get("sha256") == protocol.prompts_sha256:
            return True
        if prompts.get("count") == protocol.count or prompts.get("of", protocol.count) != protocol.count:
            return False
    declared = spec.get("name") == run_name(preset) and prompts.get("id") == spec.get("prompts")
    return bool(declared or prompts.get("id") == preset.spec.prompts)


def _why_other_run(preset: Preset, row: Row, metric: str, run: _Run) -> str:
    """Why a run is none of what the source measured: prompts, size, reference; empty where it is."""
    if not run.of_the_list:
        return (
            f"the numbers are of {preset.protocol.prompts}, and the run's prompts are not these, "
            f"but {run.manifest['prompts'].get('id')}"
        )
    size, sizes = run.size(row), row.pixels or (preset.protocol.pixels,)
    if size is None:
        return "the size of our images is unknown: the first can't be read"
    if size not in [(pixels, pixels) for pixels in sizes]:
        theirs = " or ".join(map(str, sizes))
        return f"our images are of {size[0]}x{size[1]} px, theirs of {theirs} px"
    level = run.level(row, metric)
    return _why_other_reference(preset, row, metric, run) if level and level.info.kind == "set" else ""


def _why_other_reference(preset: Preset, row: Row, metric: str, run: _Run) -> str:
    protocol, reference = preset.protocol, run.references.get((row.model, row.steps, metric), "")
    if protocol.reference_features and not run.is_of_statistics(reference):
        return f"the source's reference is statistics in a .npz, and ours, {reference or 'unknown'}, is not"
    if protocol.reference_count and _count_of(reference) != str(protocol.reference_count):
        theirs = f"{protocol.reference_count:,} images"
        return f"the source's reference is of {theirs}, and ours, {reference or 'unknown'}, is not"
    return ""


def _count_of(reference: str) -> str:
    """The number of images in a reference's id, ``photographs-5000-1a2b3c4d``, or ``statistics``; empty for none."""
    parts = reference.rsplit("-", 2)
    return parts[1] if len(parts) == 3 else ""


def _why_unlike(cell: Cell, metric: str, preset: Preset) -> str:
    """Why a number of ours can't be set beside the published one; empty where it can."""
    ours, count = cell.ours, preset.protocol.count
    assert ours is not None
    if cell.window:
        return f"the window is for {count:,} images, ours are {ours.n:,}" if count and ours.n != count else ""
    if is_biased_by_count(metric) and ours.n != count:
        theirs = f"{count:,}" if count else "an unknown number"
        return f"a distance of {ours.n:,} images, theirs of {theirs}: its bias falls as 1/N, so N must be equal"
    return "" if math.isfinite(_half_width(ours)) else f"our number has no interval: {ours.num_clusters} prompts"


def _half_width(estimate: Estimate) -> float:
    """Half of an interval, on its longer side; NaN where there is none."""
    return max(estimate.high - estimate.value, estimate.value - estimate.low)


def _evidence(cell: Cell, preset: Preset, row: Row, column: Column, ours: Estimate, run: _Run) -> Evidence:
    assert column.metric is not None
    model: dict[str, Any] = next((m for m in run.manifest["models"] if m["name"] == row.model), {})
    prompts, configuration = run.manifest["prompts"], run.manifest.get("configurations", {}).get(row.label, {})
    doubtful = run.doubtful.get((row.model, row.steps))
    return Evidence(
        metric=column.metric,
        published=cell.published * column.scale,
        ours=ours.value,
        n=ours.num_clusters,
        n_published=preset.protocol.count,
        prompts_listed=preset.protocol.prompts_listed,
        assumption=column.assumption,
        differs=preset.protocol.differs,
        breaches=() if row.forced else tuple(model.get("breaches", ())),
        unconfirmed=model.get("unconfirmed", ""),
        precision=configuration.get("precision", ""),
        defects=doubtful.defects if doubtful else {},
        images=doubtful.images if doubtful else 0,
        truncated=prompts.get("truncated", {}).get("count", 0),
        reference_suffixes=run.reference_suffixes,
    )


@cache
def _trained_on(base: str, label: str, steps: int) -> frozenset[str]:
    """The metrics that a model of the catalogue was optimised for."""
    entries = catalogue_entries(base, label, steps, forced=True)
    fitting = [model for model in entries if steps in model.contract.timesteps] or entries
    return frozenset(metric for model in fitting for metric in model.trained_on)


def _suffixes(reference: str) -> frozenset[str]:
    """The suffixes of a reference's files: of a folder's images, of a file of statistics; empty where unknown."""
    folder = Path(reference)
    if ".npz" in reference:
        return frozenset({".npz"})
    if not folder.is_dir():
        return frozenset()
    return frozenset(path.suffix.lower() for path in folder.iterdir()) & frozenset(IMAGE_SUFFIXES)
