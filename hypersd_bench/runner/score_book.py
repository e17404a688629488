"""What scoring writes into a run: values, the reasons for those that are missing, and what went wrong for the user."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hypersd_bench.contracts import MetricInfo
from hypersd_bench.store import ImageRow, RunStore, ScoreRow, SetScoreRow

NOT_FINITE = "the metric gave no finite value"


@dataclass
class ScoreBook:
    """The ledger's scores as metrics fill them. failed: by metric, the first thing that kept it from a value."""

    store: RunStore
    failed: dict[str, str] = field(default_factory=dict)

    def fail(self, metric_id: str, reason: str) -> None:
        """Note why a metric has no value, or not all; the first reason stays."""
        self.failed.setdefault(metric_id, reason)

    def scored(self, metric_id: str) -> set[int]:
        """Ids of the images that have a value."""
        return {image_id for image_id, row in self.store.scores(metric_id).items() if row.value is not None}

    def values(self, metric_id: str, rows: Sequence[ImageRow], values: NDArray[np.float64]) -> None:
        """Enter one value an image; one that is not finite is missing, and told."""
        assert len(rows) == len(values), f"{metric_id} gave {len(values)} values for {len(rows)} images"
        finite = np.isfinite(values)
        self.store.record_scores(
            [
                ScoreRow(metric_id, row.key_id, float(value) if good else None, "" if good else NOT_FINITE)
                for row, value, good in zip(rows, values, finite, strict=True)
            ]
        )
        if not finite.all():
            first = next(row for row, good in zip(rows, finite, strict=True) if not good)
            self.fail(
                metric_id,
                f"no finite value for {first.file}, and perhaps others; look at the image, and if it is sound delete "
                "the metric's weights, to be downloaded again",
            )

    def reasons(self, metric_id: str, reasons: Mapping[int, str]) -> None:
        """Enter images without a value, with the reason, by id."""
        rows = [ScoreRow(metric_id, image_id, None, reason) for image_id, reason in reasons.items()]
        self.store.record_scores(rows)

    def set_values(self, metric_id: str) -> list[SetScoreRow]:
        """The set scores that have a value."""
        return [row for row in self.store.set_scores() if row.metric == metric_id and row.value is not None]

    def set_value(self, row: SetScoreRow) -> None:
        """Enter a set's value; one that is missing, or not finite, is told."""
        if row.value is not None and not np.isfinite(row.value):
            row = SetScoreRow(row.metric, row.model, row.steps, None, row.num_images, row.reference, NOT_FINITE)
        self.store.record_set_scores([row])
        if row.value is None:
            self.fail(row.metric, f"{row.model}@{row.steps}: {row.reason}")

    def missing(self, info: MetricInfo, reason: str, keep_sets: bool = True) -> None:
        """Enter why a metric can't be computed at all; values that sets have are kept, unless they no longer hold."""
        self.fail(info.id, reason)
        images = self.store.images()
        if info.kind != "set":
            scored = self.scored(info.id)
            self.reasons(info.id, {row.key_id: reason for row in images if row.key_id not in scored})
            return
        if not keep_sets:
            self.store.forget_scores(info.id)
        sizes = Counter((row.model, row.steps) for row in images)
        for row in self.set_values(info.id):
            sizes.pop((row.model, row.steps), None)
        self.store.record_set_scores([SetScoreRow(info.id, m, s, None, n, "", reason) for (m, s), n in sizes.items()])


def sound(rows: Sequence[ImageRow]) -> list[ImageRow]:
    """The images without a defect; the others are reported, never scored."""
    return [row for row in rows if not row.defect]
