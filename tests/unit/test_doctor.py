"""``doctor``: what fires, what does not, and that every finding comes with its remedy."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from packaging.requirements import Requirement

from hypersd_bench.cli.main import main
from hypersd_bench.health import compute, storage, versions
from hypersd_bench.health.finding import Finding
from hypersd_bench.hub import HubStatus
from hypersd_bench.machine import GpuProcess, parse_gpus
from tests.recorded_smi import H100, HOT_A100, LAPTOP

doctor = import_module("hypersd_bench.cli.doctor")  # the module: the package's attribute may be the command
LOCK = Path(__file__).resolve().parents[2] / "requirements.lock"
UP = HubStatus("https://hub.example", offline=False, answers=True, problem="", token="none")


def locked() -> dict[str, str]:
    """The lock's versions for Python 3.12 and newer, under the names that the rules use."""
    pins = (line.partition(" ;")[0].split("==") for line in LOCK.read_text().splitlines() if "==" in line)
    found = {name: pin.strip() for name, pin in pins}
    return {**found, "open_clip_torch": found["open-clip-torch"]}


def fired(**installed: str) -> dict[str, str]:
    """What fires, by name, with its state; an underscore in a package's name stands for a hyphen."""
    have = {name if name == "open_clip_torch" else name.replace("_", "-"): value for name, value in installed.items()}
    return {finding.name: finding.state for finding in versions.examine_rules(versions=have.get)}


# versions


def test_the_lock_deserves_no_note() -> None:
    findings = list(versions.examine_rules(versions=locked().get))
    assert {finding.state for finding in findings} == {"ok"}
    assert {finding.name for finding in findings} == {
        "FID of torchmetrics",
        "CLIPScore of torchmetrics",
        "float images",
        "QuickGELU of open_clip",
    }


@pytest.mark.parametrize(
    ("scipy", "fires"),
    [("1.11.1", False), ("1.11.2", True), ("1.12.0", True), ("1.13.0", False), ("1.17.1", False), ("1.18.0", False)],
)
def test_garbage_of_sqrtm_is_of_its_versions_only(scipy: str, fires: bool) -> None:
    assert fired(scipy=scipy) == ({"sqrtm of scipy": "note"} if fires else {})


@pytest.mark.parametrize("tool", ["pytorch_fid", "clean_fid", "dgm_eval", "pyiqa", "monai"])
def test_scipy_without_disp_breaks_only_the_tools_that_are_there(tool: str) -> None:
    assert fired(**{"scipy": "1.18.1", tool: "0.3.0"}) == {f"FID of {tool.replace('_', '-')}": "note"}
    assert fired(**{"scipy": "1.17.1", tool: "0.3.0"}) == {}


def test_torchmetrics_and_transformers_fire_together_or_not_at_all() -> None:
    assert fired(torchmetrics="1.7.4", transformers="4.27.0") == {}
    assert fired(torchmetrics="1.7.4", transformers="5.0.0") == {
        "CLIPScore of torchmetrics": "ok",
        "float images": "ok",
    }
    assert fired(torchmetrics="1.9.1", transformers="5.0.0") == {"FID of torchmetrics": "ok", "float images": "ok"}
    assert fired(torchmetrics="1.9.0") == {"FID of torchmetrics": "ok"}


def test_tools_that_somebody_added_are_noted() -> None:
    assert fired(imscore="0.1", transformers="4.27.0") == {}
    assert fired(imscore="0.1", transformers="5.1.0")["rewards of imscore"] == "note"
    assert fired(torcheval="0.0.7") == {"FID of torcheval": "note"}


def test_a_finding_says_what_is_there_whom_it_touches_and_who_says_so() -> None:
    (finding,) = versions.examine_rules(versions={"scipy": "1.12.0"}.get)
    for part in ("scipy 1.12.0", "garbage", "here use eigenvalues", "scipy/scipy#20178"):
        assert part in finding.detail
    assert finding.remedy == "pip install 'scipy>=1.14'"


@pytest.mark.parametrize("rule", versions.RULES, ids=lambda rule: rule.name)
def test_every_rule_is_whole(rule: versions.VersionRule) -> None:
    assert all(Requirement(text).name for text in rule.requires)
    assert all((rule.spoils, rule.ours, rule.remedy))
    assert "#" in rule.source


