"""The bases that published checkpoints are made from, sampled as teachers: the reference of every comparison."""

from __future__ import annotations

from dataclasses import replace

from hypersd_bench.catalog.local import TEACHER_STEPS, teacher
from hypersd_bench.catalog.published import published
from hypersd_bench.catalog.spec import ModelSpec

# Of the repositories that pipelines.HUB_BASES names, as their pages on the hub say.
LICENSES = {
    "sdxl": "CreativeML Open RAIL++-M",
    "sd15": "CreativeML Open RAIL-M",
    "sd21": "CreativeML Open RAIL++-M",
}
UNCONFIRMED = "sampler: ours; the published rows name guidance and steps only"
MIRROR = "; pipeline: a mirror, since the owner withdrew the repository"


def models() -> list[ModelSpec]:
    """SDXL, SD1.5 and SD2.1 by DDIM with guidance 7.5."""
    return [
        replace(
            teacher(base, license=license),
            unconfirmed=UNCONFIRMED + (MIRROR if base == "sd21" else ""),
            published=published(base, "teacher", TEACHER_STEPS),
        )
        for base, license in LICENSES.items()
    ]
