"""Images to scores: each metric over every image, prompt, pair or set of images that it has not scored yet.

All metrics but those of pairs share one pass: an image is read once for all of them, and passes an extractor once for
all that read its features, which are kept (``hypersd_bench.features``). For a metric of pairs, the teacher's image is
read once for all models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from hypersd_bench import registry
from hypersd_bench.contracts import MetricContext, MetricFactory, MetricInfo
from hypersd_bench.errors import InputError, first_line
from hypersd_bench.features import forget_features
from hypersd_bench.reference import NO_REFERENCE, ReferenceSet, stack
from hypersd_bench.runner.canaries import check_canaries
from hypersd_bench.runner.image_reader import ImageReader, by_size, whole_prompts
from hypersd_bench.runner.pair_scores import score_pairs
from hypersd_bench.runner.score_book import ScoreBook, sound
from hypersd_bench.runner.score_tasks import Features, FeatureTask, PixelTask, feature_task, image_task, prompt_task
from hypersd_bench.runner.set_scores import set_task
from hypersd_bench.store import ImageRow, RunStore, write_json


def score_run(
    store: RunStore, metric_ids: Sequence[str], device: str, reference: ReferenceSet | None
) -> dict[str, str]:
    """Score a run's images; returns the metrics that have no value, or not all, with the reason.

    reference: what set metrics compare with. Raises CheckFailed, before anything is scored, when a metric no longer
    scores the canaries as it did, and InputError for images that can't be compared.
    """
    _require_one_text_per_prompt(store)
    factories = [registry.resolve("metric", metric_id) for metric_id in dict.fromkeys(metric_ids)]
    book, context = ScoreBook(store), MetricContext(device)
    pixel_tasks: list[PixelTask] = []
    feature_tasks: list[FeatureTask] = []
    pairs: list[Any] = []
    with exact_arithmetic():
        metrics = _built(book, factories, context, reference)
        check_canaries(store, metrics, device)
        _forget_other_versions(store, [metric.info for metric in metrics])  # of what scores now alone
        _forget_other_weights(store, metrics)
        for metric in metrics:
            too_small = _too_small(book, metric.info)
            try:
                match metric.info.kind:
                    case "set":
                        assert reference is not None, "_built leaves set metrics without a reference out"
                        feature_tasks.append(set_task(book, metric, reference, too_small))
                    case "prompt":
                        pixel_tasks.append(prompt_task(book, metric, too_small))
                    case "image" if metric.info.features:
                        feature_tasks.append(feature_task(book, metric, too_small))
                    case "image":
                        pixel_tasks.append(image_task(book, metric, too_small))
                    case "pair":
                        pairs.append(metric)
            except InputError as error:  # a reference that is not the metric's: the rest is still worth having
                book.missing(metric.info, str(error))
        _one_pass(store, pixel_tasks, feature_tasks)
        for metric in pairs:
            score_pairs(book, metric)
    return book.failed


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Compute in float32 as it is written: TF32, cuDNN's default for convolutions, has a mantissa of 10 bits."""
    import torch

    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def _built(
    book: ScoreBook, factories: Sequence[MetricFactory], context: MetricContext, reference: ReferenceSet | None
) -> list[Any]:
    """The metrics that can be computed here; why the others can't is entered."""
    metrics = []
    for factory in factories:
        if factory.info.kind == "set" and reference is None:
            book.missing(factory.info, NO_REFERENCE, keep_sets=False)  # photographs against scenes, if any
            continue
        try:
            metrics.append(factory(context))
        except InputError as error:  # weights or a package not here: the rest of the run is still worth having
            book.missing(factory.info, str(error))
    return metrics


def _require_one_text_per_prompt(store: RunStore) -> None:
    """Raise InputError where a prompt id has two texts: its images are then not of one prompt."""
    texts: dict[str, ImageRow] = {}
    for row in store.images():
        first = texts.setdefault(row.prompt_id, row)
        if first.prompt != row.prompt:
            raise InputError(
                f"prompts and images of {store.folder} do not pair up: {row.prompt_id} is {first.prompt!r} for "
                f"{first.model} and {row.prompt!r} for {row.model}; score each in a run of its own"
            )


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