def test_requirements_are_those_of_the_project_without_its_extras() -> None:
    wanted = ["torch>=2.9", "gradio<7,>=6.31", "ray>=2.50; extra == 'ray'", "scipy>=1.14"]
    have = {"torch": "2.15.0+cu132", "gradio": "7.0.1"}
    gradio, scipy = versions.examine_requirements(wanted, have.get)
    assert (gradio.name, gradio.state) == ("gradio", "bad")
    assert gradio.detail.startswith("7.0.1, but this project needs ")
    assert (scipy.name, scipy.state) == ("scipy", "bad")
    assert scipy.detail.startswith("missing")
    assert "pip install 'scipy>=1.14'" in scipy.remedy
    (fine,) = versions.examine_requirements(wanted, {**have, "gradio": "6.40", "scipy": "1.17"}.get)
    assert (fine.state, fine.detail) == ("ok", "all 3 required ones in the versions asked for")


# device


def test_an_idle_gpu_is_fine() -> None:
    (gpu,) = parse_gpus(H100)
    use, clocks = compute.gpu_use("cuda:0", gpu, []), compute.gpu_clocks("cuda:0", gpu)
    assert (use.state, use.detail) == ("ok", "79.2 GiB free, nobody else on it")
    assert clocks.state == "ok"
    assert "SM 345 of 1980 MHz" in clocks.detail
    assert "persistence enabled" in clocks.detail


def test_another_process_on_the_gpu_is_named() -> None:
    (gpu,) = parse_gpus(H100)
    use = compute.gpu_use("cuda:0", gpu, [GpuProcess("00000000:0F:00.0", 4242, "python3")])
    assert use.state == "note"
    assert "python3 (process 4242)" in use.detail
    assert "CUDA_VISIBLE_DEVICES" in use.remedy


@pytest.mark.parametrize(("change", "word"), [({"memory_used_mib": 2048.0}, "2.0 GiB held"),
                                             ({"utilisation_percent": 40.0}, "40 % busy")])  # fmt: skip
def test_somebody_whose_process_is_not_seen_is_seen_by_what_they_hold(change: dict[str, float], word: str) -> None:
    (gpu,) = parse_gpus(H100)
    use = compute.gpu_use("cuda:0", replace(gpu, **change), [])  # type: ignore[arg-type]
    assert use.state == "note"
    assert word in use.detail


def test_slowed_and_limited_gpus_are_noted() -> None:
    (hot,) = parse_gpus(HOT_A100)
    clocks = compute.gpu_clocks("cuda:0", hot)
    assert clocks.state == "note"
    assert "slowed by power cap, thermal slowdown" in clocks.detail
    (cool,) = parse_gpus(H100)
    capped = compute.gpu_clocks("cuda:0", replace(cool, power_limit_w=350.0))
    assert capped.state == "note"
    assert "nvidia-smi -pl 700" in capped.remedy


def test_a_gpu_that_tells_little_is_fine() -> None:
    (gpu,) = parse_gpus(LAPTOP)
    assert compute.gpu_use("cuda:0", gpu, []).state == "ok"
    clocks = compute.gpu_clocks("cuda:0", gpu)
    assert clocks.state == "ok"
    assert "SM ? of ? MHz" in clocks.detail


def test_no_gpu_is_a_note() -> None:
    finding = compute.without_cuda([])
    assert (finding.state, finding.name) == ("note", "device")
    assert "NVIDIA GPU" in finding.remedy


def test_a_gpu_that_torch_cannot_use_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nmore")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    finding = compute.without_cuda(parse_gpus(LAPTOP))
    assert finding.state == "note"
    assert "NVIDIA GeForce MX150 with driver 470.256.02" in finding.detail
    assert finding.detail.endswith("is too old (found version 11040)")
    assert "update the driver" in finding.remedy

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert "built without CUDA" in compute.without_cuda(parse_gpus(LAPTOP)).detail

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "unset CUDA_VISIBLE_DEVICES" in compute.without_cuda(parse_gpus(LAPTOP)).remedy


