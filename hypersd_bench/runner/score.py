"""Images to scores: each metric over every image, prompt, pair or set of images that it has not scored yet.

All metrics but those of pairs share one pass: an image is read once for all of them.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

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
AHEAD = 2  # batches read beforehand


@dataclass(frozen=True)
class Task:
    """A metric in the one pass over the images.

    wants: ids of the images it needs. take: what it does with some of them, (N, 3, H, W) uint8, whole prompts at once.
    finish: what it does when all images of a model and step count have been taken.
    """

    wants: set[int]
    take: Callable[[Sequence[ImageRow], Tensor], None]
    finish: Callable[[Sequence[ImageRow]], None] = lambda rows: None


def score_run(store: RunStore, metric_ids: Sequence[str], context: MetricContext) -> dict[str, str]:
    """Score a run's images; returns the metrics that could not be computed, with the reason."""
    failed, metrics = {}, []
    for metric_id in metric_ids:
        factory = registry.resolve("metric", metric_id)
        try:
            metrics.append(factory(context))
        except InputError as error:  # weights that are not here: the rest of the run is still worth having
            failed[metric_id] = str(error)
            _record_missing(store, factory.info.kind, metric_id, str(error))
    tasks = []
    for metric in metrics:
        match metric.info.kind:
            case "image":
                tasks.append(_image_task(store, metric))
            case "prompt":
                tasks.append(_prompt_task(store, metric))
            case "set":
                tasks.append(_set_task(store, metric, context))
    _one_pass(store, tasks)
    for metric in metrics:
        if metric.info.kind == "pair":
            _score_pairs(store, metric)
    return failed


def _one_pass(store: RunStore, tasks: Sequence[Task]) -> None:
    """Read each image once for all of the metrics that want it; the next batches are read while these are scored."""
    wanted = set().union(*(task.wants for task in tasks))
    groups = [list(rows) for _, rows in groupby(sound(store.images()), lambda row: row.key[:2])]
    with (
        tqdm(total=len(wanted), desc="scores", unit="image", disable=not wanted) as bar,
        _Reader(store.folder) as reader,
    ):
        for rows in groups:
            todo = [row for row in rows if row.id in wanted]
            for batch, images in reader.read(_whole_prompts(todo)):
                for task in tasks:
                    mine = [i for i, row in enumerate(batch) if row.id in task.wants]
                    if mine:
                        task.take([batch[i] for i in mine], images[mine])
                bar.update(len(batch))
            for task in tasks:
                if any(row.id in task.wants for row in rows):
                    task.finish(rows)


