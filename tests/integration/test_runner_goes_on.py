"""A run goes on: longer than it was, after any kill, on less memory; what would no longer be comparable is refused."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hypersd_bench import pipelines
from hypersd_bench.bench import Bench
from hypersd_bench.contracts import MetricInfo
from hypersd_bench.errors import InputError, is_out_of_memory
from hypersd_bench.prompts import Prompt
from hypersd_bench.runner import maker
from hypersd_bench.runner.benchmark import run_benchmark
from hypersd_bench.runner.doubtful import doubtful_images
from hypersd_bench.runner.generate import LocalEngine
from hypersd_bench.runner.maker import ENCODE_BATCH, Embeddings, Job, Maker
from hypersd_bench.runner.memory import power_of_two
from hypersd_bench.runner.plan import Plan, make_plan
from hypersd_bench.runner.spec import Timing, load_spec
from hypersd_bench.runner.timing import Measured, Todo, time_run
from hypersd_bench.sampling import lcm, tcd
from hypersd_bench.seeding import generators, image_seed, starting_noise
from hypersd_bench.store import RunStore, write_json
from tests.tiny_base import make_tiny_base
from tests.tiny_lora import make_lora

PROMPTS = ("a fox", "a car on a blue background", "a pizza left of a tree", "a tree", "a whale and a fox")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


def plan_for(base: Path, folder: Path, prompts: tuple[str, ...] = PROMPTS[:3], **changes: object) -> Plan:
    (folder / "prompts.txt").write_text("\n".join(prompts))
    raw: dict[str, object] = {"base": str(base), "models": ["teacher"], "steps": [1, 2], "prompts": "prompts.txt"}
    return make_plan(load_spec(None, raw | changes).model_copy(update={"timing": None}), folder)


def times(store: RunStore) -> dict[str, int]:
    return {row.file: (store.folder / row.file).stat().st_mtime_ns for row in store.images()}


# longer than it was


def test_a_run_grows_by_prompts_replicates_models_and_steps_and_makes_nothing_again(base: Path, tmp_path: Path) -> None:
    lora = make_lora(base, tmp_path / "mine.safetensors", lcm((1, 2, 4)))
    out = tmp_path / "run"
    store, _ = run_benchmark(plan_for(base, tmp_path), out, "cpu")
    first, identity = times(store), store.manifest["spec_hash"]
    larger = plan_for(base, tmp_path, PROMPTS, models=["teacher", str(lora)], steps=[1, 2, 4], replicates=2)
    store, _ = run_benchmark(larger, out, "cpu")
    grown = times(store)
    assert len(grown) == larger.num_images == 2 * 3 * 5 * 2
    assert {file: grown[file] for file in first} == first
    assert store.manifest["spec_hash"] == identity  # studies and reports know the run by it
    assert [model["steps"] for model in store.manifest["models"]] == [[1, 2, 4], [1, 2, 4]]
    assert store.manifest["prompts"]["count"] == 5
    fresh, _ = run_benchmark(larger, tmp_path / "fresh", "cpu")
    for row in fresh.images():
        a, b = (np.asarray(Image.open(folder / row.file), int) for folder in (out, fresh.folder))
        assert np.abs(a - b).max() <= 1
    run_benchmark(plan_for(base, tmp_path, steps=[2]), out, "cpu")  # less than it has: nothing is lost
    kept = RunStore.open(out)
    assert len(kept.images()) == len(grown)
    assert [model["name"] for model in kept.manifest["models"]] == ["teacher", "mine"]
    assert kept.manifest["prompts"]["count"] == 5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "its seed is 0, not 1"),
        ({"dtype": "bfloat16"}, "teacher@1 was made with another precision"),
        ({"prompts_": ("another", *PROMPTS[1:3])}, "its prompts are prompts.txt, where p00000 is 'a fox'"),
        ({"models": [{"name": "teacher", "sampler": {"guidance_scale": 3.0}}], "force": True}, "another sampler"),
    ],
)
def test_what_would_not_be_comparable_is_refused(
    base: Path, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    run_benchmark(plan_for(base, tmp_path), tmp_path / "run", "cpu")
    before = (tmp_path / "run" / "run.json").read_bytes()
    prompts = changes.pop("prompts_", PROMPTS[:3])
    assert isinstance(prompts, tuple)
    with pytest.raises(InputError, match=said):
        run_benchmark(plan_for(base, tmp_path, prompts, **changes), tmp_path / "run", "cpu")
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_other_weights_under_a_known_name_are_refused(base: Path, tmp_path: Path) -> None:
    lora = make_lora(base, tmp_path / "mine.safetensors", lcm((1, 2)))
    run_benchmark(plan_for(base, tmp_path, models=[str(lora)]), tmp_path / "run", "cpu")
    make_lora(base, lora, lcm((1, 2)), scale=3.0)
    with pytest.raises(InputError, match="mine@1 was made with another weights"):
        run_benchmark(plan_for(base, tmp_path, models=[str(lora)]), tmp_path / "run", "cpu")


def test_a_run_of_another_version_is_refused(base: Path, tmp_path: Path) -> None:
    run_benchmark(plan_for(base, tmp_path), tmp_path / "run", "cpu")
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    del manifest["version"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="run of another version"):
        run_benchmark(plan_for(base, tmp_path), tmp_path / "run", "cpu")


def test_a_forced_breach_is_in_the_manifest(base: Path, tmp_path: Path) -> None:
    lora = make_lora(base, tmp_path / "mine.safetensors", lcm((1, 2)))
    asked = [{"name": "mine", "path": str(lora), "sampler": {"guidance_scale": 7.5}}]
    with pytest.raises(InputError, match=r"guidance_scale 7.5 .*--force"):
        plan_for(base, tmp_path, models=asked)
    store, _ = run_benchmark(plan_for(base, tmp_path, models=asked, force=True), tmp_path / "run", "cpu")
    assert "guidance_scale 7.5" in store.manifest["models"][0]["breaches"][0]
    assert store.manifest["configurations"]["mine@2"]["sampler"]["guidance_scale"] == 7.5
    assert any(note.startswith("mine@1 was forced against its contract") for note in store.manifest["notes"])


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "LCMScheduler", "DPMSolverMultistepScheduler"])
def test_another_scheduler_can_be_forced_and_runs(base: Path, tmp_path: Path, scheduler: str) -> None:
    asked = [{"name": "teacher", "sampler": {"scheduler": scheduler, "guidance_scale": 2.0}}]
    plan = plan_for(base, tmp_path, models=asked, steps=[4], force=True)
    store, _ = run_benchmark(plan, tmp_path / "run", "cpu")
    assert len(store.images()) == plan.num_images
    assert store.manifest["models"][0]["contracts"]["4"]["scheduler"] == scheduler


# after any kill


@pytest.mark.parametrize("moments", [3, pytest.param(50, marks=pytest.mark.nightly)])
def test_kill_9_at_any_moment_and_the_run_ends_as_an_undisturbed_one(base: Path, tmp_path: Path, moments: int) -> None:
    """A process that has loaded everything forks for each trial: a start to kill, and one that goes on to the end."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "kill_trial.py"), str(base), str(tmp_path), str(moments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    trials = json.loads(done.stdout)
    assert len(trials) == moments
    whole = contents(tmp_path / "whole")
    assert len(whole["image"]) == 3 * 5 * 2
    for trial in trials:
        assert contents(Path(trial["run"])) == whole, trial
    assert sum(trial["killed"] for trial in trials) >= moments // 2, trials  # the others ended before the kill
    in_flight = [trial for trial in trials if 0 < trial["images"] < len(whole["image"])]
    assert len(in_flight) >= moments // 4, trials  # not all before the first image or after the last


