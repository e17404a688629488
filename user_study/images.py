"""The images as raters get them: one codec, one size on both sides, no metadata, under ids that say nothing."""

from __future__ import annotations

import io
import secrets
from hashlib import sha256
from pathlib import Path

from PIL import Image, ImageOps

from hypersd_bench.errors import InputError
from hypersd_bench.store import write_bytes
from user_study.design import Arm, Pair
from user_study.votes import VoteStore


def publish_images(run: Path, votes: VoteStore) -> dict[str, Path]:
    """Re-encode every image of the design once, into ``<run>/study/images``; returns the files by opaque id.

    Ids belong to a pair's side, not to an image: an image in two pairs can't be recognised by its id. Rows go in when
    all files are complete, so a start that was killed is done again. Raises InputError for a missing or changed image.
    """
    folder = run / "study" / "images"
    ids = votes.image_ids()
    if not ids:
        for stale in folder.glob("*.png"):  # of a start that was killed
            stale.unlink()
        ids = {(pair.id, arm): secrets.token_urlsafe(16) for pair in votes.design.pairs for arm in ("a", "b")}
        for pair in votes.design.pairs:
            for arm, data in zip(("a", "b"), _encode_pair(run, pair), strict=True):
                write_bytes(folder / f"{ids[pair.id, arm]}.png", data)
        votes.add_images([(image_id, pair_id, arm) for (pair_id, arm), image_id in ids.items()])
    files = {image_id: folder / f"{image_id}.png" for image_id in ids.values()}
    missing = [file for file in files.values() if not file.exists()]
    if missing:
        raise InputError(f"{missing[0]} is missing ({len(missing)} of {len(files)} study images); restore the folder")
    return files


def _encode_pair(run: Path, pair: Pair) -> tuple[bytes, bytes]:
    """Both images as PNG of the larger one's size, whatever size they were made at."""
    images = [_read(run, arm) for arm in (pair.a, pair.b)]
    box = (max(image.width for image in images), max(image.height for image in images))
    a, b = (_encode(image, box) for image in images)
    return a, b


def _read(run: Path, arm: Arm) -> Image.Image:
    """The image's pixels, RGB; its bytes must be those that the design was made on."""
    path = run / arm.file
    try:
        data = path.read_bytes()
        if sha256(data).hexdigest() != arm.sha256:
            raise InputError(f"{path} is not the image that the study was designed on; restore it")
        return Image.open(io.BytesIO(data)).convert("RGB")
    except OSError as error:
        raise InputError(f"can't read the image {path}: {error.strerror or error}") from error


def _encode(image: Image.Image, box: tuple[int, int]) -> bytes:
    if image.size != box:
        image = ImageOps.pad(image, box, Image.Resampling.LANCZOS)
    clean = Image.new("RGB", box)  # pixels only: a copy would take text chunks and profiles along
    clean.paste(image)
    buffer = io.BytesIO()
    clean.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
