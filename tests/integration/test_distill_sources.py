"""Training data from files to batches, under tiny random bases of both layouts."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from safetensors.torch import load_file

from distill.architectures import find_architecture
from distill.batch import Batch, Condition
from distill.sources.cache import CacheFolder
from distill.sources.encoding import Encoder
from distill.sources.filters import Filters
from distill.sources.image_folder import ImageFolder
from distill.sources.loading import Loaded
from distill.sources.opening import open_data, open_source
from distill.sources.order import batch_indices
from distill.sources.pictures import DataSettings, PictureData
from distill.sources.prefetch import Prefetch
from distill.sources.scenes import SceneData
from distill.sources.sizes import predicted_bytes
from distill.sources.webdataset import TarShards
from hypersd_bench.errors import InputError
from hypersd_bench.pipelines import load_base
from hypersd_bench.pocket.scenes import CONCEPT_NAMES, render, sample_scene
from tests.tiny_base import make_tiny_base
from tests.tiny_sdxl import make_tiny_sdxl

PACKS = Path(__file__).parents[2].parent / "shared" / "data" / "packs"
SIZES = ((80, 60), (60, 80), (64, 64), (120, 60), (70, 66))  # pixels; with steps of 16 at 64 px in three buckets


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {"sd": make_tiny_base(folder / "sd"), "sdxl": make_tiny_sdxl(folder / "sdxl")}


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def pipe(request: pytest.FixtureRequest, bases: dict[str, Path]) -> Any:
    return load_base(str(bases[request.param]))


@pytest.fixture(scope="module")
def sdxl(bases: dict[str, Path]) -> Any:
    return load_base(str(bases["sdxl"]))


def png(size: tuple[int, int], seed: int, flat: bool = False) -> bytes:
    shape = (size[1], size[0], 3)
    pixels = np.full(shape, 90, np.uint8) if flat else np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def write_folder(folder: Path, count: int = 30, change: Callable[[int, dict[str, Any]], None] | None = None) -> Path:
    """Pictures of five shapes; ``change`` may spoil a record, whose key ``bytes`` is the file."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        size = SIZES[i % len(SIZES)]
        record: dict[str, Any] = {"file_name": f"{i:03d}.png", "text": f"a fox {i % 7}", "bytes": png(size, i)}
        if change:
            change(i, record)
        if record["bytes"] is not None:
            (folder / record["file_name"]).write_bytes(record["bytes"])
        del record["bytes"]
        lines.append(json.dumps(record))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def settings(folder: Path, **options: Any) -> DataSettings:
    return DataSettings(**{"source": str(folder), "bucket_step": 16, "smallest_bucket": 4, "seed": 1, **options})


def data_of(pipe: Any, asked: DataSettings, cache: Path) -> PictureData:
    data = open_data(asked, pipe, cache)
    assert isinstance(data, PictureData)
    return data


def same(a: Batch, b: Batch) -> bool:
    def tensors(batch: Batch) -> list[torch.Tensor]:
        parts = [batch.z0, batch.cond.text, batch.cond.pooled, batch.cond.time_ids, batch.uncond.text]
        return [part for part in parts if part is not None]

    equal = all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))
    return equal and (a.ids, a.prompts) == (b.ids, b.prompts)


# encoding


def test_prompts_are_encoded_as_the_pipeline_does_to_the_bit(pipe: Any) -> None:
    encoder = Encoder(pipe)
    texts = ["a fox on a green background", "a pizza", "a fox left of a pizza on a pink background"]
    with torch.no_grad():
        expected = pipe.encode_prompt(texts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    found = encoder.prompts(texts)
    assert torch.equal(found.text, expected[0])
    assert torch.equal(encoder.empty.text.expand_as(expected[1]), expected[1])
    if encoder.sdxl:
        assert found.pooled is not None
        assert encoder.empty.pooled is not None
        assert torch.equal(found.pooled, expected[2])
        assert torch.equal(encoder.empty.pooled.expand_as(expected[3]), expected[3])
        assert not encoder.empty.text.any()
    else:
        assert found.pooled is None
        assert encoder.empty.text.any()
    assert torch.equal(encoder.prompts([texts[1]] * 3).text[2], encoder.prompts([texts[1]]).text[0])


def test_latents_are_the_posterior_mean_as_diffusers_prepares_it(pipe: Any) -> None:
    picture = Image.open(io.BytesIO(png((64, 64), 5)))
    x = VaeImageProcessor(vae_scale_factor=8).preprocess(picture)
    expected = pipe.vae.encode(x).latent_dist.mean * pipe.vae.config.scaling_factor
    found = Encoder(pipe).latents(torch.from_numpy(np.array(picture))[None])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_latents_follow_a_configured_mean_and_deviation(bases: dict[str, Path]) -> None:
    pipe: Any = load_base(str(bases["sdxl"]))
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(png((64, 64), 5)))))[None]
    plain = Encoder(pipe).latents(pixels) / pipe.vae.config.scaling_factor
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 3.0, 4.0]
    pipe.vae.register_to_config(latents_mean=mean, latents_std=std)
    z = Encoder(pipe).latents(pixels)
    # what the pipeline undoes before it decodes
    undone = z * torch.tensor(std)[:, None, None] / pipe.vae.config.scaling_factor + torch.tensor(mean)[:, None, None]
    torch.testing.assert_close(undone, plain)


