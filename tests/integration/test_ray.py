"""The same plan over Ray workers: the pictures of one process, and nothing lost or doubled when workers die."""

from __future__ import annotations

import os
import platform
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hypersd_bench.errors import InputError
from hypersd_bench.provenance import collect, sha256
from hypersd_bench.runner.benchmark import run_benchmark
from hypersd_bench.runner.generate import LocalEngine, missing
from hypersd_bench.runner.plan import Plan, make_plan
from hypersd_bench.runner.spec import load_spec
from hypersd_bench.sampling import METADATA_KEY, lcm
from hypersd_bench.store import ImageRow, RunStore
from tests.tiny_base import make_tiny_base

ray = pytest.importorskip("ray")

from hypersd_bench.runner.ray_engine import DEATHS, Crew, Hello, RayEngine, share_cores  # noqa: E402

PROMPTS = ["a fox on a blue background", "a car left of a tree on a pink background", "a pizza on a gray background"]
BATCH = 2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two cores of this machine; engines find it and leave it as it is."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield
    ray.shutdown()


def plan_for(base: Path, folder: Path, **changes: object) -> Plan:
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    raw: dict[str, object] = {"base": str(base), "models": ["teacher"], "steps": [1, 2], "prompts": "prompts.txt",
                              "replicates": 4, "batch_size": BATCH}  # fmt: skip
    spec = load_spec(None, raw | changes)
    return make_plan(spec if "timing" in changes else spec.model_copy(update={"timing": None}), folder)


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    folder = tmp_path_factory.mktemp("undisturbed")
    store, _ = run_benchmark(plan_for(base, folder), folder / "run", "cpu")
    return store


def told(row: ImageRow) -> tuple[object, ...]:
    """All of a row but what rounding may change, and its number."""
    return (*row.key, row.prompt, row.seed, row.file, row.checkpoint, row.defect)


def assert_same_run(store: RunStore, other: RunStore) -> None:
    """The same images, each once, within a rounding step: float sums differ between batch shapes."""
    assert [told(row) for row in store.images()] == [told(row) for row in other.images()]
    files = {row.file for row in store.images()}
    assert {str(p.relative_to(store.folder)) for p in store.folder.rglob("*.png")} == files
    for file in files:
        a, b = (np.asarray(Image.open(run.folder / file), int) for run in (store, other))
        assert np.abs(a - b).max() <= 1


