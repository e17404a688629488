"""What raters get to see: the same pixels, one codec and size, no metadata, no telling id."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from hypersd_bench.errors import InputError
from hypersd_bench.store import ImageRow, RunStore
from user_study.design import make_design
from user_study.images import publish_images
from user_study.votes import VoteStore


def _run(folder: Path, sizes: tuple[tuple[int, int], tuple[int, int]]) -> RunStore:
    """Two models' images of two prompts, with the models' names in their files' metadata."""
    store = RunStore.create(folder, {"spec_hash": "h", "baseline": "hyper-sd"})
    rng = np.random.default_rng(0)
    for model, (width, height) in zip(("hyper-sd", "lcm"), sizes, strict=True):
        for prompt_id in ("p0", "p1"):
            info = PngImagePlugin.PngInfo()
            info.add_text("model", f"{model} secret")
            buffer = io.BytesIO()
            pixels = rng.integers(0, 255, (height, width, 3), np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG", pnginfo=info, dpi=(300, 300))
            file = f"images/{model}/4/{prompt_id}_0.png"
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(buffer.getvalue())
            digest = hashlib.sha256(buffer.getvalue()).hexdigest()
            store.record_images([ImageRow(model, 4, prompt_id, "a fox", 0, 1, file, digest, "x")])
    return store


@pytest.fixture
def open_votes() -> Iterator[Callable[[RunStore], VoteStore]]:
    opened: list[VoteStore] = []

    def open_one(store: RunStore) -> VoteStore:
        opened.append(VoteStore(store.folder / "study" / "votes.sqlite", make_design(store)))
        return opened[-1]

    yield open_one
    for votes in opened:
        votes.close()


def _pixels(file: Path) -> tuple[NDArray[np.uint8], list[object]]:
    with Image.open(file) as image:
        return np.asarray(image), list(image.info)


def test_pixels_stay_and_metadata_goes(tmp_path: Path, open_votes: Callable[[RunStore], VoteStore]) -> None:
    store = _run(tmp_path, ((64, 64), (64, 64)))
    votes = open_votes(store)
    files = publish_images(tmp_path, votes)
    ids = votes.image_ids()
    assert len(files) == 4
    for pair in votes.design.pairs:
        for arm, source in (("a", pair.a), ("b", pair.b)):
            pixels, info = _pixels(files[ids[pair.id, arm]])
            assert np.array_equal(pixels, _pixels(tmp_path / source.file)[0])
            assert info == []
            assert b"secret" not in files[ids[pair.id, arm]].read_bytes()
            assert source.model not in files[ids[pair.id, arm]].name


def test_images_are_published_once(tmp_path: Path, open_votes: Callable[[RunStore], VoteStore]) -> None:
    votes = open_votes(_run(tmp_path, ((64, 64), (64, 64))))
    first = publish_images(tmp_path, votes)
    before = {file: file.stat().st_mtime_ns for file in first.values()}
    assert publish_images(tmp_path, votes) == first
    assert {file: file.stat().st_mtime_ns for file in first.values()} == before


def test_leftovers_of_a_killed_start_are_cleared(tmp_path: Path, open_votes: Callable[[RunStore], VoteStore]) -> None:
    votes = open_votes(_run(tmp_path, ((64, 64), (64, 64))))
    stale = tmp_path / "study" / "images" / "leftover.png"
    stale.parent.mkdir()
    stale.write_bytes(b"half")
    files = publish_images(tmp_path, votes)
    assert sorted(stale.parent.iterdir()) == sorted(files.values())


@pytest.mark.parametrize(("sizes", "box"), [(((32, 32), (64, 64)), (64, 64)), (((64, 32), (32, 64)), (64, 64))])
def test_both_sides_get_one_size(
    tmp_path: Path,
    sizes: tuple[tuple[int, int], tuple[int, int]],
    box: tuple[int, int],
    open_votes: Callable[[RunStore], VoteStore],
) -> None:
    files = publish_images(tmp_path, open_votes(_run(tmp_path, sizes)))
    assert {_pixels(file)[0].shape for file in files.values()} == {(*box, 3)}


def test_missing_and_changed_images_are_named(tmp_path: Path, open_votes: Callable[[RunStore], VoteStore]) -> None:
    store = _run(tmp_path, ((64, 64), (64, 64)))
    votes = open_votes(store)
    source = tmp_path / "images/lcm/4/p0_0.png"
    data = source.read_bytes()
    source.write_bytes(data + b"x")
    with pytest.raises(InputError, match=r"p0_0\.png is not the image"):
        publish_images(tmp_path, votes)
    source.unlink()
    with pytest.raises(InputError, match=r"can't read the image .*p0_0\.png"):
        publish_images(tmp_path, votes)
    assert votes.image_ids() == {}
    source.write_bytes(data)
    files = publish_images(tmp_path, votes)
    next(iter(files.values())).unlink()
    with pytest.raises(InputError, match="1 of 4"):
        publish_images(tmp_path, votes)
