"""Order, buckets, filters and metadata of the training data: what can be told without a model."""

from __future__ import annotations

import io
import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from distill.sources.buckets import AREA, Bucket, assign, cut, cut_mask, fit, group, make_buckets
from distill.sources.contract import Catalogue, Row, SampleError
from distill.sources.filters import PAPER, Filters, sift
from distill.sources.image_folder import polygons, run_lengths
from distill.sources.images import decode, sharpness, size_of
from distill.sources.metadata import AESTHETIC, caption_of, number_of, size_stated
from distill.sources.order import Plan, batch_indices
from distill.sources.sizes import EncodedShape, predicted_bytes
from distill.sources.webdataset import _spell_out
from hypersd_bench.errors import InputError

# SDXL, arXiv 2307.01952, appendix I: the landscape half; the portrait half is its mirror
SDXL_TABLE = {
    512: (2048, 1984, 1920, 1856),
    576: (1792, 1728, 1664),
    640: (1600, 1536),
    704: (1472, 1408, 1344),
    768: (1344, 1280),
    832: (1216, 1152),
    896: (1152, 1088),
    960: (1088, 1024),
    1024: (1024,),
}  # height to widths


def plan_of(counts: list[int], size: int, seed: int = 0) -> Plan:
    borders = np.cumsum([0, *counts])
    members = [np.arange(a, b) for a, b in pairwise(borders)]
    return Plan(members, [(64 * (i + 1), 64) for i in range(len(counts))], seed, size)


def images_of(plan: Plan, unit: int) -> list[int]:
    return [plan.candidate(slot) for slot in plan.slots(unit * plan.size)]


# which images


def test_one_bucket_is_a_permutation_an_epoch_wherever_batches_fall() -> None:
    plan = plan_of([10], size=4)
    seen = [image for unit in range(5) for image in images_of(plan, unit)]
    assert seen == batch_indices(0, 10, 0, 20).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


