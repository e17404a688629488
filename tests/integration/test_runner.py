"""A whole benchmark run on a tiny random base: same noise, resumable, nothing silently dropped."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from hypersd_bench.bench import Bench
from hypersd_bench.catalog.spec import ModelSpec
from hypersd_bench.errors import InputError
from hypersd_bench.pipelines import load_base, sample
from hypersd_bench.runner.benchmark import run_benchmark
from hypersd_bench.runner.export import tables
from hypersd_bench.runner.maker import find_defect
from hypersd_bench.runner.manifest import manifest
from hypersd_bench.runner.plan import Plan, make_plan
from hypersd_bench.runner.score import score_run
from hypersd_bench.runner.spec import load_spec
from hypersd_bench.sampling import SamplerContract, ddim_trailing, euler_trailing, lcm, tcd
from hypersd_bench.seeding import generators, starting_noise
from tests.tiny_base import make_tiny_base
from tests.tiny_lora import make_lora
from tests.tiny_sdxl import make_tiny_sdxl

PROMPTS = ["a fox on a blue background", "a car left of a tree on a pink background", "a pizza on a gray background"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lora(base, tmp_path_factory.mktemp("lora") / "random.safetensors", lcm((1, 2, 4)))


def plan_for(base: Path, folder: Path, **changes: object) -> Plan:
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    raw: dict[str, object] = {
        "base": str(base),
        "models": ["teacher"],
        "steps": [1, 2],
        "prompts": "prompts.txt",
        "replicates": 2,
        "timing": {"repeats": 2, "warmup": 0, "rounds": 1, "throughput": False},
    }
    spec = load_spec(None, raw | changes)
    untimed = "timing" in changes and changes["timing"] is None
    return make_plan(spec.model_copy(update={"timing": None}) if untimed else spec, folder)


@pytest.mark.usefixtures("toy_metrics")
def test_a_run_from_spec_to_tables(base: Path, lora: Path, tmp_path: Path) -> None:
    metrics = ["toy/brightness", "toy/colour", "toy/absent"]
    plan = plan_for(base, tmp_path, models=["teacher@2", str(lora)], metrics=metrics, batch_size=4)
    store, failed = run_benchmark(plan, tmp_path / "run", "cpu")
    assert failed == {"toy/absent": "its weights are not here; put them there"}
    images = store.images()
    assert len(images) == plan.num_images == 3 * 3 * 2
    assert {(row.model, row.steps) for row in images} == {("teacher", 2), ("random", 1), ("random", 2)}
    for row in images:
        pixels = np.asarray(Image.open(store.folder / row.file))
        assert pixels.shape == (64, 64, 3)
        assert store.scores("toy/brightness")[row.id].value == pytest.approx(pixels.mean())  # type: ignore[index]
    assert {row.reason for row in store.scores("toy/absent").values()} == set(failed.values())
    assert len(store.set_scores()) == 3
    assert {row.stage for row in store.timings()} == {"text", "unet", "denoise", "decode", "total"}
    frame = tables(store)["images"]
    assert frame["toy/absent"].isna().all()
    assert not frame["toy/brightness"].isna().any()
    manifest = json.loads((store.folder / "run.json").read_text())
    assert manifest["models"][1]["contracts"]["1"]["scheduler"] == "LCMScheduler"
    assert len(manifest["models"][1]["checkpoints"]["1"]["sha256"]) == 64


@pytest.mark.usefixtures("toy_metrics")
def test_metrics_of_prompts_and_pairs_see_the_right_images(base: Path, lora: Path, tmp_path: Path) -> None:
    metrics = ["toy/spread", "toy/darker"]
    models = ["teacher@2,4", str(lora)]
    plan = plan_for(base, tmp_path, models=models, metrics=metrics, timing=None, replicates=3)
    store, failed = run_benchmark(plan, tmp_path / "run", "cpu")
    assert failed == {}
    level = {row.key: np.asarray(Image.open(store.folder / row.file)).mean() for row in store.images()}
    spread, darker = store.scores("toy/spread"), store.scores("toy/darker")
    assert len(spread) == len(darker) == len(level) == 4 * 3 * 3
    for row in store.images():
        group = [value for key, value in level.items() if key[:3] == row.key[:3]]
        assert len(group) == 3
        assert spread[row.id].value == pytest.approx(abs(level[row.key] - np.mean(group)))  # type: ignore[index]
        score = darker[row.id]  # type: ignore[index]
        if (row.model, row.steps) == ("teacher", 4):
            assert (score.value, score.reason) == (None, "it is the teacher's own")
        else:
            assert score.value == pytest.approx(level["teacher", 4, *row.key[2:]] - level[row.key])
    assert not tables(store)["images"]["toy/spread"].isna().any()


@pytest.mark.usefixtures("toy_metrics")
def test_what_cannot_be_compared_is_missing_with_its_reason(base: Path, lora: Path, tmp_path: Path) -> None:
    """Defects made by hand: of 2 images of a prompt one is black, so the other has nobody to differ from."""
    plan = plan_for(base, tmp_path, models=["teacher@2", str(lora)], steps=[2], timing=None)
    store, _ = run_benchmark(plan, tmp_path / "run", "cpu")
    group = ("teacher", 2, plan.prompts.prompts[0].id)
    first = [row.id for row in store.images() if row.key[:3] == group]
    with sqlite3.connect(store.folder / "ledger.sqlite") as db:
        db.execute("UPDATE image SET defect = 'black' WHERE id = ?", (first[0],))
    db.close()
    score_run(store, ["toy/spread", "toy/darker"], "cpu", None)
    spread, darker = store.scores("toy/spread"), store.scores("toy/darker")
    assert (spread[first[0]].value, spread[first[0]].reason) == (None, "image is black")  # type: ignore[index]
    assert (spread[first[1]].value, spread[first[1]].reason) == (None, "no other sound image of its prompt")  # type: ignore[index]
    assert sum(row.value is None for row in spread.values()) == 2
    lost = [row for row in darker.values() if row.reason == "no sound image of the teacher"]
    assert len(lost) == 1
    with sqlite3.connect(store.folder / "ledger.sqlite") as db:  # as after a run that goes on: a group has grown
        db.execute("UPDATE image SET defect = '' WHERE id = ?", (first[0],))
    db.close()
    score_run(store, ["toy/spread", "toy/darker"], "cpu", None)
    assert all(row.value is not None for row in store.scores("toy/spread").values())
    assert store.scores("toy/darker")[lost[0].image_id].value is not None


@pytest.mark.usefixtures("toy_metrics")
def test_one_image_per_prompt_and_no_teacher_are_reasons_not_zeros(base: Path, lora: Path, tmp_path: Path) -> None:
    metrics = ["toy/spread", "toy/darker"]
    plan = plan_for(base, tmp_path, models=[str(lora)], metrics=metrics, replicates=1, timing=None)
    store, _ = run_benchmark(plan, tmp_path / "run", "cpu")
    for metric, reason in zip(metrics, ("one image per prompt", "the run has no teacher"), strict=True):
        rows = store.scores(metric).values()
        assert len(rows) == plan.num_images
        assert {(row.value, row.reason) for row in rows} == {(None, reason)}


def test_a_card_says_what_its_lora_was_trained_on(base: Path, tmp_path: Path) -> None:
    card = {"method": "hyper-sd", "preset": "pocket", "trained_on": ["toy/brightness", "clip-score"]}
    file = make_lora(base, tmp_path / "judged.safetensors", lcm((1, 2)), card)
    plan = plan_for(base, tmp_path, models=["teacher", str(file)], timing=None)
    described = manifest(plan, "cpu", tmp_path / "run")["models"]
    assert [entry["trained_on"] for entry in described] == [[], ["clip-score", "toy/brightness"]]
    assert described[1]["notes"] == "judged: distilled by hyper-sd with preset pocket"
    del card["trained_on"]  # cards older than the key
    make_lora(base, file, lcm((1, 2)), card)
    assert plan_for(base, tmp_path, models=[str(file)], timing=None).configurations[0].model.trained_on == ()


@pytest.mark.parametrize("card", [[], {"trained_on": "clip-score"}, {"trained_on": [1]}])
def test_a_broken_card_gets_one_line(base: Path, tmp_path: Path, card: object) -> None:
    file = make_lora(base, tmp_path / "broken.safetensors", lcm((1, 2)), card)
    with pytest.raises(InputError, match=r"broken\.safetensors: .*hypersd_bench\.card.*export it again"):
        plan_for(base, tmp_path, models=[str(file)])


def test_the_pictures_do_not_depend_on_batch_size_or_order(base: Path, tmp_path: Path) -> None:
    one = plan_for(base, tmp_path, timing=None, batch_size=1)
    together = plan_for(base, tmp_path, timing=None, batch_size=64, models=["teacher@2,1"])
    for name, plan in (("one", one), ("all", together)):
        run_benchmark(plan, tmp_path / name, "cpu")
    for path in (tmp_path / "one" / "images").rglob("*.png"):
        other = tmp_path / "all" / path.relative_to(tmp_path / "one")
        a, b = (np.asarray(Image.open(p), int) for p in (path, other))
        assert np.abs(a - b).max() <= 1  # float rounding across batch shapes; the noise itself is the same to the bit


def test_a_second_start_makes_nothing_twice_and_another_spec_is_refused(base: Path, tmp_path: Path) -> None:
    plan = plan_for(base, tmp_path, timing=None)
    store, _ = run_benchmark(plan, tmp_path / "run", "cpu")
    gone = store.images()[3]
    (store.folder / gone.file).unlink()
    times = {row.file: (store.folder / row.file).stat().st_mtime_ns for row in store.images() if row != gone}
    again, _ = run_benchmark(plan, tmp_path / "run", "cpu")
    assert {file: (store.folder / file).stat().st_mtime_ns for file in times} == times
    assert (store.folder / gone.file).exists()
    assert again.images() == store.images()
    with pytest.raises(InputError, match="another spec"):
        run_benchmark(plan_for(base, tmp_path, timing=None, seed=1), tmp_path / "run", "cpu")


@pytest.mark.parametrize(
    "contract",
    [ddim_trailing((4,), 3.0), ddim_trailing((4,)), euler_trailing((4,)), lcm((4,)), tcd((4,))],
    ids=["guided", "ddim", "euler", "lcm", "tcd"],
)
def test_sampling_equals_the_diffusers_pipeline(base: Path, contract: SamplerContract) -> None:
    pipe = load_base(str(base))
    ours = sample(pipe, contract, 4, PROMPTS[:2], [1, 2]).permute(0, 2, 3, 1).float() / 255
    scheduler_config = pipe.scheduler.config
    pipe.scheduler = contract.make_scheduler(scheduler_config)
    eta = {"eta": contract.eta} if contract.eta is not None else {}
    theirs = pipe(PROMPTS[:2], num_inference_steps=4, guidance_scale=contract.guidance_scale, height=64, width=64,
                  generator=generators([1, 2]), output_type="np", **eta).images  # fmt: skip
    assert np.abs(ours.numpy() - theirs).max() <= 1.01 / 255


def test_a_lora_changes_the_pictures_and_leaves_the_base_as_it_was(base: Path, lora: Path) -> None:
    bench = Bench()
    contract = lcm((2,))
    before = sample(bench.base(str(base)), contract, 2, PROMPTS, [1, 2, 3])
    weights = {name: weight.clone() for name, weight in bench.base(str(base)).unet.state_dict().items()}
    model = ModelSpec("random", "random", str(base), "lora", contract, weights=lora)
    fused = sample(bench.seat(model, str(base)), contract, 2, PROMPTS, [1, 2, 3])
    after = bench.base(str(base))
    assert all(torch.equal(weight, weights[name]) for name, weight in after.unet.state_dict().items())
    assert after.unet.state_dict().keys() == weights.keys()
    assert torch.equal(sample(after, contract, 2, PROMPTS, [1, 2, 3]), before)
    assert not torch.equal(fused, before)
    plain = load_base(str(base))  # the LoRA applied, not fused, as a user of diffusers would
    plain.load_lora_weights(lora.parent, weight_name=lora.name)
    assert (sample(plain, contract, 2, PROMPTS, [1, 2, 3]).int() - fused.int()).abs().max() <= 1


def test_defects_are_named() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    assert find_defect(picture) == ""
    assert find_defect(picture * 0) == "black"
    assert find_defect(picture * 0 + 128) == "constant"
    assert find_defect(picture, finite=False) == "non-finite"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ["techer"]}, "did you mean 'teacher'"),
        ({"models": ["teacher@3"]}, "can't be sampled in 3 steps"),
        ({"models": ["teacher"], "metrics": ["clip-score/poket"]}, "did you mean 'clip-score/pocket'"),
        ({"models": ["teacher"], "baseline": "lcn"}, "unknown baseline"),
        ({"models": ["no/where.safetensors"]}, "no file or folder"),
        ({"models": ["teacher", "teacher"]}, "named twice"),
    ],
)
def test_bad_plans_get_one_line(base: Path, tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_for(base, tmp_path, **change)


def test_a_broken_base_or_lora_is_named_before_anything_is_made(base: Path, lora: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "base"
    shutil.copytree(base, broken)
    unet = broken / "unet" / "diffusion_pytorch_model.safetensors"
    unet.write_bytes(unet.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated"):
        plan_for(broken, tmp_path)
    shutil.rmtree(broken / "unet")
    with pytest.raises(InputError, match="lacks unet"):
        plan_for(broken, tmp_path)
    half = tmp_path / "half.safetensors"
    half.write_bytes(lora.read_bytes()[:-10])
    with pytest.raises(InputError, match="truncated"):
        plan_for(base, tmp_path, models=[str(half)])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("make_base", [make_tiny_base, make_tiny_sdxl])
def test_a_negative_prompt_is_what_guidance_leads_away_from(tmp_path: Path, make_base: Callable[[Path], Path]) -> None:
    """The picture of diffusers' own pipeline, called with the same negative prompt from the same noise."""
    base = make_base(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("a fox on a blue background")
    sampler = {"guidance_scale": 5.0, "negative_prompt": "a pizza on a green background"}
    raw = {"base": str(base), "prompts": "prompts.txt", "metrics": [], "timing": False, "steps": [4], "force": True,
           "models": [{"name": "teacher", "sampler": sampler}]}  # fmt: skip
    plan = make_plan(load_spec(None, raw), tmp_path)
    store, _ = run_benchmark(plan, tmp_path / "run", "cpu")
    (row,) = store.images()
    pipe = DiffusionPipeline.from_pretrained(base, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = plan.configurations[0].model.contract.make_scheduler(pipe.scheduler.config)
    size = pipe.unet.config.sample_size
    noise = starting_noise(generators([row.seed]), (pipe.unet.config.in_channels, size, size))
    pictures = [
        pipe(row.prompt, negative_prompt=negative, latents=noise, num_inference_steps=4, guidance_scale=5.0,
             output_type="np").images[0]
        for negative in (sampler["negative_prompt"], None)
    ]  # fmt: skip
    ours = np.asarray(Image.open(store.folder / row.file), np.float64)
    assert np.abs(255 * pictures[0] - ours).max() < 1.01
    assert np.abs(255 * pictures[1] - ours).max() > 1.01


def test_a_negative_prompt_without_guidance_is_refused() -> None:
    raw = {"models": [{"name": "lcm", "sampler": {"negative_prompt": "blurry"}}], "steps": [4]}
    with pytest.raises(InputError, match="a negative prompt needs guidance_scale above 1, not 0"):
        make_plan(load_spec(None, raw))