def test_a_gpu_that_fails_is_a_finding_and_not_asked_further(monkeypatch: pytest.MonkeyPatch) -> None:
    def properties(_: object) -> object:
        raise RuntimeError("CUDA error: no kernel image is available.\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    found = {finding.name: finding for finding in compute.examine_compute()}
    assert set(found) == {"device", "threads", "bf16"}
    assert found["device"].state == "bad"
    assert found["device"].detail.startswith("cuda fails: CUDA error: no kernel image is available (")


def test_a_cuda_machine_is_examined_gpu_by_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    buses = {"cuda:0": 0xC7, "cuda:1": 0x0F}  # torch counts the other way round

    def properties(device: str | int) -> SimpleNamespace:
        bus = buses[device if isinstance(device, str) else f"cuda:{device}"]
        return SimpleNamespace(name="NVIDIA", total_memory=40 * 2**30, pci_domain_id=0, pci_bus_id=bus, pci_device_id=0)

    monkeypatch.setattr(compute, "gpus", lambda: parse_gpus(H100 + HOT_A100))
    monkeypatch.setattr(compute, "gpu_processes", lambda: [GpuProcess("00000000:C7:00.0", 7, "train")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.zeros(*size))
    found = {finding.name: finding for finding in compute.examine_compute()}
    assert found["device"].state == "ok"
    assert "NVIDIA and 1 more, 40 GiB, driver 570.124.06, torch built for CUDA" in found["device"].detail
    assert {name: found[name].state for name in found if name.startswith("cuda")} == {
        "cuda:0 use": "note", "cuda:0 clocks": "note", "cuda:1 use": "ok", "cuda:1 clocks": "ok"}  # fmt: skip

    def no_kernel(*size: int, device: str) -> torch.Tensor:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    monkeypatch.setattr(torch, "ones", no_kernel)
    found = {finding.name: finding for finding in compute.examine_compute()}
    assert found["device"].state == "bad"
    assert "no kernel image" in found["device"].detail
    assert "more" not in found["device"].detail


@pytest.mark.parametrize(("load", "state"), [(0.1, "ok"), (3.5, "note")])
def test_load(load: float, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "getloadavg", lambda: (load, 9.0, 9.0))
    monkeypatch.setattr(compute, "num_cores", lambda: 4)
    finding = compute.examine_load()
    assert finding.state == state
    assert bool(finding.remedy) == (state == "note")


# disk, caches, hub


@pytest.mark.parametrize(("gib", "state"), [(6.0, "ok"), (2.0, "note"), (0.1, "bad")])
def test_disk(gib: float, state: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=int(gib * 2**30)))
    assert storage.examine_disk(tmp_path).state == state


def test_a_folder_that_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert storage.examine_disk(tmp_path).state == "bad"
    cache = storage.hub_cache(tmp_path)
    assert cache.state == "note"
    assert "HF_HOME" in cache.remedy


def test_hub_cache_counts_blobs_once_and_room_for_sdxl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blob = tmp_path / "models--a--b" / "blobs" / "abc"
    link = tmp_path / "models--a--b" / "snapshots" / "1" / "unet.safetensors"
    for path in (blob, link):
        path.parent.mkdir(parents=True)
    with blob.open("wb") as file:
        file.truncate(3 * 2**29)  # sparse
    link.symlink_to(blob)
    for gib, state in ((31, "ok"), (29, "note")):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, gib=gib: SimpleNamespace(free=gib * 2**30))
        finding = storage.hub_cache(tmp_path)
        assert finding.state == state
        assert finding.detail.startswith(f"1.5 GiB in {tmp_path}, {gib}.0 GiB free")


def test_a_cache_that_is_not_there_yet_is_fine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=99 * 2**30))
    assert storage.hub_cache(tmp_path / "not" / "yet").state == "ok"
    assert list(tmp_path.iterdir()) == []  # looking makes nothing


def test_our_own_cache_is_where_its_variable_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_bytes(b"x" * 2**20)
    monkeypatch.setenv("HYPERSD_BENCH_CACHE", str(tmp_path))
    own = next(finding for finding in storage.examine_caches() if finding.name == "own cache")
    assert (own.state, own.detail) == ("ok", f"1 MiB in {tmp_path}")


