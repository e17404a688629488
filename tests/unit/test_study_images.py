"""Published images: equal on both sides, without anything that tells who made them; spoiled ones plainly worse."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from hypersd_bench.errors import InputError
from tests.synthetic_run import make_run
from tests.tiny_design import SESSION
from user_study.design import Design, Rules
from user_study.images import image_files, image_id, publish_images, spoil
from user_study.making import Plan, make_design
from user_study.wording import load_wording

KEY = b"k" * 32


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", models=("one", "two"), steps=(4,), num_prompts=4, replicates=1).folder


@pytest.fixture
def design(run: Path) -> Design:
    from hypersd_bench.store import RunStore

    session = {**SESSION, "practice": 1, "gold_every": 3}
    return make_design(RunStore.open(run), Plan(), ("overall",), load_wording(None, ("overall",)), session, Rules())


@pytest.fixture
def files(run: Path, design: Design, tmp_path: Path) -> dict[str, Path]:
    publish_images(run, design, tmp_path / "images", KEY)
    return image_files(tmp_path / "images", design, KEY)


def test_every_side_has_a_file_of_its_own(files: dict[str, Path], design: Design) -> None:
    pairs = (*design.pairs, *design.gold, *design.practice)
    assert len(files) == 2 * len(pairs)
    assert {file.name for file in files.values()} == {file.name for file in next(iter(files.values())).parent.iterdir()}


def test_pixels_are_the_run_s_own(files: dict[str, Path], design: Design, run: Path) -> None:
    for pair in design.pairs:
        for arm, made in (("a", pair.a), ("b", pair.b)):
            shown = np.asarray(Image.open(files[image_id(KEY, pair.id, arm)]))
            assert np.array_equal(shown, np.asarray(Image.open(run / made.file)))


def test_ids_can_t_be_told_without_the_key() -> None:
    ids = {image_id(KEY, f"{n:04d}", arm) for n in range(200) for arm in "ab"}
    assert len(ids) == 400
    assert all(len(name) == 22 for name in ids)
    assert image_id(b"x" * 32, "0001", "a") != image_id(KEY, "0001", "a")


def test_files_hold_no_metadata_and_no_time(files: dict[str, Path]) -> None:
    for file in files.values():
        with Image.open(file) as image:
            assert (image.format, image.mode, dict(image.info)) == ("PNG", "RGB", {})
        assert file.stat().st_mtime == 0


def test_text_in_an_image_does_not_come_through(run: Path, design: Design, tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "made by sentinel-model")
    from dataclasses import replace
    from hashlib import sha256

    arm = design.pairs[0].a
    Image.open(run / arm.file).copy().save(run / arm.file, pnginfo=info)
    data = (run / arm.file).read_bytes()
    assert b"sentinel" in data
    changed = replace(design.pairs[0], a=replace(arm, sha256=sha256(data).hexdigest()))
    alone = replace(design, pairs=(changed,), gold=(), practice=())
    publish_images(run, alone, tmp_path / "out", KEY)
    assert not any(b"sentinel" in file.read_bytes() for file in (tmp_path / "out").iterdir())


def test_both_sides_have_the_larger_one_s_size(run: Path, design: Design, tmp_path: Path) -> None:
    from dataclasses import replace
    from hashlib import sha256

    arm = design.pairs[0].b
    buffer = io.BytesIO()
    Image.new("RGB", (96, 48), "red").save(buffer, "PNG")
    (run / arm.file).write_bytes(buffer.getvalue())
    wide = replace(design.pairs[0], b=replace(arm, sha256=sha256(buffer.getvalue()).hexdigest()))
    publish_images(run, replace(design, pairs=(wide,), gold=(), practice=()), tmp_path / "out", KEY)
    for file in (tmp_path / "out").iterdir():
        with Image.open(file) as image:
            assert image.size == (96, 64)


def test_missing_and_changed_images_are_told(run: Path, design: Design, tmp_path: Path) -> None:
    path = run / design.pairs[0].a.file
    data = path.read_bytes()
    path.unlink()
    with pytest.raises(InputError, match="can't read the image"):
        publish_images(run, design, tmp_path / "out", KEY)
    path.write_bytes(data + b"x")
    with pytest.raises(InputError, match="not the image that the run recorded"):
        publish_images(run, design, tmp_path / "out", KEY)


def test_a_lost_published_image_is_told(files: dict[str, Path], design: Design, tmp_path: Path) -> None:
    next(iter(files.values())).unlink()
    with pytest.raises(InputError, match=r"missing \(1 of"):
        image_files(tmp_path / "images", design, KEY)


@pytest.mark.parametrize("size", [(64, 64), (512, 384), (1024, 1024)])
@pytest.mark.parametrize("kind", ["blur", "blocks", "noise"])
def test_a_spoiled_image_is_plainly_another(size: tuple[int, int], kind: str) -> None:
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    pixels = (127 + 120 * np.sin(x * 8 * np.pi / size[0]) * np.cos(y * 6 * np.pi / size[1])).astype(np.uint8)
    image = Image.fromarray(np.stack([pixels, 255 - pixels, pixels // 2], axis=2))
    worse = spoil(image, kind)
    assert worse.size == size
    difference = np.abs(np.asarray(worse, int) - np.asarray(image, int))
    assert np.sqrt((difference**2).mean()) > 20  # about 22 dB, whatever the size


def test_an_unspoiled_image_is_left_alone() -> None:
    image = Image.new("RGB", (8, 8))
    assert spoil(image, "") is image
    with pytest.raises(ValueError, match="unknown way"):
        spoil(image, "sepia")