def contents(run: Path) -> dict[str, list[tuple[object, ...]]]:
    """Everything a ledger holds, but for row ids, and the images' bytes by the hashes in it."""
    with sqlite3.connect(run / "ledger.sqlite") as db:
        images = db.execute("SELECT model, steps, prompt_id, prompt, replicate, seed, file, sha256, checkpoint, defect"
                            " FROM image ORDER BY 1, 2, 3, 5").fetchall()  # fmt: skip
        scores = db.execute("SELECT metric, model, steps, prompt_id, replicate, value, reason FROM score"
                            " JOIN image ON image.id = image_id ORDER BY 1, 2, 3, 4, 5").fetchall()  # fmt: skip
        sets = db.execute("SELECT * FROM set_score ORDER BY 1, 2, 3").fetchall()
    db.close()
    for row in images:
        assert hashlib.sha256((run / row[6]).read_bytes()).hexdigest() == row[7]
    return {"image": images, "score": scores, "set_score": sets}


# noise


def test_noise_is_the_same_to_the_bit_whatever_the_batch_shard_and_order() -> None:
    """Starting noise and what a scheduler draws on the way, by image: alone, in any batch, in any order."""
    seeds = [image_seed(0, f"p{i:05d}", r) for i in range(5) for r in range(2)]

    def drawn(order: list[int], size: int) -> dict[int, Tensor]:
        """Starting noise and two later draws, in batches of a size."""
        found: dict[int, Tensor] = {}
        for i in range(0, len(order), size):
            batch = order[i : i + size]
            gens = generators([seeds[j] for j in batch])
            parts = [starting_noise(gens, (4, 8, 8)) for _ in range(3)]
            found |= {j: torch.stack([part[row] for part in parts]) for row, j in enumerate(batch)}
        return found

    alone = drawn(list(range(10)), 1)
    rng = np.random.default_rng(0)
    for size in (2, 3, 10):
        for order in ([*range(10)], [*range(10)][::-1], rng.permutation(10).tolist()):
            assert all(torch.equal(noise, alone[i]) for i, noise in drawn(order, size).items())
    shards = {**drawn([0, 2, 4, 6, 8], 2), **drawn([1, 3, 5, 7, 9], 5)}
    assert all(torch.equal(shards[i], alone[i]) for i in alone)
    assert len({tuple(noise.flatten()[:4].tolist()) for noise in alone.values()}) == 10


