"""Metrics of pairs: each image beside the teacher's of the same prompt and noise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from tqdm import tqdm

from hypersd_bench.contracts import PairMetric
from hypersd_bench.reference import Picture, stack
from hypersd_bench.runner.image_reader import BATCH_SIZE, ImageReader, by_size
from hypersd_bench.runner.score_book import ScoreBook, sound
from hypersd_bench.runner.score_tasks import record_defects
from hypersd_bench.store import ImageRow, RunStore


def score_pairs(book: ScoreBook, metric: PairMetric) -> None:
    """Score each image against the teacher's at its most steps; without one it is missing, and so is the teacher's."""
    store, name = book.store, metric.info.id
    record_defects(book, name)
    images, scored = sound(store.images()), book.scored(name)
    teacher = _teacher(store)
    partners = {row.key[2:]: row for row in images if row.key[:2] == teacher}
    pairs = [(row, partners.get(row.key[2:])) for row in images if row.key_id not in scored]
    missing = {row.key_id: _why_unpaired(row, other, teacher) for row, other in pairs}
    book.reasons(name, {image_id: reason for image_id, reason in missing.items() if reason})
    todo = [(row, other) for row, other in pairs if other is not None and not missing[row.key_id]]
    with (
        tqdm(total=len(todo), desc=name, unit="image", disable=not todo) as bar,
        ImageReader(store.folder) as reader,
    ):
        for batch, pictures in reader.read(_beside_teacher(todo)):
            read = dict(zip([row.key_id for row in batch], pictures, strict=True))
            rows = [row for row in batch if row.key[:2] != teacher]
            others = [read[partners[row.key[2:]].key_id] for row in rows]
            _score_batch(book, metric, rows, [read[row.key_id] for row in rows], others)
            bar.update(len(rows))


def _score_batch(
    book: ScoreBook, metric: PairMetric, rows: Sequence[ImageRow], mine: Sequence[Picture], others: Sequence[Picture]
) -> None:
    """Score images together with those of their size; one of another size than the teacher's is missing."""
    unlike = [i for i, (image, other) in enumerate(zip(mine, others, strict=True)) if image.shape != other.shape]
    for i in unlike:
        reason = f"{_size(mine[i])} pixels, the teacher's has {_size(others[i])}"
        book.reasons(metric.info.id, {rows[i].key_id: reason})
    for places in by_size(mine):
        same = [i for i in places if i not in unlike]
        if same:
            values = metric.score_pairs(stack([mine[i] for i in same]), stack([others[i] for i in same]))
            book.values(metric.info.id, [rows[i] for i in same], values)


def _teacher(store: RunStore) -> tuple[str, int] | None:
    """The name and most steps of the run's teacher; None when it has none."""
    found = (model for model in store.manifest["models"] if model.get("family") == "teacher")
    return next(((str(model["name"]), max(model["steps"])) for model in found), None)


def _why_unpaired(image: ImageRow, other: ImageRow | None, teacher: tuple[str, int] | None) -> str:
    if teacher is None:
        return "the run has no teacher"
    if image.key[:2] == teacher:
        return "it is the teacher's own"
    return "" if other else "no sound image of the teacher"


def _beside_teacher(pairs: Iterable[tuple[ImageRow, ImageRow]]) -> Iterator[list[ImageRow]]:
    """Batches of about ``BATCH_SIZE`` images, prompt by prompt: each of the teacher's, and all models' beside it."""
    batch: list[ImageRow] = []
    for _, group in groupby(sorted(pairs, key=lambda pair: pair[1].key), lambda pair: pair[1].key):
        mine = list(group)
        batch += [mine[0][1], *(row for row, _ in mine)]
        if len(batch) >= BATCH_SIZE:
            yield batch
            batch = []
    if batch:
        yield batch


def _size(picture: Picture) -> str:
    return f"{picture.shape[1]}x{picture.shape[0]}"
