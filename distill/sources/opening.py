"""From what a user names to training data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from distill.sources.contract import Source
from distill.sources.encoding import Encoder
from distill.sources.hf_dataset import HubDataset
from distill.sources.image_folder import METADATA, ImageFolder
from distill.sources.loading import Loading
from distill.sources.pictures import DataSettings, PictureData
from distill.sources.prompts import PromptFile
from distill.sources.scenes import SceneData, Scenes
from distill.sources.webdataset import TarShards
from hypersd_bench import registry
from hypersd_bench.errors import InputError, unknown_name

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def open_data(settings: DataSettings, pipe: Any, cache: Path) -> Loading:
    """Training data of a base; ``cache`` is a folder for what is encoded or found out once.

    Where several processes train, the first builds the caches while the others wait.
    """
    encoder = Encoder(pipe)
    if settings.source == "scenes":
        return SceneData(encoder, settings.scenes, cache, settings.seed)
    source = open_source(
        settings.source, cache=cache, image_column=settings.image_column, caption_column=settings.caption_column,
        split=settings.split,
    )  # fmt: skip
    return PictureData(source, encoder, settings, cache)


def open_source(
    name: str,
    *,
    cache: Path | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    split: str = "train",
    scenes: int = 8192,
) -> Source:
    """Open ``scenes``, tar shards, a folder, a prompt file or set, or a hub id; raises InputError for anything else."""
    path = Path(name).expanduser()
    if name == "scenes":
        return Scenes(scenes)
    if name.endswith(".tar") or (path.is_dir() and any(path.glob("*.tar"))):
        return TarShards(name, cache, caption_column)
    if name in registry.rows("prompts") or path.suffix in (".txt", ".tsv", ".csv"):
        return PromptFile(name)
    if (path / METADATA).is_file():
        return ImageFolder(path, caption_column)
    if path.is_dir():
        return _open_saved(name, path, split, image_column, caption_column, cache)
    if path.exists():
        raise InputError(f"data {name!r}: a {path.suffix or 'plain'} file is no data source; give {_KINDS}")
    if HUB_ID.fullmatch(name):
        return HubDataset(name, split, image_column, caption_column, cache)
    if "/" in name or "\\" in name:
        raise InputError(f"data {name!r}: no such file or folder; give {_KINDS}")
    raise unknown_name("data source", name, ["scenes", *registry.rows("prompts")])


_KINDS = f"'scenes', tar shards, a folder with {METADATA} or parquet files, a prompt file, or a hub id"


def _open_saved(
    name: str, path: Path, split: str, image: str | None, caption: str | None, cache: Path | None
) -> HubDataset:
    marks = ("state.json", "dataset_dict.json")
    if not any((path / mark).is_file() for mark in marks) and not any(path.rglob("*.parquet")):
        raise InputError(f"data {name!r}: the folder holds no {METADATA}, no tar shards and no parquet files")
    return HubDataset(name, split, image, caption, cache)
