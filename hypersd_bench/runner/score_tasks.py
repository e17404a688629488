"""What metrics of single images and of prompts do in the one pass over a run's images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hypersd_bench.contracts import Extractor, FeatureMetric, ImageMetric, PromptMetric
from hypersd_bench.errors import InputError
from hypersd_bench.features import read_features, write_features
from hypersd_bench.runner.score_book import ScoreBook, sound
from hypersd_bench.store import ImageRow, RunStore

Refuse = Callable[[Sequence[ImageRow], str], None]
SAVE_EVERY = 2048  # images whose features a kill -9 may cost


@dataclass(frozen=True)
class PixelTask:
    """A metric that reads images.

    wants: ids of the images it needs. take: what it does with some of them, (N, 3, H, W) uint8, whole prompts at once.
    refuse: what it does with images that its protocol does not allow, and why.
    """

    wants: set[int]
    take: Callable[[Sequence[ImageRow], Tensor], None]
    refuse: Refuse

    def take_wanted(self, rows: Sequence[ImageRow], images: Tensor) -> None:
        """Take what is wanted of some images."""
        mine = [i for i, row in enumerate(rows) if row.key_id in self.wants]
        if mine:
            try:
                self.take([rows[i] for i in mine], images[mine])
            except InputError as error:  # the other metrics go on
                self.refuse([rows[i] for i in mine], str(error))


@dataclass(frozen=True)
class FeatureTask:
    """A metric that reads an extractor's features.

    take: what it does with the images of a model and step count that it wants, and their features (N, d). refuse: with
    images that have none, or that its protocol does not allow. whole: whether it takes all images of those or none.
    """

    metric: str
    extractor: Extractor
    wants: set[int]
    take: Callable[[Sequence[ImageRow], NDArray[np.float32]], None]
    refuse: Refuse = lambda rows, reason: None
    whole: bool = True

    def take_group(self, rows: Sequence[ImageRow], features: Features) -> None:
        """Take what is wanted of a model and step count."""
        mine = [row for row in rows if row.key_id in self.wants]
        refused = [row for row in mine if row.sha256 in features.refused]
        if refused:
            reason = features.refused[refused[0].sha256]
            self.refuse(mine if self.whole else refused, reason)
            mine = [] if self.whole else [row for row in mine if row.sha256 not in features.refused]
        if mine:
            try:
                self.take(mine, features.of(mine))
            except InputError as error:  # the other metrics go on
                self.refuse(mine, str(error))


class Features:
    """The features of a model's images at a step count: those kept in the run, and what is extracted now."""

    def __init__(self, store: RunStore, extractor: Extractor, rows: Sequence[ImageRow]) -> None:
        """Read what is kept; rows are the images whose features are wanted."""
        self._folder, self._extractor = store.folder, extractor
        self._cell = rows[0].model, rows[0].steps
        self._known = read_features(store.folder, extractor.id, *self._cell, extractor.fingerprint)
        self._missing = {row.sha256 for row in rows} - self._known.keys()
        self.refused: dict[str, str] = {}  # why the extractor takes no such image, by SHA-256
        self._unsaved = 0

    def lacks(self, row: ImageRow) -> bool:
        """Whether an image must be read for its features."""
        return row.sha256 in self._missing

    def extract(self, rows: Sequence[ImageRow], images: Tensor) -> None:
        """Extract features of those of some images that lack them."""
        new = {row.sha256: i for i, row in enumerate(rows) if row.sha256 in self._missing}
        if not new:
            return
        self._missing -= new.keys()
        try:
            self._known |= zip(new, self._extractor(images[list(new.values())]), strict=True)
        except InputError as error:  # the other metrics go on
            self.refused |= dict.fromkeys(new, str(error))
            return
        self._unsaved += len(new)
        if self._unsaved >= SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Keep what was extracted, for the next metric and the next start."""
        if self._unsaved:
            write_features(self._folder, self._extractor.id, *self._cell, self._extractor.fingerprint, self._known)
            self._unsaved = 0

    def of(self, rows: Sequence[ImageRow]) -> NDArray[np.float32]:
        """Features (N, d) of images."""
        return np.stack([self._known[row.sha256] for row in rows])


def image_task(book: ScoreBook, metric: ImageMetric, left_out: set[int]) -> PixelTask:
    """Score each image that has no value."""

    def take(rows: Sequence[ImageRow], pixels: Tensor) -> None:
        book.values(metric.info.id, rows, metric.score(pixels, [row.prompt for row in rows]))

    return PixelTask(_unscored(book, metric.info.id, left_out), take, _refuser(book, metric.info.id))


def feature_task(book: ScoreBook, metric: FeatureMetric, left_out: set[int]) -> FeatureTask:
    """Score each image that has no value, from its features."""

    def take(rows: Sequence[ImageRow], features: NDArray[np.float32]) -> None:
        book.values(metric.info.id, rows, metric.score_features(features, [row.prompt for row in rows]))

    name = metric.info.id
    wants = _unscored(book, name, left_out)
    return FeatureTask(name, metric.extractor, wants, take, _refuser(book, name), whole=False)


def prompt_task(book: ScoreBook, metric: PromptMetric, left_out: set[int]) -> PixelTask:
    """Score whole groups; one that has grown since it was scored is scored again, since every value changes."""
    name = metric.info.id
    unscored = _unscored(book, name, left_out)
    images = book.store.images()
    groups = [
        list(rows)
        for _, rows in groupby([r for r in sound(images) if r.key_id not in left_out], lambda row: row.key[:3])
    ]
    sizes = Counter(row.key[:3] for row in images)
    book.reasons(name, {rows[0].key_id: _why_alone(sizes[rows[0].key[:3]]) for rows in groups if len(rows) == 1})
    todo = [rows for rows in groups if len(rows) > 1 and any(row.key_id in unscored for row in rows)]

    def take(rows: Sequence[ImageRow], pixels: Tensor) -> None:
        for _, places in groupby(range(len(rows)), lambda i: rows[i].key[:3]):
            group = list(places)
            if len(group) == 1:  # the prompt's other images are of another size
                book.reasons(name, {rows[group[0]].key_id: "no other image of its prompt and size"})
                continue
            values = metric.score_group(pixels[group], rows[group[0]].prompt)
            book.values(name, [rows[i] for i in group], values)

    return PixelTask({row.key_id for rows in todo for row in rows}, take, _refuser(book, name))


def _refuser(book: ScoreBook, metric_id: str) -> Refuse:
    """Enters images that a metric does not allow as missing."""

    def refuse(rows: Sequence[ImageRow], reason: str) -> None:
        book.reasons(metric_id, {row.key_id: reason for row in rows})
        book.fail(metric_id, f"{rows[0].file}: {reason}")

    return refuse


def record_defects(book: ScoreBook, metric_id: str) -> None:
    """Enter the images with a defect as missing."""
    book.reasons(metric_id, {row.key_id: f"image is {row.defect}" for row in book.store.images() if row.defect})


def _unscored(book: ScoreBook, metric_id: str, left_out: set[int]) -> set[int]:
    """Ids of the sound images that have no value yet; the defects of the others are entered."""
    record_defects(book, metric_id)
    return {row.key_id for row in sound(book.store.images())} - book.scored(metric_id) - left_out


def _why_alone(num_images: int) -> str:
    return "one image per prompt" if num_images == 1 else "no other sound image of its prompt"