@given(counts=st.lists(st.integers(1, 40), min_size=2, max_size=5), size=st.integers(1, 7), epochs=st.integers(1, 4))
def test_buckets_drop_nothing_and_never_mix(counts: list[int], size: int, epochs: int) -> None:
    counts = [max(count, size) for count in counts]
    plan = plan_of(counts, size)
    units = sum(epochs * count // size for count in counts)
    batches = [images_of(plan, unit) for unit in range(units)]
    borders = np.cumsum(counts)
    for batch in batches:
        assert len(batch) == size
        assert len({int(np.searchsorted(borders, image, side="right")) for image in batch}) == 1
    seen = Counter(image for batch in batches for image in batch)
    assert set(seen.values()) <= {epochs, epochs - 1} - {0}
    waiting = epochs * sum(counts) - units * size
    assert sum(epochs - seen[image] for image in range(sum(counts))) == waiting < len(counts) * size


def test_batches_do_not_depend_on_what_was_asked_before() -> None:
    forwards = [images_of(plan_of([9, 5, 6], 2, seed=3), unit) for unit in range(40)]
    plan = plan_of([9, 5, 6], 2, seed=3)
    backwards = [images_of(plan, unit) for unit in reversed(range(40))]
    assert forwards == backwards[::-1]
    assert forwards != [images_of(plan_of([9, 5, 6], 2, seed=4), unit) for unit in range(40)]


def test_two_processes_see_what_one_sees() -> None:
    plan = plan_of([9, 5, 6], 2)
    one = [images_of(plan, unit) for unit in range(20)]
    size, processes = 2, 2
    for step in range(10):
        position = step * processes * size
        parts = [[plan.candidate(s) for s in plan.slots(position + p * size)] for p in range(processes)]
        assert parts == one[step * processes : (step + 1) * processes]


def test_a_replacement_is_the_next_of_the_permutation() -> None:
    plan = plan_of([7], 7)
    slots = plan.slots(0)
    order = [plan.candidate(slot) for slot in slots]
    assert [plan.candidate(slot, 1) for slot in slots] == [*order[1:], order[0]]


# buckets


def test_buckets_are_sdxl_s_own_table() -> None:
    landscape = [Bucket(width, height) for height, widths in SDXL_TABLE.items() for width in widths]
    portrait = [Bucket(bucket.height, bucket.width) for bucket in landscape[:-1]]
    assert sorted(make_buckets(1024)) == sorted(landscape + portrait)


@given(resolution=st.sampled_from([256, 512, 768, 1024]), width=st.integers(40, 5000), height=st.integers(40, 5000))
def test_a_picture_gets_the_nearest_aspect(resolution: int, width: int, height: int) -> None:
    buckets = make_buckets(resolution)
    for bucket in buckets:
        assert bucket.width % 64 == bucket.height % 64 == 0
        assert AREA < bucket.width * bucket.height / resolution**2 <= 1

    def distance(bucket: Bucket) -> float:
        return abs(math.log(bucket.width / bucket.height) - math.log(width / height))

    chosen = buckets[int(assign(buckets, np.array([width], np.int32), np.array([height], np.int32))[0])]
    assert distance(chosen) == pytest.approx(min(map(distance, buckets)), abs=1e-12)


@given(
    width=st.integers(10, 3000), height=st.integers(10, 3000),
    place=st.tuples(st.floats(0, 1), st.floats(0, 1)), bucket=st.sampled_from(make_buckets(512)),
)  # fmt: skip
def test_the_cut_lies_inside_and_one_side_is_whole(
    width: int, height: int, place: tuple[float, float], bucket: Bucket
) -> None:
    how = fit((width, height), bucket, place)
    assert 0 <= how.left <= how.width - bucket.width
    assert 0 <= how.top <= how.height - bucket.height
    assert how.width == bucket.width or how.height == bucket.height
    assert how.time_ids == (height, width, how.top, how.left, bucket.height, bucket.width)


@pytest.mark.parametrize("place", [(0.5, 0.5), (0.0, 1.0), (0.9, 0.2)])
def test_time_ids_say_where_the_picture_was_cut(place: tuple[float, float]) -> None:
    ramp = np.zeros((300, 200, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, 200)[None, :]
    ramp[..., 1] = np.linspace(0, 255, 300)[:, None]
    bucket = Bucket(64, 64)
    how = fit((200, 300), bucket, place)
    pixels = cut(Image.fromarray(ramp), how)
    height, width, top, left, *target = how.time_ids
    assert (height, width, target) == (300, 200, [64, 64])
    scale = 64 / 200  # the shorter side is covered whole
    assert pixels.shape == (64, 64, 3)
    assert pixels[32, :, 0].mean() == pytest.approx(255 * (left + 32) / scale / 200, abs=3)
    assert pixels[:, 32, 1].mean() == pytest.approx(255 * (top + 32) / scale / 300, abs=3)


def test_masks_are_cut_as_the_picture_is() -> None:
    mask = np.zeros((120, 200), bool)
    mask[30:80, 60:140] = True
    picture = Image.fromarray(np.repeat(mask[..., None], 3, 2).astype(np.uint8) * 255)
    how = fit((200, 120), Bucket(64, 64), (0.3, 0.5))
    assert (cut_mask(mask, how) ^ (cut(picture, how)[..., 0] >= 128)).mean() < 0.01


def test_rare_shapes_join_the_nearest_that_is_common() -> None:
    buckets = make_buckets(512)
    width = np.array([512] * 6 + [1024] * 2 + [384] * 5, np.int32)
    height = np.array([512] * 6 + [256] * 2 + [640] * 5, np.int32)
    groups = group(buckets, np.arange(13), width, height, smallest=4)
    assert {str(bucket): members.tolist() for bucket, members in groups.items()} == {
        "384x640": [8, 9, 10, 11, 12],
        "512x512": [0, 1, 2, 3, 4, 5, 6, 7],
    }
    few = group(buckets, np.arange(13), width, height, smallest=100)
    assert {str(bucket): len(members) for bucket, members in few.items()} == {"512x512": 13}


def test_a_resolution_off_the_grid_is_refused() -> None:
    with pytest.raises(InputError, match=r"resolution 1000 is no multiple of 64 pixels; 1024 would be"):
        make_buckets(1000)


# filters


def test_filters_count_what_they_take() -> None:
    nan = float("nan")
    catalogue = Catalogue.of(
        [
            Row("good", "a", 2000, 1100, 6.0),
            Row("small", "a", 2000, 1000, 6.0),
            Row("plain", "a", 1024, 1024, 5.5),  # the papers say above
            Row("unrated", "a", 1024, 1024, nan),
            Row("broken", "a", problem="unreadable"),
            Row("small and plain", "a", 100, 100, 1.0),
            Row("of unknown size", "a", 0, 0, 9.0),
        ]
    )
    kept, counts = sift(catalogue, PAPER, "x")
    assert kept.tolist() == [0, 6]
    assert counts == {"min_side": 2, "no_aesthetic_score": 1, "min_aesthetic": 1}
    assert catalogue.broken == {4: "unreadable"}


def test_an_aesthetic_filter_without_scores_is_refused() -> None:
    with pytest.raises(InputError, match="carry no aesthetic score"):
        sift(Catalogue.of([Row("a", "b", 9, 9)]), Filters(min_aesthetic=5), "x")


def test_sharpness_is_the_variance_of_scipy_s_laplacian() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    assert sharpness(pixels) == pytest.approx(ndimage.laplace(grey)[1:-1, 1:-1].var(), rel=1e-5)
    soft = ndimage.gaussian_filter(pixels, (2, 2, 0))
    assert sharpness(soft) < 0.05 * sharpness(pixels)


# images and metadata


def jpeg(image: Image.Image, orientation: int | None = None) -> bytes:
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    sink = io.BytesIO()
    image.save(sink, "JPEG", exif=exif, quality=95)
    return sink.getvalue()


def test_turned_photographs_are_set_upright() -> None:
    picture = Image.new("RGB", (40, 20), "red")
    picture.paste("blue", (0, 0, 20, 20))  # the left half; turned a quarter clockwise it is the top
    data = jpeg(picture, orientation=6)
    assert size_of(data) == (20, 40) == decode(data).size
    assert decode(data).getpixel((10, 5))[2] > 200  # type: ignore[index]


def test_what_is_transparent_becomes_white() -> None:
    sink = io.BytesIO()
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(sink, "PNG")
    assert decode(sink.getvalue()).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    "damage", [lambda data: b"not an image", lambda data: data[: len(data) // 2], lambda data: b""]
)
def test_damaged_images_are_named_not_raised_raw(damage) -> None:  # type: ignore[no-untyped-def]
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    with pytest.raises(SampleError, match="unreadable image"):
        decode(damage(jpeg(noise)))


def test_fields_of_many_names() -> None:
    assert caption_of({"TEXT": " a  fox\n"}) == "a fox"
    assert caption_of({"caption": None}) == caption_of({}) == ""
    assert caption_of({"captions": ["", "a fox", "a cat"]}) == "a fox"
    assert number_of({"AESTHETIC_SCORE": "6.5"}, AESTHETIC) == 6.5
    assert number_of({"aesthetic_score_laion_v2": 4}, AESTHETIC) == 4
    assert size_stated({"width": 512, "HEIGHT": 9, "WIDTH": 4000, "height": 384}) == (512, 384)
    assert size_stated({"WIDTH": 4000}) == (0, 0)
    assert math.isnan(number_of({"similarity": 0.3, "aesthetic": "good"}, AESTHETIC))


def test_braces_are_spelled_out() -> None:
    assert _spell_out("a/{08..11}-{x,y}.tar") == [f"a/{n}-{c}.tar" for n in ("08", "09", "10", "11") for c in "xy"]
    assert _spell_out("{9..10}.tar") == ["9.tar", "10.tar"]
    with pytest.raises(InputError, match="runs backwards"):
        _spell_out("{3..1}.tar")


def test_run_lengths_as_pycocotools_writes_them() -> None:
    # pycocotools 2.0 encoded the same ellipse and corner; area by its own count
    text = (
        "[e0;_14M2N2M4N0O2N2N2O0O2O0O2O0O2O0O2O00000O2O000000000000000000000000000000000001N1000001N101N101N101N101"
        "N2N2N102L3N2N3LW1NmN000000000000000000000000000000000000"
    )
    y, x = np.mgrid[:60, :90]
    drawn = ((x - 40) ** 2 / 900 + (y - 28) ** 2 / 400 < 1) | ((x > 70) & (y < 9))
    mask = run_lengths({"size": [60, 90], "counts": text})
    assert mask.sum() == 2040
    assert (mask == drawn).all()
    edges = np.flatnonzero(np.diff(np.concatenate([[False], drawn.T.ravel()]).astype(int)))
    counts = np.diff([0, *edges, drawn.size]).tolist()
    assert (run_lengths({"size": [60, 90], "counts": counts}) == drawn).all()
    with pytest.raises(SampleError, match="does not fill"):
        run_lengths({"size": [60, 90], "counts": [5, 5]})


def test_polygons_have_the_area_of_the_shoelace_formula() -> None:
    ring = [10.0, 10.0, 50.0, 12.0, 45.0, 40.5, 12.0, 38.0]
    x, y = np.array(ring[::2]), np.array(ring[1::2])
    area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    assert polygons([ring], (90, 60)).sum() == pytest.approx(area, rel=0.03)
    assert polygons([[0, 0, 90, 0, 90, 60, 0, 60]], (90, 60)).all()


# sizes


def test_predicted_sizes_are_those_of_the_field() -> None:
    sdxl = EncodedShape((4, 128, 128), 77, 2048, 1280)
    sd15 = EncodedShape((4, 64, 64), 77, 768)
    assert sdxl.image_bytes() == 131_072
    assert sdxl.prompt_bytes() == 315_392 + 2_560
    assert (sd15.image_bytes(), sd15.prompt_bytes()) == (32_768, 118_272)
    half_a_million = predicted_bytes(500_000, 500_000, sdxl)
    assert half_a_million.latents == pytest.approx(66e9, rel=0.01)
    assert half_a_million.prompts == pytest.approx(159e9, rel=0.01)
