"""Set metrics: the features of all sound images of a model and step count, beside those of the reference."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from hypersd_bench.contracts import ReferenceMoments, SetMetric
from hypersd_bench.errors import InputError
from hypersd_bench.features import Reference, read_reference, write_reference
from hypersd_bench.reference import ReferenceSet, stack
from hypersd_bench.runner.canaries import enlarged
from hypersd_bench.runner.score_book import ScoreBook, sound
from hypersd_bench.runner.score_tasks import FeatureTask
from hypersd_bench.store import ImageRow, SetScoreRow


def set_task(book: ScoreBook, metric: SetMetric, reference_set: ReferenceSet, left_out: set[int]) -> FeatureTask:
    """Score each set that has no value, or has grown since, and all of them for a new reference.

    Raises InputError when the reference can't be read, or is none for this metric; scores that there are stay then.
    """
    info, extractor, store = metric.info, metric.extractor, book.store
    groups = [list(rows) for _, rows in groupby(sound(store.images()), lambda row: row.key[:2])]
    scored = book.set_values(info.id)
    renewed = not all(row.reference == reference_set.id for row in scored)
    have = {} if renewed else {(row.model, row.steps): row.num_images for row in scored}
    todo = [rows for rows in groups if have.get(rows[0].key[:2]) != len(rows)]
    if not todo:
        return FeatureTask(info.id, extractor, set(), lambda rows, features: None)
    kept = read_reference(store.folder, extractor.id, reference_set.id, extractor.fingerprint)
    reference = kept or reference_set.features(extractor)
    _require_fit(metric, reference)
    if kept is None:
        write_reference(store.folder, extractor.id, extractor.fingerprint, reference)
    if renewed:
        store.forget_scores(info.id)

    def missing(rows: Sequence[ImageRow], reason: str) -> None:
        model, steps = rows[0].key[:2]
        book.set_value(SetScoreRow(info.id, model, steps, None, len(rows), reference.id, reason))

    def take(rows: Sequence[ImageRow], features: NDArray[np.float32]) -> None:
        model, steps = rows[0].key[:2]
        value = metric.distance(features, reference.values)
        book.set_value(SetScoreRow(info.id, model, steps, value, len(rows), reference.id))

    wants: set[int] = set()
    for rows in todo:
        if rows[0].key_id in left_out:
            missing(rows, f"images are smaller than the {info.min_size} pixels that {info.id} needs")
        elif len(rows) < info.min_images:
            missing(rows, f"{len(rows)} sound images; {info.id} needs at least {info.min_images}")
        else:
            wants |= {row.key_id for row in rows}
    return FeatureTask(info.id, extractor, wants, take, missing)


def _require_fit(metric: SetMetric, reference: Reference) -> None:
    """Raise InputError for a reference that says nothing to a metric, before a value of another one is given up."""
    info, values = metric.info, reference.values
    if not isinstance(values, ReferenceMoments):
        if len(values) < info.min_images:
            raise InputError(f"reference {reference.id} has {len(values)} images; {info.id} needs {info.min_images} or "
                             "more")  # fmt: skip
        return
    if info.statistic not in ("", "frechet"):
        raise InputError(f"{info.id} needs the reference's own images; statistics alone hold no features: give "
                         "--reference FOLDER")  # fmt: skip
    dimensions = metric.extractor(stack([enlarged("scene", info.min_size)])).shape[1]
    if len(values.mean) != dimensions:
        raise InputError(f"reference {reference.id} is of {len(values.mean)} dimensions, {info.features} has "
                         f"{dimensions}: it is of another network")  # fmt: skip