def _forget_other_weights(store: RunStore, metrics: Sequence[Any]) -> None:
    """Remove what was scored from the features of other weights or another preprocessing; record what scores now."""
    known: dict[str, str] = store.manifest.get("extractors", {})
    found = {metric.extractor.id: metric.extractor.fingerprint for metric in metrics if metric.info.features}
    changed = {name for name, fingerprint in found.items() if known.get(name, fingerprint) != fingerprint}
    for metric_id in store.scored_metrics() if changed else ():
        if _features_of(store, metric_id) in changed:  # of those that are not asked for now, too
            store.forget_scores(metric_id)
    for name in changed:
        forget_features(store.folder, name)
    if known != known | found:
        store.manifest["extractors"] = known | found
        write_json(store.folder / "run.json", store.manifest)


def _features_of(store: RunStore, metric_id: str) -> str:
    """Which features a metric of the ledger is of; empty for none, or where nobody knows it any more."""
    if metric_id in registry.rows("metric"):
        return str(registry.resolve("metric", metric_id).info.features)
    entries = store.manifest["metrics"]
    return next((str(entry.get("features", "")) for entry in entries if entry["id"] == metric_id), "")


def _too_small(book: ScoreBook, info: MetricInfo) -> set[int]:
    """Ids of the images that are smaller than a metric's protocol allows; entered as missing.

    Images of a model at a step count are of one size, so the first tells.
    """
    if info.min_size <= 1:
        return set()
    found: set[int] = set()
    for _, group in groupby(sound(book.store.images()), lambda row: row.key[:2]):
        rows = list(group)
        width, height = _size(book.store.folder / rows[0].file)
        if min(width, height) < info.min_size:
            reason = f"images of {width}x{height} pixels; {info.id} needs {info.min_size} on the short side"
            if info.kind != "set":
                book.reasons(info.id, {row.key_id: reason for row in rows})
            book.fail(info.id, f"{rows[0].model}@{rows[0].steps}: {reason}")
            found |= {row.key_id for row in rows}
    return found


def _size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, ValueError) as error:
        raise InputError(f"can't read image {path} ({first_line(error)}); remove it and run again") from error


def _one_pass(store: RunStore, pixel_tasks: Sequence[PixelTask], feature_tasks: Sequence[FeatureTask]) -> None:
    """Read each image once for all that want it; the next batches are read while these are scored."""
    groups = [list(rows) for _, rows in groupby(sound(store.images()), lambda row: row.key[:2])]
    wants = [task.wants for task in pixel_tasks] + [task.wants for task in feature_tasks]
    wanted: set[int] = set().union(*wants)
    extractors = {task.extractor.id: task.extractor for task in feature_tasks}.values()
    with (
        tqdm(total=len(wanted), desc="scores", unit="image", disable=not wanted) as bar,
        ImageReader(store.folder) as reader,
    ):
        for rows in groups:
            mine = [task for task in feature_tasks if any(row.key_id in task.wants for row in rows)]
            features = {
                extractor.id: Features(store, extractor, [row for row in rows if _wants(mine, extractor.id, row)])
                for extractor in extractors
                if any(task.extractor.id == extractor.id for task in mine)
            }
            kept_features = list(features.values())
            todo = [row for row in rows if _must_be_read(row, pixel_tasks, kept_features)]
            for batch, pictures in reader.read(whole_prompts(todo)):
                for places in by_size(pictures):
                    images, some = stack([pictures[i] for i in places]), [batch[i] for i in places]
                    for pixel_task in pixel_tasks:
                        pixel_task.take_wanted(some, images)
                    for kept in kept_features:
                        kept.extract(some, images)
                bar.update(len(batch))
            for kept in kept_features:
                kept.save()
            for task in mine:
                task.take_group(rows, features[task.extractor.id])
            bar.update(sum(row.key_id in wanted for row in rows) - len(todo))


def _wants(tasks: Sequence[FeatureTask], extractor: str, row: ImageRow) -> bool:
    return any(task.extractor.id == extractor and row.key_id in task.wants for task in tasks)


def _must_be_read(row: ImageRow, tasks: Sequence[PixelTask], features: Sequence[Features]) -> bool:
    return any(row.key_id in task.wants for task in tasks) or any(kept.lacks(row) for kept in features)
