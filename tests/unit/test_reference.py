"""Reference sets: named by what they hold, their features computed once, and refused where they are none."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hypersd_bench import reference
from hypersd_bench.contracts import ReferenceMoments
from hypersd_bench.errors import InputError
from hypersd_bench.features import Reference, load_reference, save_reference
from hypersd_bench.reference import FolderReference, RendersReference, StatisticsReference, open_reference
from tests.toy_metric import MeanColour


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HYPERSD_BENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    Image.new("L", (30, 20), 90).save(folder / "b.png")
    Image.new("RGBA", (8, 8), (10, 20, 30, 255)).save(folder / "a.png")
    Image.new("RGB", (20, 20), (1, 2, 3)).save(folder / "c.PNG")
    Image.new("RGB", (1024, 640), (200, 100, 50)).save(folder / "d.jpg", quality=95)
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_images_are_read_in_order_of_name_whatever_size_and_mode(photographs: Path) -> None:
    found = FolderReference(photographs).features(MeanColour())
    assert isinstance(found.values, np.ndarray)
    assert found.values[:3].tolist() == [[10, 20, 30], [90, 90, 90], [1, 2, 3]]
    np.testing.assert_allclose(found.values[3], [200, 100, 50], atol=1.5)  # JPEG


def test_the_centre_square_is_what_is_read(tmp_path: Path) -> None:
    picture = np.zeros((10, 30, 3), np.uint8)
    picture[:, 10:20] = 80
    for name in ("wide.png", "high.png"):
        Image.fromarray(picture if name == "wide.png" else picture.transpose(1, 0, 2)).save(tmp_path / name)
    found = FolderReference(tmp_path).features(MeanColour())
    np.testing.assert_array_equal(found.values, np.full((2, 3), 80))


def test_features_are_computed_once_for_each_extractor_and_content(photographs: Path, tmp_path: Path) -> None:
    extractor = MeanColour()
    first = FolderReference(photographs).features(extractor)
    assert extractor.seen == 4
    copy = shutil.copytree(photographs, tmp_path / "renamed")
    (copy / "a.png").rename(copy / "aa.png")
    again = FolderReference(copy).features(extractor)
    assert extractor.seen == 4  # the same images, wherever they are
    np.testing.assert_array_equal(first.values, again.values)
    assert first.id.replace("photographs", "renamed") == again.id
    other = MeanColour(fingerprint="2")
    FolderReference(photographs).features(other)
    assert other.seen == 4
    Image.new("RGB", (5, 5), (9, 9, 9)).save(photographs / "a.png")
    changed = FolderReference(photographs)
    assert changed.id != first.id
    changed.features(extractor)
    assert extractor.seen == 8


def test_renders_are_named_by_their_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "NUM_RENDERS", 3)
    renders = RendersReference()
    first, second, _ = renders.pictures
    assert first.shape == (64, 64, 3)
    assert (first != second).any()
    assert renders.id == RendersReference().id
    assert renders.id.startswith("held-out-renders-3-")
    assert open_reference(None, scenes=True) == renders
    assert open_reference(None, scenes=False) is None


def test_statistics_are_read_as_they_are_published(tmp_path: Path) -> None:
    path = tmp_path / "val2014.npz"
    np.savez(path, mu=np.arange(3.0), sigma=np.eye(3), n=40504, features="toy/mean-colour")
    found = StatisticsReference(path).features(MeanColour())
    assert isinstance(found.values, ReferenceMoments)
    assert found.values.n == 40504
    assert found.id.startswith("val2014-40504-")
    with pytest.raises(InputError, match=r"says that it is of toy/mean-colour, not of inception/tf1"):
        open_reference(Path(f"{path}=inception/tf1"), scenes=False)
    np.savez(path, mu=np.arange(3.0), sigma=np.eye(4))
    with pytest.raises(InputError, match=r"sigma \(d, d\)"):
        open_reference(path, scenes=False)
    path.write_bytes(b"no archive")
    with pytest.raises(InputError, match="holds no statistics"):
        open_reference(path, scenes=False)
    with pytest.raises(InputError, match="no such file"):
        open_reference(tmp_path / "none.npz", scenes=False)


def test_what_is_no_reference_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least two images"):
        open_reference(tmp_path, scenes=False)
    with pytest.raises(InputError, match="no such folder"):
        open_reference(tmp_path / "none", scenes=False)
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"not a png")
    with pytest.raises(InputError, match=r"can't read image .*a\.png"):
        FolderReference(tmp_path).features(MeanColour())


def test_a_kept_reference_is_read_back(tmp_path: Path) -> None:
    features = Reference("photographs-2-00000000", np.ones((2, 3), np.float32))
    moments = Reference("val-9-00000000", ReferenceMoments(9, np.arange(3.0), np.eye(3)))
    for given in (features, moments):
        save_reference(tmp_path / "reference.npz", "1", given)
        found = load_reference(tmp_path / "reference.npz", "1")
        assert found is not None
        assert found.id == given.id
        assert load_reference(tmp_path / "reference.npz", "2") is None
        assert type(found.values) is type(given.values)
    (tmp_path / "reference.npz").write_bytes(b"broken")
    with pytest.raises(InputError, match="delete it"):
        load_reference(tmp_path / "reference.npz")