class _Reader:
    """Reads batches of images in threads, some batches ahead."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._threads = ThreadPoolExecutor(AHEAD)

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def read(self, batches: Iterable[Sequence[ImageRow]]) -> Iterator[tuple[Sequence[ImageRow], Tensor]]:
        """Give each batch with its images, in order."""
        ahead: deque[tuple[Sequence[ImageRow], Future[Tensor]]] = deque()
        for batch in batches:
            ahead.append((batch, self._threads.submit(load_images, self._folder, batch)))
            if len(ahead) > AHEAD:
                rows, images = ahead.popleft()
                yield rows, images.result()
        for rows, images in ahead:
            yield rows, images.result()


def _whole_prompts(rows: Sequence[ImageRow]) -> Iterator[list[ImageRow]]:
    """Cut rows into batches of about ``BATCH_SIZE`` that never part the images of a prompt."""
    batch: list[ImageRow] = []
    for _, group in groupby(rows, lambda row: row.key[:3]):
        batch += group
        if len(batch) >= BATCH_SIZE:
            yield batch
            batch = []
    if batch:
        yield batch


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


def _image_task(store: RunStore, metric: ImageMetric) -> Task:
    images, scored = _sound_and_scored(store, metric.info.id)

    def take(rows: Sequence[ImageRow], pixels: Tensor) -> None:
        _record_values(store, metric.info.id, rows, metric.score(pixels, [row.prompt for row in rows]))

    return Task({_id(row) for row in images} - scored, take)


def _prompt_task(store: RunStore, metric: PromptMetric) -> Task:
    """Score whole groups; one that has grown since it was scored is scored again, since every value changes."""
    images, scored = _sound_and_scored(store, metric.info.id)
    groups = [list(rows) for _, rows in groupby(images, lambda row: row.key[:3])]
    sizes = Counter(row.key[:3] for row in store.images())
    alone = {_id(rows[0]): _why_alone(sizes[rows[0].key[:3]]) for rows in groups if len(rows) == 1}
    _record_reasons(store, metric.info.id, alone)
    todo = [rows for rows in groups if len(rows) > 1 and any(row.id not in scored for row in rows)]

    def take(rows: Sequence[ImageRow], pixels: Tensor) -> None:
        for _, places in groupby(range(len(rows)), lambda i: rows[i].key[:3]):
            group = list(places)
            values = metric.score_group(pixels[group], rows[group[0]].prompt)
            _record_values(store, metric.info.id, [rows[i] for i in group], values)

    return Task({_id(row) for rows in todo for row in rows}, take)


def _set_task(store: RunStore, metric: SetMetric, context: MetricContext) -> Task:
    """Extract features; a set that has grown since it was scored is extracted again."""
    groups = [list(rows) for _, rows in groupby(sound(store.images()), lambda row: row.key[:2])]
    have = {(row.model, row.steps): row.num_images for row in store.set_scores()
            if row.metric == metric.info.id and row.value is not None}  # fmt: skip
    todo = [rows for rows in groups if have.get(rows[0].key[:2]) != len(rows)]
    if not todo:
        return Task(set(), lambda rows, pixels: None)
    reference = metric.reference()
    _save_array(store.folder / "features" / metric.info.id.replace("/", "_") / "reference.npy", reference)
    name = str(context.reference) if context.reference else f"{len(reference)} images of the metric's own reference"
    parts: list[NDArray[np.float32]] = []

    def take(rows: Sequence[ImageRow], pixels: Tensor) -> None:
        parts.append(metric.features(pixels))

    def finish(rows: Sequence[ImageRow]) -> None:
        model, steps = rows[0].key[:2]
        features = np.concatenate(parts)
        parts.clear()
        if len(features) < 2:
            reason = f"{len(features)} sound images; a distance between sets needs at least 2"
            store.record_set_scores([SetScoreRow(metric.info.id, model, steps, None, len(features), name, reason)])
            return
        _save_array(store.features_path(metric.info.id, model, steps), features)
        value = metric.distance(features, reference)
        store.record_set_scores([SetScoreRow(metric.info.id, model, steps, value, len(features), name)])

    return Task({_id(row) for rows in todo for row in rows}, take, finish)


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
        for batch in _one_model_each(todo):
            rows, others = ([pair[side] for pair in batch] for side in (0, 1))
            pixels, partner_pixels = load_images(store.folder, rows), load_images(store.folder, others)
            if pixels.shape == partner_pixels.shape:
                _record_values(store, metric.info.id, rows, metric.score_pairs(pixels, partner_pixels))
            else:  # a model of another size
                reason = f"{_size(pixels)} pixels, the teacher's has {_size(partner_pixels)}"
                _record_reasons(store, metric.info.id, {_id(row): reason for row in rows})
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


def _record_missing(store: RunStore, kind: Kind, metric_id: str, reason: str) -> None:
    images = store.images()
    if kind != "set":
        _record_reasons(store, metric_id, {_id(row): reason for row in images})
        return
    sizes: dict[tuple[str, int], int] = defaultdict(int)
    for row in images:
        sizes[row.model, row.steps] += 1
    store.record_set_scores([SetScoreRow(metric_id, m, s, None, n, "", reason) for (m, s), n in sizes.items()])


def _one_model_each(
    pairs: Sequence[tuple[ImageRow, ImageRow]],
) -> Iterator[Sequence[tuple[ImageRow, ImageRow]]]:
    """Batches of pairs, none of two models, whose images may differ in size."""
    for _, group in groupby(pairs, lambda pair: pair[0].key[:2]):
        mine = list(group)
        yield from (mine[i : i + BATCH_SIZE] for i in range(0, len(mine), BATCH_SIZE))


def _size(images: Tensor) -> str:
    return f"{images.shape[3]}x{images.shape[2]}"


def _save_array(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.save(file, array)
    partial.replace(path)


def _id(row: ImageRow) -> int:
    assert row.id is not None, "rows read from the ledger have ids"
    return row.id