def test_every_model_and_step_count_starts_from_the_same_noise(base: Path, tmp_path: Path) -> None:
    """What the UNet is given first, for LCM, TCD and guided DDIM alike: the noise of the image's seed."""
    loras = [make_lora(base, tmp_path / f"{name}.safetensors", contract((1, 2)))
             for name, contract in (("a", lcm), ("b", tcd))]  # fmt: skip
    plan = plan_for(base, tmp_path, models=["teacher", *map(str, loras)])
    jobs = [Job(prompt, 0) for prompt in plan.prompts.prompts]
    wanted = starting_noise(generators([image_seed(0, job.prompt.id, 0) for job in jobs]), (4, 8, 8))
    with Maker(plan, "cpu") as making:
        for configuration in plan.configurations:
            pipe = making.bench.seat(configuration.model, configuration.pipeline)
            seen: list[Tensor] = []
            hook = pipe.unet.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
            making.pixels(configuration, jobs)
            hook.remove()
            assert torch.equal(seen[0][-3:], wanted), configuration


# what a start keeps


def test_timing_goes_on_where_it_was_killed_and_another_device_measures_anew(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timing = Timing(repeats=4, warmup=0, rounds=2, throughput=False)
    untimed = plan_for(base, tmp_path)
    plan = replace(untimed, spec=untimed.spec.model_copy(update={"timing": timing}))
    store, _ = run_benchmark(untimed, tmp_path / "run", "cpu")
    engine, measured = LocalEngine("cpu"), LocalEngine.timings
    asked: list[Todo] = []

    def cut_off(self: LocalEngine, plan: Plan, todo: Todo) -> Iterator[Measured]:
        asked.append(todo)
        for number, found in enumerate(measured(self, plan, todo)):
            if number == 3 and len(asked) == 1:
                raise KeyboardInterrupt  # both models' first round and one's second are done
            yield found

    monkeypatch.setattr(LocalEngine, "timings", cut_off)
    with pytest.raises(KeyboardInterrupt):
        time_run(plan, store, engine)
    assert sorted(store.manifest["timing"]["rounds"].values()) == [1, 2]
    store = RunStore.open(store.folder)
    time_run(plan, store, engine)
    assert [done for _, done in asked[1]] == [1]
    assert {(row.steps, row.repeat) for row in store.timings()} == {(s, r) for s in (1, 2) for r in range(4)}
    time_run(plan, store, engine)
    assert len(asked) == 2 or asked[2] == []
    monkeypatch.setattr("hypersd_bench.runner.timing.device_name", lambda device: "cuda (another card)")
    time_run(plan, store, engine)
    assert [done for _, done in asked[-1]] == [0, 0]
    starts = len(asked)
    time_run(plan, store, engine, again=True)
    assert [done for _, done in asked[starts]] == [0, 0]
    assert len(store.timings()) == 2 * 4 * 5  # in place of what was there: two step counts, four repeats, five stages


@pytest.mark.nightly
def test_a_compiled_unet_is_timed_and_the_compiling_counted_as_cold_start(base: Path, tmp_path: Path) -> None:
    timing = Timing(repeats=2, warmup=1, rounds=1, throughput=False, compile=True)
    plan = plan_for(base, tmp_path, steps=[1])
    store, _ = run_benchmark(
        replace(plan, spec=plan.spec.model_copy(update={"timing": timing})), tmp_path / "run", "cpu"
    )
    first = next(cost.value for cost in store.costs() if cost.name == "first-image")
    assert first > 3 * max(row.seconds for row in store.timings() if row.stage == "total")
    assert store.manifest["timing"]["settings"]["compile"] is True


def test_later_starts_are_kept_beside_the_first_and_metrics_are_added(base: Path, tmp_path: Path) -> None:
    store, _ = run_benchmark(plan_for(base, tmp_path), tmp_path / "run", "cpu")
    assert "starts" not in store.manifest
    first = store.manifest["provenance"]
    run_benchmark(plan_for(base, tmp_path), tmp_path / "run", "cpu")
    store = RunStore.open(tmp_path / "run")
    assert (store.manifest["provenance"], store.manifest["starts"]) == (first, [])
    store.manifest["provenance"] = {**first, "packages": {**first["packages"], "torch": "2.0.0"}}
    added = MetricInfo("toy/added", "Added", "higher", "rate", "image")
    store.manifest["metrics"] = [asdict(added)]
    write_json(store.folder / "run.json", store.manifest)  # as if made with another torch, and scored by hand
    run_benchmark(plan_for(base, tmp_path), tmp_path / "run", "cpu")
    manifest = RunStore.open(tmp_path / "run").manifest
    assert manifest["provenance"]["packages"]["torch"] == "2.0.0"
    assert [start["packages"]["torch"] for start in manifest["starts"]] == [first["packages"]["torch"]]
    assert [entry["id"] for entry in manifest["metrics"]] == ["toy/added"]


def test_prompts_are_encoded_in_blocks_when_needed_and_alike_whoever_asks(base: Path, tmp_path: Path) -> None:
    prompts = tuple(f"a fox number {i}" for i in range(ENCODE_BATCH + 5))
    listed = plan_for(base, tmp_path, prompts).prompts.prompts
    bench = Bench()
    pipe = bench.base(str(base))
    whole, part = Embeddings(listed), Embeddings(listed)
    together = whole.of(pipe, listed)
    alone = part.of(pipe, listed[-1:])
    assert list(part._blocks) == [1]  # of 69 prompts the last five
    assert torch.equal(alone.text, together.text[-1:])
    assert torch.allclose(together.text, pipelines.encode_prompts(pipe, [p.text for p in listed]).text, atol=1e-5)


# less memory


def test_a_batch_that_does_not_fit_is_halved_and_nothing_lost(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    decode = pipelines.decode_latents

    def small(pipe: pipelines.Pipeline, latents: Tensor) -> Tensor:
        sizes.append(len(latents))
        if len(latents) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return decode(pipe, latents)

    monkeypatch.setattr(maker, "decode_latents", small)
    plan = plan_for(base, tmp_path, PROMPTS, replicates=2, batch_size=8)
    store, _ = run_benchmark(plan, tmp_path / "run", "cpu")
    assert len(store.images()) == plan.num_images == 20
    assert sizes[:3] == [8, 4, 2]
    assert max(sizes[3:]) == 2


def test_one_image_that_does_not_fit_is_one_line_and_the_run_can_go_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> Tensor:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    plan = plan_for(base, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(maker, "sample_latents", full)
        with pytest.raises(InputError, match=r"out of memory making one image of teacher@1 on cpu .* lower --dtype"):
            run_benchmark(plan, tmp_path / "run", "cpu")
    store, _ = run_benchmark(plan, tmp_path / "run", "cpu")
    assert len(store.images()) == plan.num_images


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert [power_of_two(n) for n in (0, 1, 2, 3, 5, 63, 64, 1000)] == [1, 1, 2, 2, 4, 32, 64, 64]


# what is doubtful


def test_defects_and_duplicates_are_counted_by_model(base: Path, tmp_path: Path) -> None:
    store, _ = run_benchmark(plan_for(base, tmp_path, steps=[1], replicates=2), tmp_path / "run", "cpu")
    with sqlite3.connect(store.folder / "ledger.sqlite") as db:
        db.execute("UPDATE image SET sha256 = 'same' WHERE id IN (1, 2, 3)")
        db.execute("UPDATE image SET defect = 'black' WHERE id = 4")
    db.close()
    (row,) = doubtful_images(store.images())
    assert (row.images, row.duplicates, row.defects, row.defective) == (6, 2, {"black": 1}, 1)
    assert row.problems == "1 black, 2 duplicate"


def test_prompts_that_are_cut_are_counted(base: Path, tmp_path: Path) -> None:
    long = "a fox left of a pizza on a blue background " * 30
    store, _ = run_benchmark(plan_for(base, tmp_path, (PROMPTS[0], long)), tmp_path / "run", "cpu")
    cut = store.manifest["prompts"]["truncated"]
    assert (cut["count"], cut["ids"]) == (1, ["p00001"])
    assert Prompt("p00001", " ".join(long.split())) in plan_for(base, tmp_path, (PROMPTS[0], long)).prompts.prompts
