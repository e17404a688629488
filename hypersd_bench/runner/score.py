"""Images to scores: each metric over every image, prompt, pair or set of images that it has not scored yet."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from hypersd_bench import registry
from hypersd_bench.contracts import ImageMetric, Kind, MetricContext, PairMetric, PromptMetric, SetMetric
from hypersd_bench.errors import InputError
from hypersd_bench.store import ImageRow, RunStore, ScoreRow, SetScoreRow

BATCH_SIZE = 64
T = TypeVar("T")


def score_run(store: RunStore, metric_ids: Sequence[str], context: MetricContext) -> dict[str, str]:
    """Score a run's images; returns the metrics that could not be computed, with the reason."""
    failed = {}
    for metric_id in metric_ids:
        factory = registry.resolve("metric", metric_id)
        try:
            metric = factory(context)
        except InputError as error:  # weights that are not here: the rest of the run is still worth having
            failed[metric_id] = str(error)
            _record_missing(store, factory.info.kind, metric_id, str(error))
            continue
        match metric.info.kind:
            case "image":
                _score_images(store, metric)
            case "prompt":
                _score_prompts(store, metric)
            case "pair":
                _score_pairs(store, metric)
            case "set":
                _score_sets(store, metric, context)
    return failed


def load_images(folder: Path, rows: Sequence[ImageRow]) -> Tensor:
    """Read images as (N, 3, H, W) uint8 RGB; grey and RGBA files are converted, a broken one raises InputError."""
    pictures = []
    for row in rows:
        try:
            with Image.open(folder / row.file) as picture:
                pictures.append(np.asarray(picture.convert("RGB")))
        except (OSError, ValueError) as error:
            raise InputError(f"can't read {folder / row.file} ({error}); remove it and run again") from error
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def sound(rows: Sequence[ImageRow]) -> list[ImageRow]:
    """The images without a defect; the others are reported, never scored."""
    return [row for row in rows if not row.defect]


def _score_images(store: RunStore, metric: ImageMetric) -> None:
    images, scored = _sound_and_scored(store, metric.info.id)
    todo = [row for row in images if row.id not in scored]
    with tqdm(total=len(todo), desc=metric.info.id, unit="image", disable=not todo) as bar:
        for rows in _batches(todo):
            values = metric.score(load_images(store.folder, rows), [row.prompt for row in rows])
            _record_values(store, metric.info.id, rows, values)
            bar.update(len(rows))


def _score_prompts(store: RunStore, metric: PromptMetric) -> None:
    """Score whole groups; one that has grown since it was scored is scored again, since every value changes."""
    images, scored = _sound_and_scored(store, metric.info.id)
    groups = [list(rows) for _, rows in groupby(images, lambda row: row.key[:3])]
    sizes = Counter(row.key[:3] for row in store.images())
    alone = {_id(rows[0]): _why_alone(sizes[rows[0].key[:3]]) for rows in groups if len(rows) == 1}
    _record_reasons(store, metric.info.id, alone)
    todo = [rows for rows in groups if len(rows) > 1 and any(row.id not in scored for row in rows)]
    with tqdm(total=sum(map(len, todo)), desc=metric.info.id, unit="image", disable=not todo) as bar:
        for rows in todo:
            values = metric.score_group(load_images(store.folder, rows), rows[0].prompt)
            _record_values(store, metric.info.id, rows, values)
            bar.update(len(rows))


def _score_pairs(store: RunStore, metric: PairMetric) -> None:
    """Score each image against the teacher's at its most steps; without one it is missing, and so is the teacher's."""
    images, scored = _sound_and_scored(store, metric.info.id)
    teacher = _teacher(store)
    partners = {row.key[2:]: row for row in images if row.key[:2] == teacher}
    pairs = [(row, partners.get(row.key[2:])) for row in images if row.id not in scored]
    missing = {_id(row): _why_unpaired(row, other, teacher) for row, other in pairs}
    _record_reasons(store, metric.info.id, {image_id: reason for image_id, reason in missing.items() if reason})
    todo = [(row, other) for row, other in pairs if other is not None and not missing[_id(row)]]
    with tqdm(total=len(todo), desc=metric.info.id, unit="image", disable=not todo) as bar:
        for batch in _batches(todo):
            rows, others = ([pair[side] for pair in batch] for side in (0, 1))
            values = metric.score_pairs(load_images(store.folder, rows), load_images(store.folder, others))
            _record_values(store, metric.info.id, rows, values)
            bar.update(len(rows))