def test_a_vae_that_overflows_is_kept_in_float32(bases: dict[str, Path]) -> None:
    pipe: Any = load_base(str(bases["sdxl"]), dtype=torch.float16)
    pipe.vae.to(torch.float16)
    Encoder(pipe)
    assert pipe.vae.dtype == torch.float32
    pipe.vae.register_to_config(force_upcast=False)
    pipe.vae.to(torch.float16)
    assert Encoder(pipe).pipe.vae.dtype == torch.float16


def test_prompts_over_the_token_limit_are_counted(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    encoder = Encoder(pipe)
    encoder.prompts(["a fox", "a fox left of " * 9, "a fox left of " * 9, "mushroom " * 14])
    assert encoder.too_long == {"a fox left of " * 9}  # 14 words, start and end just fit
    assert not caplog.records


# the miniature's scenes


def test_scenes_are_drawn_in_the_order_of_old(pipe: Any, tmp_path: Path) -> None:
    data = open_data(DataSettings(scenes=12, seed=5), pipe, tmp_path)
    assert isinstance(data, SceneData)
    batch = data.batch(10, 6)
    picked = batch_indices(5, 12, 10, 6)
    assert batch.prompts == [sample_scene(int(i)).caption for i in picked]
    pixels = torch.from_numpy(np.stack([render(sample_scene(int(i))).image for i in picked]))
    torch.testing.assert_close(batch.latents, Encoder(pipe).latents(pixels), atol=2e-2, rtol=2e-2)  # kept in fp16
    assert batch.latent_shape == data.latent_shape == (4, 8, 8)
    assert same(batch, data.batch(10, 6))
    if Encoder(pipe).sdxl:
        assert batch.cond.time_ids is not None
        assert batch.cond.time_ids.tolist() == [[64, 64, 0, 0, 64, 64]] * 6
    assert data.report()["total"] == 12


def test_scenes_have_exact_instances(pipe: Any, tmp_path: Path) -> None:
    data = open_data(DataSettings(scenes=12), pipe, tmp_path)
    batch = data.batch(0, 12)
    assert batch.instances is not None
    assert len(batch.instances) == 12
    for name, found in zip(batch.ids, batch.instances, strict=True):
        scene = sample_scene(int(name.split()[1]))
        masks = render(scene).masks >= 0.5
        assert [CONCEPT_NAMES[int(label)] for label in found.labels] == list(scene.concepts)
        assert (found.masks.numpy() == masks).all()
        for mask, (x1, y1, x2, y2) in zip(masks, found.boxes.int().tolist(), strict=True):
            assert mask[y1:y2, x1:x2].sum() == mask.sum()
            assert mask[y1, :].any()
            assert mask[y2 - 1, :].any()
            assert mask[:, x1].any()
            assert mask[:, x2 - 1].any()


def test_scenes_as_a_source_equal_scenes_encoded_once(sdxl: Any, tmp_path: Path) -> None:
    pool = open_data(DataSettings(scenes=8, seed=2), sdxl, tmp_path)
    drawn = PictureData(open_source("scenes", scenes=8), Encoder(sdxl), DataSettings(seed=2, square=True))
    a, b = pool.batch(3, 4), drawn.batch(3, 4)
    assert a.ids == b.ids
    torch.testing.assert_close(a.latents, b.latents, atol=1e-2, rtol=1e-2)  # the pool is kept in fp16


# pictures


def test_any_position_in_any_order_gives_the_same_batch(pipe: Any, tmp_path: Path) -> None:
    asked = settings(write_folder(tmp_path / "data"), crop="random")
    first = data_of(pipe, asked, tmp_path)
    batches = [first.batch(position, 4) for position in range(0, 64, 4)]
    resumed = data_of(pipe, asked, tmp_path)
    for position in (60, 4, 32, 0):
        assert same(resumed.batch(position, 4), batches[position // 4])
    assert not same(data_of(pipe, replace(asked, seed=2), tmp_path).batch(0, 4), batches[0])


def test_an_epoch_holds_every_picture_and_batches_one_shape(sdxl: Any, tmp_path: Path) -> None:
    data = data_of(sdxl, settings(write_folder(tmp_path / "data")), tmp_path)
    counts = data.report()["buckets"]
    assert sum(counts.values()) == 30
    assert len(counts) >= 3
    epochs, batches = 2, sum(2 * count // 4 for count in counts.values())
    seen: Counter[str] = Counter()
    for unit in range(batches):
        batch = data.batch(4 * unit, 4)
        assert batch.cond.time_ids is not None
        height, width = batch.cond.time_ids[0, 4:].int().tolist()
        assert batch.latents.shape == (4, 4, height // 8, width // 8)
        assert (batch.cond.time_ids[:, 4:] == batch.cond.time_ids[0, 4:]).all()
        for name, ids in zip(batch.ids, batch.cond.time_ids.int().tolist(), strict=True):
            assert (ids[1], ids[0]) == SIZES[int(name[:3]) % len(SIZES)]
        seen.update(batch.ids)
    assert len(seen) == 30
    assert set(seen.values()) <= {epochs, epochs - 1}


def test_time_ids_have_the_pipeline_s_order(sdxl: Any, tmp_path: Path) -> None:
    data = data_of(sdxl, settings(write_folder(tmp_path / "data", 5), square=True), tmp_path)
    batch = data.batch(0, 5)
    assert batch.cond.time_ids is not None
    row = batch.ids.index("000.png")  # 80x60: scaled to 85x64, cut at the left by 10
    width = sdxl.text_encoder_2.config.projection_dim
    expected = sdxl._get_add_time_ids((60, 80), (0, 10), (64, 64), torch.float32, width)
    assert batch.cond.time_ids[row].tolist() == expected[0].tolist()
    assert batch.uncond.time_ids is not None
    assert batch.uncond.time_ids.tolist() == [[64, 64, 0, 0, 64, 64]]
    sdxl.unet(batch.latents, 5, **batch.cond.arguments)  # and the UNet takes it


def test_broken_pictures_are_replaced_counted_and_listed(pipe: Any, tmp_path: Path) -> None:
    def spoil(i: int, record: dict[str, Any]) -> None:
        if i == 3:
            record["bytes"] = record["bytes"][:400]  # its header is whole
        if i == 4:
            record["bytes"] = b"junk"
        if i == 5:
            record["bytes"] = None
        if i == 6:
            record["text"] = " "

    folder = write_folder(tmp_path / "data", change=spoil)
    asked = settings(folder, square=True, max_broken=0.2)
    data = data_of(pipe, asked, tmp_path)
    assert data.report()["broken"]["count"] == 3
    ids = [name for position in range(0, 60, 6) for name in data.batch(position, 6).ids]
    assert not {"003.png", "004.png", "005.png", "006.png"} & set(ids)
    report = data.report()
    assert (report["total"], report["used"]) == (30, 26)
    assert report["broken"]["count"] == 4
    reasons = dict(report["broken"]["first"])
    assert reasons["006.png"] == "no caption"
    assert reasons["005.png"] == "no such file"
    assert "unreadable image" in reasons["003.png"]
    assert "no known image format" in reasons["004.png"]
    # another process, which meets the broken one at another time, sees the same
    other = data_of(pipe, asked, tmp_path)
    again = [name for position in reversed(range(0, 60, 6)) for name in reversed(other.batch(position, 6).ids)]
    assert ids == again[::-1]


def test_too_many_broken_pictures_stop_it(pipe: Any, tmp_path: Path) -> None:
    def spoil(i: int, record: dict[str, Any]) -> None:
        if i in (3, 4):
            record["bytes"] = record["bytes"][:400]

    folder = write_folder(tmp_path / "data", change=spoil)
    one = data_of(pipe, settings(folder, square=True, max_broken=0.04, workers=1), tmp_path)
    with pytest.raises(
        InputError, match=r"2 of 30 samples can't be used, the first is 003.png \(unreadable image"
    ) as e:
        one.batch(0, 30)
    assert "raise max_broken (now 0.04)" in str(e.value)
    assert "\n" not in str(e.value)
    one_is_fine = write_folder(tmp_path / "one", change=lambda i, r: r.update(bytes=b"junk") if i == 0 else None)
    assert data_of(pipe, settings(one_is_fine, square=True), tmp_path).report()["broken"]["count"] == 1
    with pytest.raises(InputError, match="1 of 30 samples"):
        data_of(pipe, settings(one_is_fine, square=True, max_broken=0), tmp_path)


def test_no_captions_at_all_is_an_error(pipe: Any, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", change=lambda i, record: record.pop("text"))
    with pytest.raises(InputError, match=r"none of the 30 samples has a caption; .*caption_column"):
        data_of(pipe, settings(folder), tmp_path)


def test_filters_take_and_count(pipe: Any, tmp_path: Path) -> None:
    def change(i: int, record: dict[str, Any]) -> None:
        record["aesthetic"] = 6.0 if i >= 5 else 5.0
        if i in (12, 17):  # 64x64
            record["bytes"] = png((64, 64), i, flat=True)
        if i == 7:
            record |= {"width": 64, "height": 640}  # says more than it has
            record["bytes"] = png((64, 32), i)

    filters = Filters(min_side=62, min_aesthetic=5.5, min_sharpness=50)
    folder = write_folder(tmp_path / "data", change=change)
    data = data_of(pipe, settings(folder, square=True, filters=filters), tmp_path)
    used = {name for position in range(0, 60, 4) for name in data.batch(position, 4).ids}
    report = data.report()
    # 60 px: 18 of 30 pictures, of which 3 go by the later filter too; 7 says 64 px and has 32
    assert report["filtered"] == {"min_side": 19, "no_aesthetic_score": 0, "min_aesthetic": 2, "min_sharpness": 2}
    assert report["used"] == len(used) == 30 - 19 - 2 - 2
    with pytest.raises(InputError, match=r"no sample is left of 30 \(min_side takes 30\)"):
        data_of(pipe, settings(folder, filters=Filters(min_side=500)), tmp_path)
    blurred = settings(folder, square=True, filters=Filters(min_sharpness=1e9))
    with pytest.raises(InputError, match="no usable image is left in bucket 64x64"):
        data_of(pipe, blurred, tmp_path).batch(0, 4)


def test_objects_are_cut_with_their_picture(pipe: Any, tmp_path: Path) -> None:
    def add(i: int, record: dict[str, Any]) -> None:
        width, height = SIZES[i % len(SIZES)]
        middle = [width / 2 - 20, height / 2 - 10, width / 2 + 20, height / 2 - 10,
                  width / 2 + 20, height / 2 + 10, width / 2 - 20, height / 2 + 10]  # fmt: skip
        outside = [0, 0, 3, 0, 3, 3, 0, 3]
        record["objects"] = [
            {"category_id": 17, "bbox": [0, 0, 1, 1], "segmentation": [middle]},
            {"category_id": 3, "segmentation": [outside]},
            {"category_id": 1, "iscrowd": 1, "segmentation": {"size": [1, 1], "counts": [1]}},
        ]

    folder = write_folder(tmp_path / "data", 10, change=add)
    data = data_of(pipe, settings(folder, square=True), tmp_path)
    assert data.has_instances
    batch = data.batch(0, 10)
    assert batch.instances is not None
    for name, found in zip(batch.ids, batch.instances, strict=True):
        width, height = SIZES[int(name[:3]) % len(SIZES)]
        scale = 64 / min(width, height)
        half_width, half_height = min(20 * scale, 32), 10 * scale
        assert found.labels[0] == 17
        assert (3 in found.labels) == (abs(width - height) < 5)  # else that corner is cut off
        box = [32 - half_width, 32 - half_height, 32 + half_width, 32 + half_height]
        assert found.boxes[0].tolist() == pytest.approx(box, abs=1.6)
        assert found.masks.shape[1:] == (64, 64)


# tar shards


def write_shard(path: Path, samples: Sequence[dict[str, bytes]], first: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, sample in enumerate(samples, first):
            for suffix, content in sample.items():
                info = tarfile.TarInfo(f"{i:09d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def sample(i: int, **record: Any) -> dict[str, bytes]:
    """A sample as img2dataset writes it."""
    size = SIZES[i % len(SIZES)]
    record = {"caption": f"a fox {i}", "width": size[0], "height": size[1], "key": f"{i:09d}", **record}
    return {"png": png(size, i), "txt": record["caption"].encode(), "json": json.dumps(record).encode()}


def test_shards_by_pattern_are_read_at_their_offsets(sdxl: Any, tmp_path: Path) -> None:
    for k in range(3):
        write_shard(
            tmp_path / f"shards/{k:03d}.tar", [sample(i, AESTHETIC_SCORE=i / 2) for i in range(8 * k, 8 * k + 8)]
        )
    pattern = str(tmp_path / "shards/{000..002}.tar")
    source = open_source(pattern, cache=tmp_path / "cache")
    assert isinstance(source, TarShards)
    assert len(source.catalogue) == 24
    for i in (0, 7, 8, 23):
        assert (np.asarray(source.image(i)) == np.asarray(Image.open(io.BytesIO(png(SIZES[i % 5], i))))).all()
        assert source.catalogue.captions[i] == f"a fox {i}"
    assert source.catalogue.numbers("aesthetic").tolist() == [i / 2 for i in range(24)]
    for other in (str(tmp_path / "shards/*.tar"), str(tmp_path / "shards")):
        assert list(open_source(other).catalogue) == list(source.catalogue)
    data = data_of(sdxl, settings(Path(pattern), filters=Filters(min_aesthetic=2)), tmp_path / "cache")
    assert data.report()["filtered"]["min_aesthetic"] == 5
    assert data.batch(0, 4).latents.isfinite().all()


def test_a_shard_s_index_is_made_once_and_anew_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill.sources import webdataset

    shard = write_shard(tmp_path / "a.tar", [sample(i, aesthetic=5) for i in range(3)])
    first = TarShards(str(shard), tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(webdataset, "_index", lambda *_: pytest.fail("indexed again"))
        again = TarShards(str(shard), tmp_path / "cache")
    assert list(again.catalogue) == list(first.catalogue)
    assert again.fingerprint == first.fingerprint
    assert (np.asarray(again.image(2)) == np.asarray(first.image(2))).all()
    write_shard(shard, [sample(i) for i in range(4)])
    changed = TarShards(str(shard), tmp_path / "cache")
    assert len(changed.catalogue) == 4
    assert changed.fingerprint != first.fingerprint


def test_sizes_come_from_the_header_where_the_metadata_are_silent(tmp_path: Path) -> None:
    bare = [{"png": png((30, 20), 1), "txt": b"a fox"}, {"webp.png": b"x", "png": png((9, 8), 1), "txt": b"b"}]
    rows = list(TarShards(str(write_shard(tmp_path / "a.tar", bare))).catalogue)
    assert (rows[0].width, rows[0].height, rows[0].id) == (30, 20, "a.tar:000000000")


def test_members_that_are_missing_or_broken_are_named(tmp_path: Path) -> None:
    samples = [sample(0), sample(1), sample(2), sample(3)]
    del samples[1]["png"]
    samples[2]["json"] = b"{"
    samples[3] = {"png": b"junk", "txt": b"a fox"}
    found = TarShards(str(write_shard(tmp_path / "a.tar", samples))).catalogue
    assert found.broken == {
        1: "no image",
        2: "its metadata are not JSON",
        3: "unreadable image: no known image format",
    }


@pytest.mark.parametrize("cut", ["inside an image", "between members", "inside a header", "to nothing"])
def test_a_truncated_shard_is_one_clear_error(tmp_path: Path, cut: str) -> None:
    shard = write_shard(tmp_path / "a.tar", [sample(i) for i in range(3)])
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
    last = members[-1]
    end = {
        "inside an image": members[3].offset_data + 100,
        "between members": last.offset,
        "inside a header": last.offset + 100,
        "to nothing": 0,
    }[cut]
    shard.write_bytes(shard.read_bytes()[:end])
    with pytest.raises(InputError, match=r"shard .*a\.tar (is truncated|is empty).*fetch it again") as error:
        TarShards(str(shard))
    assert "\n" not in str(error.value)


def test_missing_and_foreign_shards_are_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "00.tar", [sample(0)])
    with pytest.raises(InputError, match=r"2 of 3 shards are missing, the first is .*01\.tar"):
        TarShards(str(tmp_path / "{00..02}.tar"))
    with pytest.raises(InputError, match="names no shard"):
        TarShards(str(tmp_path / "x*.tar"))
    with pytest.raises(InputError, match="holds no image"):
        TarShards(str(write_shard(tmp_path / "b.tar", [{"txt": b"a"}])))
    (tmp_path / "c.tar").write_bytes(b"\x1f\x8b not a tar" * 100)
    with pytest.raises(InputError, match=r"c\.tar is truncated or no plain tar file"):
        TarShards(str(tmp_path / "c.tar"))


# other sources


def test_hugging_face_folders(sdxl: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {
        "picture": [{"bytes": png(SIZES[i % 5], i), "path": None} for i in range(10)],
        "text": [f"a fox {i}" for i in range(10)],
        "aesthetic": [float(i) for i in range(10)],
    }
    features = datasets.Features(
        {"picture": datasets.Image(), "text": datasets.Value("string"), "aesthetic": datasets.Value("float32")}
    )
    made = datasets.Dataset.from_dict(rows, features=features)
    made.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "parquet").mkdir()
    made.to_parquet(str(tmp_path / "parquet/0.parquet"))
    for folder in ("saved", "parquet"):
        name = str(tmp_path / folder)
        source = open_source(name, image_column="picture", cache=tmp_path / "cache")
        assert [row.caption for row in source.catalogue] == rows["text"]
        assert [(row.width, row.height) for row in source.catalogue] == [SIZES[i % 5] for i in range(10)]
        assert (np.asarray(source.image(3)) == np.asarray(Image.open(io.BytesIO(png(SIZES[3], 3))))).all()
        assert open_source(name, image_column="picture").fingerprint == source.fingerprint
        with pytest.raises(InputError, match=r"unknown image column 'pictur'.*did you mean 'picture'"):
            open_source(name, image_column="pictur")
    assert not open_source(name).has_images  # no column of a usual name: its captions are prompts
    data = data_of(sdxl, settings(Path(name), image_column="picture"), tmp_path)
    assert data.batch(0, 4).latents.shape[0] == 4


def test_a_hub_id_without_the_extra_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'hypersd-bench\[data\]'"):
        open_source("someone/something")


def test_prompts_alone(pipe: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a fox\na pizza\n\na panda\n")
    data = data_of(pipe, settings(tmp_path / "prompts.txt", cache_prompts=True), tmp_path)
    assert not data.has_images
    batch = data.batch(1, 4)
    assert batch.z0 is None
    assert batch.latent_shape == (4, 8, 8)
    assert sorted(data.batch(0, 3).prompts) == ["a fox", "a panda", "a pizza"]
    expected = Encoder(pipe).prompts(batch.prompts).text.bfloat16().float()
    assert torch.equal(batch.cond.text, expected)
    if batch.cond.time_ids is not None:
        assert batch.cond.time_ids.tolist() == [[64, 64, 0, 0, 64, 64]] * 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scnes", "unknown data source 'scnes'; did you mean 'scenes'"),
        ("nowhere/at/all", "no such file or folder; give 'scenes', tar shards"),
        ("{folder}", "the folder holds no metadata.jsonl, no tar shards and no parquet files"),
        ("{folder}/a.zip", "a .zip file is no data source"),
    ],
)
def test_what_is_no_source_is_said(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(InputError, match=message):
        open_source(name.format(folder=tmp_path))


@pytest.mark.skipif(not PACKS.is_dir(), reason="the photographs lie beside a full checkout only")
def test_real_photographs(sdxl: Any, tmp_path: Path) -> None:
    with tarfile.open(PACKS / "clothing64_cc0.tar") as pack:
        content = pack.extractfile("captions.json")
        assert content is not None
        captions = json.load(content)[:40]
        photos = [pack.extractfile(f"{i:06d}.webp").read() for i in range(40)]  # type: ignore[union-attr]
    shard = [{"webp": photo, "txt": text.encode()} for photo, text in zip(photos, captions, strict=True)]
    write_shard(tmp_path / "0.tar", shard)
    asked = settings(tmp_path / "0.tar", square=True, filters=Filters(min_side=64, min_sharpness=1000))
    data = data_of(sdxl, asked, tmp_path)
    seen = {name for position in range(0, 80, 8) for name in data.batch(position, 8).ids}
    report = data.report()
    assert report["broken"]["count"] == 0
    assert 0 < report["filtered"]["min_sharpness"] < 40
    assert len(seen) == report["used"] == 40 - report["filtered"]["min_sharpness"]


# caches


def test_cached_data_are_the_same_data(pipe: Any, tmp_path: Path) -> None:
    def spoil(i: int, record: dict[str, Any]) -> None:
        if i == 3:
            record["bytes"] = record["bytes"][:400]
        if i == 12:
            record["bytes"] = png((64, 64), i, flat=True)

    folder = write_folder(tmp_path / "data", change=spoil)
    plain = settings(folder, filters=Filters(min_sharpness=50), max_broken=0.1)
    cached = replace(plain, cache_latents=True, cache_prompts=True, cache_precision="fp16")
    a, b = data_of(pipe, plain, tmp_path / "none"), data_of(pipe, cached, tmp_path / "cache")
    assert b.report()["filtered"]["min_sharpness"] == 1  # all are known once the cache is built
    assert b.report()["broken"]["count"] == 1
    again = data_of(pipe, cached, tmp_path / "cache")
    assert again.report() == b.report()
    for position in range(0, 60, 4):
        x, y = a.batch(position, 4), b.batch(position, 4)
        assert (x.ids, x.prompts) == (y.ids, y.prompts)
        torch.testing.assert_close(x.latents.half().float(), y.latents, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(x.cond.text.half().float(), y.cond.text, atol=1e-3, rtol=1e-3)
        if x.cond.time_ids is not None:
            assert y.cond.time_ids is not None
            assert torch.equal(x.cond.time_ids, y.cond.time_ids)
        assert same(y, again.batch(position, 4))


def test_predicted_sizes_are_the_real_ones(pipe: Any, bases: dict[str, Path], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", 300, change=lambda i, record: record.update(text=f"a fox {i}"))
    data_of(pipe, settings(folder, square=True, cache_latents=True, cache_prompts=True), tmp_path / "cache")
    shape = find_architecture(str(bases["sdxl" if Encoder(pipe).sdxl else "sd"])).encoded(0)
    predicted = predicted_bytes(300, 300, shape)
    for kind, expected in (("latents", predicted.latents), ("prompts", predicted.prompts)):
        real = sum(path.stat().st_size for path in (tmp_path / "cache").glob(f"{kind}-*/*.safetensors"))
        assert real == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"resolution": 128}, "its resolution is 64, not 128"),
        ({"filters": Filters(min_side=60)}, "its min side is unset, not 60"),
        ({"cache_precision": "fp16"}, "its precision is bf16, not fp16"),
    ],
)
def test_a_stale_cache_is_refused_with_the_reason(
    sdxl: Any, tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    asked = settings(write_folder(tmp_path / "data", 5), square=True, cache_latents=True)
    data_of(sdxl, asked, tmp_path / "cache")
    with pytest.raises(InputError, match=f"latents cache in .* is stale: {reason}; give another cache folder") as error:
        data_of(sdxl, replace(asked, **options), tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_a_cache_of_another_model_or_other_data_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    pipe: Any = load_base(str(bases["sdxl"]))
    folder = write_folder(tmp_path / "data", 5)
    asked = settings(folder, square=True, cache_latents=True, cache_prompts=True)
    data_of(pipe, asked, tmp_path / "cache")
    with torch.no_grad():
        pipe.text_encoder_2.text_projection.weight[0, 0] += 1
    with pytest.raises(InputError, match=r"prompts cache in .* is stale: its text encoders is"):
        data_of(pipe, asked, tmp_path / "cache")
    with torch.no_grad():
        next(pipe.vae.parameters()).view(-1)[0] += 1
    with pytest.raises(InputError, match=r"latents cache in .* is stale: its autoencoder is"):
        data_of(pipe, asked, tmp_path / "cache")
    write_folder(folder, 6)
    with pytest.raises(InputError, match="its source is"):
        data_of(load_base(str(bases["sdxl"])), asked, tmp_path / "cache")


def test_a_build_that_was_stopped_goes_on(sdxl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = settings(write_folder(tmp_path / "data"), cache_latents=True, workers=1)
    whole = data_of(sdxl, asked, tmp_path / "whole")
    decoded: list[int] = []
    image = ImageFolder.image

    def stopping(self: ImageFolder, index: int) -> Image.Image:
        if len(decoded) == 17:
            raise KeyboardInterrupt
        decoded.append(index)
        return image(self, index)

    monkeypatch.setattr(ImageFolder, "image", stopping)
    with pytest.raises(KeyboardInterrupt):
        data_of(sdxl, asked, tmp_path / "cache")
    done = {int(i) for path in (tmp_path / "cache").glob("*/*.safetensors") for i in load_file(path)["index"]}
    assert 0 < len(done) < 17
    first, decoded[:] = set(decoded), []

    def noting(self: ImageFolder, index: int) -> Image.Image:
        decoded.append(index)
        return image(self, index)

    monkeypatch.setattr(ImageFolder, "image", noting)
    resumed = data_of(sdxl, asked, tmp_path / "cache")
    assert set(decoded) == set(range(30)) - done
    assert first >= done
    assert all(same(resumed.batch(p, 4), whole.batch(p, 4)) for p in range(0, 32, 4))
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path, "latents", {"source": "x"})
    folder.write("a", {"index": torch.arange(100)})
    folder.file("a").write_bytes(folder.file("a").read_bytes()[:-50])
    with pytest.raises(InputError, match=r"cache shard .*a\.safetensors is damaged; delete it"):
        CacheFolder(tmp_path, "latents", {"source": "x"}).tensor("a", "index")


# prefetching


class Recorded:
    """Training data that note what is loaded, and fail at one position."""

    latent_shape = (4, 8, 8)
    has_images = has_instances = False

    def __init__(self, broken_at: int = -1) -> None:
        self.loaded: list[int] = []
        self.threads: set[int] = set()
        self._broken_at = broken_at

    def load(self, position: int, size: int) -> Loaded:
        if position == self._broken_at:
            raise InputError(f"broken at {position}")
        self.loaded.append(position)
        self.threads.add(threading.get_ident())
        return Loaded([str(position + i) for i in range(size)], [""] * size, torch.zeros(size, 6))

    def finish(self, loaded: Loaded) -> Batch:
        nothing = Condition(torch.zeros(1, 1, 1))
        return Batch(None, nothing, nothing, loaded.prompts, loaded.ids, self.latent_shape)

    def batch(self, position: int, size: int) -> Batch:
        return self.finish(self.load(position, size))

    def report(self) -> dict[str, Any]:
        return {}


def test_prefetching_changes_nothing(pipe: Any, tmp_path: Path) -> None:
    data = data_of(pipe, settings(write_folder(tmp_path / "data"), crop="random"), tmp_path)
    with Prefetch(data, ahead=3) as ahead:
        assert ahead.latent_shape == data.latent_shape
        for position in (0, 4, 8, 12, 40, 44, 0, 16, 32, 48):
            assert same(ahead.batch(position, 4), data.batch(position, 4))
        assert ahead.report() == data.report()


def test_the_next_batches_are_ready_before_they_are_asked_for() -> None:
    data = Recorded()
    with Prefetch(data, ahead=2) as ahead:
        for position in (0, 8, 16):  # the first of two processes
            assert ahead.batch(position, 4).ids == [str(position + i) for i in range(4)]
        ahead._pending[32, 4].result(timeout=10)
        assert {24, 32} <= set(data.loaded)
        loaded = len(data.loaded)
        assert ahead.batch(24, 4).ids[0] == "24"
        assert data.loaded[:loaded].count(24) == 1
        assert data.loaded.count(24) == 1
    assert threading.get_ident() not in data.threads


def test_an_error_is_raised_at_its_own_step_and_the_thread_ends() -> None:
    before = threading.active_count()
    with Prefetch(Recorded(broken_at=8), ahead=3) as ahead:
        assert ahead.batch(0, 4).ids[0] == "0"
        assert ahead.batch(4, 4).ids[0] == "4"
        with pytest.raises(InputError, match="broken at 8"):
            ahead.batch(8, 4)
        assert ahead.batch(12, 4).ids[0] == "12"
    assert threading.active_count() == before
