"""Images that a comparison should not rest on: black, constant, non-finite, or the same as another; counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from hypersd_bench.store import ImageRow


@dataclass(frozen=True, slots=True)
class Doubtful:
    """What is wrong with a model's images at a step count.

    defects: images by defect (``black``, ``constant``, ``non-finite``), which are not scored. duplicates: images that
    are the same, to the pixel, as another of this model and step count; they are scored.
    """

    model: str
    steps: int
    images: int
    defects: dict[str, int]
    duplicates: int

    @property
    def defective(self) -> int:
        """Images with a defect."""
        return sum(self.defects.values())

    @property
    def problems(self) -> str:
        """The counts in words; empty when all is well."""
        counts = {**self.defects, "duplicate": self.duplicates}
        return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()) if count)


def doubtful_images(rows: Iterable[ImageRow]) -> list[Doubtful]:
    """Count the doubtful among a run's images, by model and step count, in which order they come."""
    found = []
    for (model, steps), group in groupby(rows, lambda row: (row.model, row.steps)):
        images = list(group)
        sound = Counter(row.sha256 for row in images if not row.defect)
        duplicates = sum(count - 1 for count in sound.values())
        defects = dict(Counter(row.defect for row in images if row.defect))
        found.append(Doubtful(model, steps, len(images), defects, duplicates))
    return found