def _teacher(store: RunStore) -> tuple[str, int] | None:
    """The name and most steps of the run's teacher; None when it has none."""
    found = (model for model in store.manifest["models"] if model.get("family") == "teacher")
    return next(((str(model["name"]), max(model["steps"])) for model in found), None)


def _why_alone(num_images: int) -> str:
    return "one image per prompt" if num_images == 1 else "no other sound image of its prompt"


def _why_unpaired(image: ImageRow, other: ImageRow | None, teacher: tuple[str, int] | None) -> str:
    if teacher is None:
        return "the run has no teacher"
    if image.key[:2] == teacher:
        return "it is the teacher's own"
    return "" if other else "no sound image of the teacher"


def _sound_and_scored(store: RunStore, metric_id: str) -> tuple[list[ImageRow], set[int]]:
    """The run's sound images, and the ids of those that have a value; the defects of the others are recorded."""
    images = store.images()
    _record_reasons(store, metric_id, {_id(row): f"image is {row.defect}" for row in images if row.defect})
    return sound(images), {image_id for image_id, row in store.scores(metric_id).items() if row.value is not None}


def _record_reasons(store: RunStore, metric_id: str, reasons: Mapping[int, str]) -> None:
    store.record_scores([ScoreRow(metric_id, image_id, None, reason) for image_id, reason in reasons.items()])


def _record_values(store: RunStore, metric_id: str, rows: Sequence[ImageRow], values: NDArray[np.float64]) -> None:
    store.record_scores([_score_row(metric_id, row, float(value)) for row, value in zip(rows, values, strict=True)])


def _score_row(metric_id: str, row: ImageRow, value: float) -> ScoreRow:
    return ScoreRow(metric_id, _id(row), value) if np.isfinite(value) else ScoreRow(
        metric_id, _id(row), None, "the metric gave no finite value")  # fmt: skip


def _score_sets(store: RunStore, metric: SetMetric, context: MetricContext) -> None:
    groups = [(key, sound(list(rows))) for key, rows in groupby(store.images(), lambda row: (row.model, row.steps))]
    have = {(row.model, row.steps): row.num_images for row in store.set_scores()
            if row.metric == metric.info.id and row.value is not None}  # fmt: skip
    todo = [(key, rows) for key, rows in groups if have.get(key) != len(rows)]
    if not todo:
        return
    reference = metric.reference()
    _save_array(store.folder / "features" / metric.info.id.replace("/", "_") / "reference.npy", reference)
    name = str(context.reference) if context.reference else f"{len(reference)} images of the metric's own reference"
    with tqdm(total=sum(len(rows) for _, rows in todo), desc=metric.info.id, unit="image") as bar:
        for (model, steps), rows in todo:
            parts = []
            for batch in _batches(rows):
                parts.append(metric.features(load_images(store.folder, batch)))
                bar.update(len(batch))
            if len(rows) < 2:
                reason = f"{len(rows)} sound images; a distance between sets needs at least 2"
                store.record_set_scores([SetScoreRow(metric.info.id, model, steps, None, len(rows), name, reason)])
                continue
            features = np.concatenate(parts)
            _save_array(store.features_path(metric.info.id, model, steps), features)
            value = metric.distance(features, reference)
            store.record_set_scores([SetScoreRow(metric.info.id, model, steps, value, len(rows), name)])


def _record_missing(store: RunStore, kind: Kind, metric_id: str, reason: str) -> None:
    images = store.images()
    if kind != "set":
        _record_reasons(store, metric_id, {_id(row): reason for row in images})
        return
    sizes: dict[tuple[str, int], int] = defaultdict(int)
    for row in images:
        sizes[row.model, row.steps] += 1
    store.record_set_scores([SetScoreRow(metric_id, m, s, None, n, "", reason) for (m, s), n in sizes.items()])


def _batches(rows: Sequence[T]) -> Iterator[Sequence[T]]:
    return (rows[i : i + BATCH_SIZE] for i in range(0, len(rows), BATCH_SIZE))


def _save_array(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.save(file, array)
    partial.replace(path)


def _id(row: ImageRow) -> int:
    assert row.id is not None, "rows read from the ledger have ids"
    return row.id
