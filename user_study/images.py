"""The images as raters get them: one codec, one size on both sides, no metadata, under ids that say nothing."""

from __future__ import annotations

import hmac
import io
import os
from base64 import urlsafe_b64encode
from hashlib import sha256
from pathlib import Path

from PIL import Image, ImageFilter, ImageOps
from tqdm.auto import tqdm

from hypersd_bench.errors import InputError
from hypersd_bench.store import write_bytes
from user_study.design import Arm, Design, Pair

ARMS = ("a", "b")
_EPOCH = 0  # every published file's time: when a file was written would tell which came first


def image_id(key: bytes, pair_id: str, arm: str) -> str:
    """The opaque id of a pair's image ``arm`` ("a" or "b"): 22 letters that only the study's key can make.

    Ids belong to a pair's side, not to an image: an image in two pairs can't be recognised by its id.
    """
    return urlsafe_b64encode(hmac.digest(key, f"{pair_id}:{arm}".encode(), "sha256")).decode()[:22]


def image_files(folder: Path, design: Design, key: bytes) -> dict[str, Path]:
    """The published files by id; raises InputError where one is missing."""
    files = {}
    for pair in _all_pairs(design):
        for arm in ARMS:
            name = image_id(key, pair.id, arm)
            files[name] = folder / f"{name}.png"
    missing = [file for file in files.values() if not file.exists()]
    if missing:
        raise InputError(f"{missing[0]} is missing ({len(missing)} of {len(files)} study images); restore the folder")
    return files


def publish_images(run: Path, design: Design, folder: Path, key: bytes) -> None:
    """Re-encode every image of the design into ``folder``; raises InputError for a missing or changed image."""
    pairs = _all_pairs(design)
    for pair in tqdm(pairs, desc="images", unit="pair", disable=None):
        for arm, data in zip(ARMS, _encode_pair(run, pair), strict=True):
            file = folder / f"{image_id(key, pair.id, arm)}.png"
            write_bytes(file, data)
            os.utime(file, (_EPOCH, _EPOCH))


def spoil(image: Image.Image, kind: str) -> Image.Image:
    """The same image made plainly worse, for pairs with a known answer: "blur", "blocks", "noise"; "" leaves it."""
    side = min(image.size)
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(side / 18))
    if kind == "blocks":
        small = image.resize((max(1, image.width * 9 // side), max(1, image.height * 9 // side)), Image.Resampling.BOX)
        return small.resize(image.size, Image.Resampling.NEAREST)
    if kind == "noise":
        grain = Image.effect_noise(image.size, 220).convert("RGB")
        return Image.blend(image, grain, 0.6)
    if kind:
        raise ValueError(f"unknown way to spoil an image: {kind}")
    return image


def _all_pairs(design: Design) -> tuple[Pair, ...]:
    return (*design.pairs, *design.gold, *design.practice)


def _encode_pair(run: Path, pair: Pair) -> tuple[bytes, bytes]:
    """Both images as PNG of the larger one's size, whatever size they were made at."""
    images = [spoil(_read(run, arm), arm.spoiled) for arm in (pair.a, pair.b)]
    box = (max(image.width for image in images), max(image.height for image in images))
    a, b = (_encode(image, box) for image in images)
    return a, b


def _read(run: Path, arm: Arm) -> Image.Image:
    """The image's pixels, RGB; its bytes must be those that the design was made on."""
    path = run / arm.file
    try:
        data = path.read_bytes()
        if sha256(data).hexdigest() != arm.sha256:
            raise InputError(f"{path} is not the image that the run recorded; restore it")
        return Image.open(io.BytesIO(data)).convert("RGB")
    except OSError as error:
        raise InputError(f"can't read the image {path}: {error.strerror or error}") from error


def _encode(image: Image.Image, box: tuple[int, int]) -> bytes:
    if image.size != box:
        image = ImageOps.pad(image, box, Image.Resampling.LANCZOS)
    clean = Image.new("RGB", box)  # pixels only: a copy would take text chunks and profiles along
    clean.paste(image)
    buffer = io.BytesIO()
    clean.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()
