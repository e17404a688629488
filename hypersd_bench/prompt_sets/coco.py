"""COCO captions (Chen et al. 2015, arXiv:1504.00325): one caption a photo, of the official annotations.

The caption is that of the lowest annotation id, the photos go by ascending image id. Nearly all papers say "COCO
captions" and publish no list; which caption and which photos they took is not known, so only numbers over the same
list compare.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

from hypersd_bench.download import OwnerFile
from hypersd_bench.prompt_sets.tables import Row
from hypersd_bench.prompts import PromptSource

_URL = "https://cocodataset.org/#download"
_LICENSE = "CC-BY-4.0 (annotations, COCO Consortium)"


def _captions(paths: Sequence[Path], member: str, count: int) -> list[Row]:
    """The first ``count`` photos' captions, from the official zip or from its ``member`` alone."""
    annotations: list[dict[str, Any]] = _read(paths[0], member)["annotations"]
    chosen: dict[int, str] = {}
    for annotation in sorted(annotations, key=lambda annotation: (annotation["image_id"], annotation["id"])):
        chosen.setdefault(annotation["image_id"], annotation["caption"])
    return [(caption, "") for caption in list(chosen.values())[:count]]


def _read(path: Path, member: str) -> Any:
    if not is_zipfile(path):
        return json.loads(path.read_bytes())
    with ZipFile(path) as archive:
        return json.loads(archive.read(member))


def _source(name: str, year: int, count: int, sha256: str, note: str, prompts_sha256: str = "") -> PromptSource:
    archive = f"annotations_trainval{year}.zip"
    return PromptSource(
        id=name,
        count=count,
        license=_LICENSE,
        url=_URL,
        parse=partial(_captions, member=f"annotations/captions_val{year}.json", count=count),
        files=(OwnerFile(archive, f"http://images.cocodataset.org/annotations/{archive}", sha256),),
        prompts_sha256=prompts_sha256,
        note=note,
    )


# the owner publishes no hashes; these are what public dataset loaders (torchvision's prototype) check downloads by
_SHA256_2014 = "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009"
_FIRST_PHOTOS = "first photos by id, of 40,504; papers' own lists are unpublished; a download of 250 MB"

VAL_2017_5K = _source(
    "coco/2017-val-5k",
    2017,
    5_000,
    "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
    "lowest annotation id of each photo; a download of 250 MB",
    "21bb5c19f27ead8f07c14838f146928b72f0af32355ac077da5767ca7f64fdc8",
)
VAL_2014_10K = _source("coco/2014-val-10k", 2014, 10_000, _SHA256_2014, _FIRST_PHOTOS)
VAL_2014_30K = _source("coco/2014-val-30k", 2014, 30_000, _SHA256_2014, _FIRST_PHOTOS)
