"""Images to scores: each metric over every image, prompt, pair or set of images that it has not scored yet.

All metrics but those of pairs share one pass: an image is read once for all of them. For a metric of pairs, the
teacher's image is read once for all models.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from hypersd_bench import registry
from hypersd_bench.contracts import ImageMetric, MetricContext, MetricInfo, PairMetric, PromptMetric, SetMetric
from hypersd_bench.errors import InputError
from hypersd_bench.machine import num_cores
from hypersd_bench.store import ImageRow, RunStore, ScoreRow, SetScoreRow, write_json

BATCH_SIZE = 64
AHEAD = 2  # batches read beforehand
OWN_REFERENCE = "images of the metric's own reference"
Picture = NDArray[np.uint8]  # (H, W, 3), RGB


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
    factories = [registry.resolve("metric", metric_id) for metric_id in metric_ids]
    _forget_other_versions(store, [factory.info for factory in factories])
    failed, tasks, pairs = {}, [], []
    for factory in factories:
        try:
            metric = factory(context)
            match metric.info.kind:
                case "image":
                    tasks.append(_image_task(store, metric))
                case "prompt":
                    tasks.append(_prompt_task(store, metric))
                case "set":
                    tasks.append(_set_task(store, metric, context))
                case "pair":
                    pairs.append(metric)
        except InputError as error:  # weights or a reference not here: the rest of the run is still worth having
            failed[factory.info.id] = str(error)
            _record_missing(store, factory.info, context, str(error))
    _one_pass(store, tasks)
    for metric in pairs:
        _score_pairs(store, metric)
    return failed


def _forget_other_versions(store: RunStore, infos: Sequence[MetricInfo]) -> None:
    """Remove what a metric of another version has scored, and record the versions that score from now on.

    The manifest's entries say what a run is asked for; ``scored_versions``, beside them, what its scores are of.
    """
    entries = store.manifest["metrics"]
    known = {entry["id"]: entry["version"] for entry in entries} | store.manifest.get("scored_versions", {})
    for info in infos:
        if known.get(info.id, info.version) != info.version:
            store.forget_scores(info.id)
    versions = known | {info.id: info.version for info in infos}
    installed = {info.id: asdict(info) for info in infos}
    metrics = [installed.get(entry["id"], entry) for entry in entries]
    if versions != store.manifest.get("scored_versions") or metrics != entries:
        store.manifest |= {"scored_versions": versions, "metrics": metrics}
        write_json(store.folder / "run.json", store.manifest)


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
            for batch, pictures in reader.read(_whole_prompts(todo)):
                images = _stack(pictures)
                for task in tasks:
                    mine = [i for i, row in enumerate(batch) if row.id in task.wants]
                    if mine:
                        task.take([batch[i] for i in mine], images[mine])
                bar.update(len(batch))
            for task in tasks:
                if any(row.id in task.wants for row in rows):
                    task.finish(rows)


class _Reader:
    """Reads images in as many threads as there are cores, some batches ahead."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._threads = ThreadPoolExecutor(num_cores())

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def read(self, batches: Iterable[Sequence[ImageRow]]) -> Iterator[tuple[Sequence[ImageRow], list[Picture]]]:
        """Give each batch with its images, in order."""
        ahead: deque[tuple[Sequence[ImageRow], list[Future[Picture]]]] = deque()
        for batch in batches:
            ahead.append((batch, [self._threads.submit(_read_image, self._folder, row) for row in batch]))
            if len(ahead) > AHEAD:
                rows, pictures = ahead.popleft()
                yield rows, [picture.result() for picture in pictures]
        while ahead:
            rows, pictures = ahead.popleft()
            yield rows, [picture.result() for picture in pictures]


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
    return _stack([_read_image(folder, row) for row in rows])


def _read_image(folder: Path, row: ImageRow) -> Picture:
    try:
        with Image.open(folder / row.file) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError) as error:
        raise InputError(f"can't read {folder / row.file} ({error}); remove it and run again") from error


def _stack(pictures: Sequence[Picture]) -> Tensor:
    """Images of one size as (N, 3, H, W) uint8."""
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
    """Extract features; a set that has grown since it was scored is extracted again, and all are for a new reference.

    Raises InputError when the reference can't be read; what there is of another is kept then.
    """
    groups = [list(rows) for _, rows in groupby(sound(store.images()), lambda row: row.key[:2])]
    scored = _set_values(store, metric.info.id)
    renewed = not all(is_of_reference(row, context.reference) for row in scored)
    have = {} if renewed else {(row.model, row.steps): row.num_images for row in scored}
    todo = [rows for rows in groups if have.get(rows[0].key[:2]) != len(rows)]
    if not todo:
        return Task(set(), lambda rows, pixels: None)
    reference = metric.reference()
    if renewed:
        store.forget_scores(metric.info.id)
    _save_array(store.features_path(metric.info.id, "", 0).with_name("reference.npy"), reference)
    name = str(context.reference) if context.reference else f"{len(reference)} {OWN_REFERENCE}"
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
    with (
        tqdm(total=len(todo), desc=metric.info.id, unit="image", disable=not todo) as bar,
        _Reader(store.folder) as reader,
    ):
        for batch, pictures in reader.read(_beside_teacher(todo)):
            read = dict(zip(map(_id, batch), pictures, strict=True))
            rows = [row for row in batch if row.key[:2] != teacher]
            others = [read[_id(partners[row.key[2:]])] for row in rows]
            _score_batch_of_pairs(store, metric, rows, [read[_id(row)] for row in rows], others)
            bar.update(len(rows))


def _score_batch_of_pairs(
    store: RunStore, metric: PairMetric, rows: Sequence[ImageRow], mine: Sequence[Picture], others: Sequence[Picture]
) -> None:
    """Score images together with those of their size; one of another size than the teacher's is missing."""
    by_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, (image, other) in enumerate(zip(mine, others, strict=True)):
        if image.shape == other.shape:
            by_size[image.shape].append(i)
        else:
            reason = f"{_size(image)} pixels, the teacher's has {_size(other)}"
            _record_reasons(store, metric.info.id, {_id(rows[i]): reason})
    for places in by_size.values():
        values = metric.score_pairs(_stack([mine[i] for i in places]), _stack([others[i] for i in places]))
        _record_values(store, metric.info.id, [rows[i] for i in places], values)


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


def _record_missing(store: RunStore, info: MetricInfo, context: MetricContext, reason: str) -> None:
    """Record why a metric can't be computed; a set's distance to a reference that fits the images is kept."""
    images = store.images()
    if info.kind != "set":
        _record_reasons(store, info.id, {_id(row): reason for row in images})
        return
    scored = _set_values(store, info.id)
    if not context.scenes and any(is_of_reference(row, None) for row in scored):  # photographs against scenes
        store.forget_scores(info.id)
        scored = []
    sizes = Counter((row.model, row.steps) for row in images)
    for row in scored:
        sizes.pop((row.model, row.steps), None)
    store.record_set_scores([SetScoreRow(info.id, m, s, None, n, "", reason) for (m, s), n in sizes.items()])


def _set_values(store: RunStore, metric_id: str) -> list[SetScoreRow]:
    return [row for row in store.set_scores() if row.metric == metric_id and row.value is not None]


def is_of_reference(row: SetScoreRow, reference: Path | None) -> bool:
    """Whether a set score is a distance to this reference; None: the metric's own."""
    return row.reference == str(reference) if reference else row.reference.endswith(OWN_REFERENCE)


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


def _save_array(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.save(file, array)
    partial.replace(path)


def _id(row: ImageRow) -> int:
    assert row.id is not None, "rows read from the ledger have ids"
    return row.id