@pytest.mark.parametrize(
    ("status", "state", "detail", "remedy"),
    [
        (UP, "ok", "https://hub.example answers; no token", ""),
        (replace(UP, token="valid"), "ok", "token valid", ""),
        (replace(UP, token="unchecked"), "ok", "token set", ""),
        (replace(UP, token="refused"), "note", "refuses the token", "HF_TOKEN"),
        (replace(UP, answers=False, problem="timed out"), "note", "does not answer (timed out)", "HF_ENDPOINT"),
        (replace(UP, answers=False, problem="timed out"), "note", "the miniature needs none", "HF_HUB_OFFLINE=1"),
        (replace(UP, offline=True, answers=False), "ok", "offline mode is on", ""),
    ],
)
def test_hub(status: HubStatus, state: str, detail: str, remedy: str) -> None:
    finding = storage.hub_access(status)
    assert finding.state == state
    assert detail in finding.detail
    assert remedy in finding.remedy


def test_a_hub_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "STATUS_TIMEOUT", 0.1)
    monkeypatch.setattr(storage, "hub_status", lambda: time.sleep(5))
    begun = time.monotonic()
    finding = storage.start_hub_check()()
    assert time.monotonic() - begun < 3
    assert (finding.state, "no answer in time" in finding.detail) == ("note", True)


def test_an_endpoint_that_is_no_address_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> HubStatus:
        raise ValueError("unsupported protocol 'htp'")

    monkeypatch.setattr(storage, "hub_status", broken)
    finding = storage.start_hub_check()()
    assert finding.state == "note"
    assert "ValueError: unsupported protocol 'htp'" in finding.detail


# the verb


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let doctor import torch alone, and find a hub, a disk and GPUs as given."""

    def arrange(hub: HubStatus = UP, free_gib: float = 99) -> None:
        monkeypatch.setattr(doctor, "LIBRARIES", ("torch",))
        monkeypatch.setattr(doctor, "own_requirements", lambda: ["torch>=2"])
        monkeypatch.setattr(storage, "hub_status", lambda: hub)
        monkeypatch.setattr(compute, "gpus", list)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=int(free_gib * 2**30)))

    return arrange


def test_json_lists_every_finding_with_its_remedy(
    quick: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    quick(replace(UP, answers=False, problem="timed out"))
    assert main(["doctor", "--json"]) == 0  # no hub and no GPU: notes
    findings = json.loads(capsys.readouterr().out)
    assert all(set(finding) == {"name", "state", "detail", "remedy"} for finding in findings)
    by_name = {finding["name"]: finding for finding in findings}
    assert len(by_name) == len(findings)
    assert {"python", "packages", "torch", "device", "threads", "load", "disk", "hub cache", "own cache", "hub",
            "miniature"} <= set(by_name)  # fmt: skip
    assert by_name["hub"]["state"] == by_name["device"]["state"] == "note"
    assert all(finding["remedy"] for finding in findings if finding["state"] != "ok")


def test_a_remedy_stands_on_its_own_line_below_its_finding(
    quick: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    quick(replace(UP, token="refused"))
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("note  hub "))
    column = lines[at].index("https://hub.example")
    assert lines[at + 1] == f"{'':{column}}remedy: set HF_TOKEN to a valid token, or unset it and run `hf auth logout`"
    below = [line for line in lines if line.startswith(" ")]
    assert len(below) == len([line for line in lines if line.startswith(("note", "bad"))])


def test_what_will_not_work_ends_with_1_and_its_name(
    quick: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    quick(free_gib=0.1)
    assert main(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert err == "error: this machine is not ready: disk\n"
    assert "remedy: free some space" in out


def test_a_library_that_does_not_load_is_bad_and_the_rest_is_still_told(
    quick: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    quick()
    (tmp_path / "broken_library.py").write_text("raise OSError('undefined symbol')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(doctor, "LIBRARIES", ("broken_library",))
    assert main(["doctor", "--json"]) == 1
    by_name = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert by_name["broken_library"]["state"] == "bad"
    assert "OSError: undefined symbol" in by_name["broken_library"]["detail"]
    assert by_name["broken_library"]["remedy"] == "run `make setup` again"
    assert "miniature" in by_name


@pytest.mark.parametrize("name", ["none", "cut"])
def test_a_miniature_that_is_not_whole_is_bad(name: str, tmp_path: Path) -> None:
    if name == "cut":
        whole = next((Path(doctor.WEIGHTS) / "lora" / "tcd").glob("*.safetensors"))
        (tmp_path / "tcd.safetensors").write_bytes(whole.read_bytes()[:-100])
    finding: Finding = doctor._miniature(tmp_path)
    assert finding.state == "bad"
    assert "pocket build" in finding.remedy
