"""Objects with masks as detectors are trained on them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from distill.batch import Instances
from distill.sources.buckets import Fit, cut_mask
from distill.sources.contract import RawObject


def instances_of(objects: Sequence[RawObject], how: Fit | None = None) -> Instances:
    """Objects of one picture, cut as the picture was; those that fall outside are left out.

    A box ends after its last pixel, so that it is never empty.
    """
    cut = [RawObject(label, mask if how is None else cut_mask(mask, how)) for label, mask in objects]
    seen = [(label, mask) for label, mask in cut if mask.any()]
    height, width = (how.bucket.height, how.bucket.width) if how else (objects[0].mask.shape if objects else (0, 0))
    masks = np.stack([mask for _, mask in seen]) if seen else np.zeros((0, height, width), bool)
    boxes = [_box(mask) for _, mask in seen]
    return Instances(
        labels=torch.tensor([label for label, _ in seen], dtype=torch.int64),
        masks=torch.from_numpy(masks),
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
    )


def _box(mask: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
