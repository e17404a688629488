"""Images to scores: each metric over every image (or set of images) it has not scored yet."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from hypersd_bench import registry
from hypersd_bench.contracts import ImageMetric, MetricContext, SetMetric
from hypersd_bench.errors import InputError
from hypersd_bench.store import ImageRow, RunStore, ScoreRow, SetScoreRow

BATCH_SIZE = 64


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
        if metric.info.kind == "image":
            _score_images(store, metric)
        else:
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
    scored = {image_id for image_id, row in store.scores(metric.info.id).items() if row.value is not None}
    images = store.images()
    store.record_scores(
        [ScoreRow(metric.info.id, _id(row), None, f"image is {row.defect}") for row in images if row.defect]
    )
    todo = [row for row in sound(images) if row.id not in scored]
    with tqdm(total=len(todo), desc=metric.info.id, unit="image", disable=not todo) as bar:
        for rows in _batches(todo):
            values = metric.score(load_images(store.folder, rows), [row.prompt for row in rows])
            store.record_scores(
                [_score_row(metric.info.id, row, float(v)) for row, v in zip(rows, values, strict=True)]
            )
            bar.update(len(rows))


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


def _record_missing(store: RunStore, kind: str, metric_id: str, reason: str) -> None:
    images = store.images()
    if kind == "image":
        store.record_scores([ScoreRow(metric_id, _id(row), None, reason) for row in images])
        return
    sizes: dict[tuple[str, int], int] = defaultdict(int)
    for row in images:
        sizes[row.model, row.steps] += 1
    store.record_set_scores([SetScoreRow(metric_id, m, s, None, n, "", reason) for (m, s), n in sizes.items()])


def _batches(rows: Sequence[ImageRow]) -> Iterator[Sequence[ImageRow]]:
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