def workers_here() -> list[psutil.Process]:
    """The cluster's worker processes that have a Worker of ours in them; Ray names them in their title."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if title.startswith("ray::Worker"):
            found.append(process)
    return found


class Watched(RayEngine):
    """Tells which processes made a run, and kills those that have it after its first images."""

    def __init__(self, kill: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.kill = kill
        self.seen: set[int] = set()
        self.killed: set[int] = set()

    def images(self, plan: Plan, work: Any, folder: Path) -> Iterator[list[ImageRow]]:
        count = 0
        for rows in super().images(plan, work, folder):
            count += len(rows)
            yield rows
            here = workers_here()
            self.seen |= {process.pid for process in here}
            if self.kill and not self.killed:
                assert count < plan.num_images // 2, "there is nothing left to disturb"
                self.killed = {process.pid for process in here}
                for process in here:
                    process.send_signal(signal.SIGKILL)


@pytest.mark.nightly
@pytest.mark.usefixtures("cluster")
def test_a_run_that_one_process_began_is_ended_by_two_workers(
    base: Path, tmp_path: Path, undisturbed: RunStore
) -> None:
    begun = plan_for(base, tmp_path, steps=[1], replicates=2)
    run_benchmark(begun, tmp_path / "run", "cpu", LocalEngine("cpu"))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.png")}
    assert len(times) == begun.num_images == 6
    timing = {"repeats": 2, "warmup": 0, "rounds": 1, "throughput": False}
    engine = Watched(workers=2)
    assert engine.device == "cpu"
    store, _ = run_benchmark(plan_for(base, tmp_path, timing=timing), tmp_path / "run", "cpu", engine)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert_same_run(store, undisturbed)
    assert engine.seen  # both, but on a busy machine, where one may have done it all before the other had started
    assert {(row.steps, row.repeat, row.device) for row in store.timings()} == {
        (steps, repeat, "cpu") for steps in (1, 2) for repeat in (0, 1)
    }
    machine = store.manifest["timing"]["machine"]["teacher@1"]
    assert machine["cpu"]["torch_threads"] == 2  # a worker's, with all of the cluster's cores; here it is 1
    (worker,) = store.manifest["workers"]  # both on this machine
    assert worker["packages"]["torch"] == store.manifest["provenance"]["packages"]["torch"]
    engine.close()
    assert ray.is_initialized()  # not ours to end


@pytest.mark.usefixtures("cluster")
def test_a_worker_killed_midway_is_replaced_and_nothing_is_lost_or_doubled(
    base: Path, tmp_path: Path, undisturbed: RunStore, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = plan_for(base, tmp_path)
    store = RunStore.create(tmp_path / "run", {})
    engine = Watched(kill=True, workers=1)
    rows = [row for rows in engine.images(plan, missing(plan, store), store.folder) for row in rows]
    assert len(engine.killed) == 1
    assert engine.seen - engine.killed  # another one made the rest
    assert len(rows) == len({row.key for row in rows}) == plan.num_images  # before the ledger could sort it out
    store.record_images(rows)
    assert_same_run(store, undisturbed)
    assert "a Ray worker died and is replaced: its worker process has died." in capfd.readouterr().err


@pytest.mark.usefixtures("cluster")
def test_what_does_not_fit_in_a_worker_is_one_line(base: Path, tmp_path: Path) -> None:
    lora = tmp_path / "other.safetensors"
    weight = {f"unet.no.such.layer.lora_{side}.weight": torch.zeros(4, 4) for side in "AB"}
    save_file(weight, lora, {METADATA_KEY: lcm((1,)).to_json()})
    plan = plan_for(base, tmp_path, models=[str(lora)], steps=[1])
    with pytest.raises(InputError, match=rf"other\.safetensors does not fit.* \(on {platform.node()}\)$") as caught:
        run_benchmark(plan, tmp_path / "run", "cpu", RayEngine(workers=1))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.png"))


def test_a_machine_of_other_versions_or_weights_is_refused(base: Path, tmp_path: Path) -> None:
    plan = plan_for(base, tmp_path)
    machine = collect("cpu").to_json()
    unet = str(base / "unet" / "diffusion_pytorch_model.safetensors")
    engine = RayEngine()
    engine._meet(plan, Hello(machine, {unet: sha256(Path(unet))}))
    assert engine.machines() == [machine]
    with pytest.raises(
        InputError, match=r"diffusion_pytorch_model.* \(0000.* is another file than here .*copy it there"
    ):
        engine._meet(plan, Hello(machine, {unet: "0" * 64}))
    other = machine | {"packages": machine["packages"] | {"torch": "2.0.0"}}
    with pytest.raises(InputError, match=r"has torch 2\.0\.0, and this one has .* install the same versions"):
        engine._meet(plan, Hello(other, {}))


def frail(path: Path, chunks: int) -> Any:
    """A worker without a model, quick to start: after so many chunks its process ends, in the middle of the next."""

    class Frail:
        def __init__(self) -> None:
            self.left = chunks

        def hello(self) -> None: ...

        def make(self, configuration: str, jobs: list[int]) -> SimpleNamespace:
            if self.left == 0:
                with path.open("a") as file:
                    file.write("x")
                os._exit(1)
            self.left -= 1
            return SimpleNamespace(images=jobs, batch_size=1)

    return lambda: ray.remote(Frail).options(num_cpus=1).remote()


@pytest.mark.usefixtures("cluster")
def test_workers_that_die_after_every_second_chunk_still_do_all_of_it_once(tmp_path: Path) -> None:
    work: Any = [(configuration_like("a"), range(8)), (configuration_like("b"), range(8, 16))]
    crew = Crew(work, 2, 1, frail(tmp_path / "deaths", 2), print)
    assert sorted(all_of(crew)) == list(range(16))
    assert len((tmp_path / "deaths").read_text()) >= DEATHS


@pytest.mark.usefixtures("cluster")
def test_workers_that_do_nothing_but_die_stop_the_run(tmp_path: Path) -> None:
    work: Any = [(configuration_like("a"), range(8))]
    crew = Crew(work, 1, 1, frail(tmp_path / "deaths", 0), print)
    with pytest.raises(InputError, match=rf"died {DEATHS} times in a row .*worker process has died.* go on$"):
        all_of(crew)
    assert len((tmp_path / "deaths").read_text()) == DEATHS


def configuration_like(pipeline: str) -> SimpleNamespace:
    return SimpleNamespace(pipeline=pipeline, dtype="float32", model="teacher")


def all_of(crew: Crew) -> list[Any]:
    done: list[Any] = []
    try:
        while crew.feed():
            done += crew.next()
    finally:
        crew.dismiss()
    return done


@pytest.mark.usefixtures("cluster")
def test_more_workers_than_the_cluster_has_room_for_are_refused() -> None:
    with pytest.raises(InputError, match="2 CPU cores, too few for 3 workers"):
        next(RayEngine(workers=3).images(None, [], Path()))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="has 0 GPUs"):
        next(RayEngine(device="cuda").images(None, [], Path()))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="'cuda:1'"):
        RayEngine(device="cuda:1")


@pytest.mark.parametrize(
    ("cores", "workers", "shared"),
    [
        ([16, 8], None, (6, 4)),
        ([2], None, (1, 2)),
        ([6, 6], None, (2, 4)),  # a worker is never of two machines
        ([6, 6], 3, (3, 3)),
        ([16], 1, (1, 16)),
        ([2, 2], 4, (4, 1)),
    ],
)
def test_cores_are_shared_among_workers(cores: list[int], workers: int | None, shared: tuple[int, int]) -> None:
    assert share_cores(cores, workers) == shared


def test_no_core_is_no_worker() -> None:
    with pytest.raises(InputError, match="0 CPU cores"):
        share_cores([0], None)


@pytest.mark.parametrize("address", ["closed", "nonsense", "ray://127.0.0.1:10001"])
def test_a_cluster_that_is_not_there_is_one_line(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    if address == "closed":
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(InputError, match=rf"^no Ray cluster answers at {re.escape(address)} \(.*`ray start --head`"):
        print(RayEngine(address).device)
