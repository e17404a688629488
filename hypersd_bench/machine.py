"""What this machine is, and what it is doing right now: all that can change a latency.

GPUs are asked through ``nvidia-smi``, whose answers are parsed here and nowhere else. A value that can't be read is
None, and a machine without the tool has no GPUs.
"""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

_SMI_TIMEOUT_S = 5.0
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")

_TEXTS = {"bus_id": "pci.bus_id", "name": "name", "driver": "driver_version", "persistence": "persistence_mode"}
_NUMBERS = {
    "memory_total_mib": "memory.total",
    "memory_used_mib": "memory.used",
    "memory_free_mib": "memory.free",
    "sm_mhz": "clocks.sm",
    "sm_max_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "memory_max_mhz": "clocks.max.mem",
    "temperature_c": "temperature.gpu",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "power_default_w": "power.default_limit",
    "utilisation_percent": "utilization.gpu",
}
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # the second: drivers before 535
_LIMITS = {  # the bits of NVML's nvmlClocksEventReasons
    0x001: "idle",
    0x002: "application clocks",
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "power brake",
    0x100: "display clocks",
}


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA GPU as its tool sees it; ``limited_by`` says what holds its clocks down now."""

    bus_id: str | None
    name: str | None
    driver: str | None
    persistence: str | None  # Enabled, Disabled
    memory_total_mib: float | None
    memory_used_mib: float | None
    memory_free_mib: float | None
    sm_mhz: float | None
    sm_max_mhz: float | None
    memory_mhz: float | None
    memory_max_mhz: float | None
    temperature_c: float | None
    power_w: float | None
    power_limit_w: float | None
    power_default_w: float | None
    utilisation_percent: float | None
    limited_by: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that computes on a GPU."""

    bus_id: str
    pid: int
    name: str


def machine_state(device: str) -> dict[str, Any]:
    """Record what can change a latency on ``device`` at this moment, in plain JSON values; None: can't be read."""
    frequency = _maybe(psutil.cpu_freq)
    load = _maybe(psutil.getloadavg)
    gpu = _maybe(lambda: gpu_of(device, gpus())) if device.startswith("cuda") else None
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "device": device,
        "cpu": {
            "model": _maybe(cpu_model),
            "cores": _maybe(num_cores),
            "mhz": round(frequency.current) if frequency else None,
            "governor": _maybe(lambda: _GOVERNOR.read_text().strip()),
            "load": [round(value, 2) for value in load] if load else None,  # mean over 1, 5 and 15 minutes
            "torch_threads": _maybe(_torch_threads),
        },
        "gpu": {**asdict(gpu), "limited_by": gpu.limited_by and list(gpu.limited_by)} if gpu else None,
    }


def num_cores() -> int:
    """The cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy_cores(seconds: float = 0.3) -> float:
    """How many cores' worth of work the machine does while this process waits."""
    share: float = psutil.cpu_percent(interval=seconds)
    return share / 100 * (psutil.cpu_count() or 1)


def cpu_model() -> str:
    """The processor's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def gpus() -> list[Gpu]:
    """All NVIDIA GPUs of the machine, torch's or not; empty where there is no ``nvidia-smi`` or it fails."""
    for reasons in _REASONS:
        try:
            return parse_gpus(_nvidia_smi("gpu", [*_TEXTS.values(), *_NUMBERS.values(), reasons]))
        except subprocess.CalledProcessError:  # it refuses the whole question for one field that it does not know
            continue
        except (OSError, subprocess.SubprocessError):
            break
    return []


def gpu_processes() -> list[GpuProcess]:
    """The processes that compute on any GPU; inside a container those of other containers are not seen."""
    try:
        return parse_processes(_nvidia_smi("compute-apps", ["gpu_bus_id", "pid", "process_name"]))
    except (OSError, subprocess.SubprocessError):
        return []


def gpu_of(device: str, among: Iterable[Gpu]) -> Gpu | None:
    """The GPU behind torch's ``cuda`` or ``cuda:1``, which may count in another order; None where it is not among them.

    Raises what torch raises for a device that it does not have.
    """
    import torch

    found: Any = torch.cuda.get_device_properties(device)  # torch's own types lack the address
    address = (found.pci_domain_id, found.pci_bus_id, found.pci_device_id)
    return next((gpu for gpu in among if gpu.bus_id and _address(gpu.bus_id) == address), None)


def gpu_driver() -> str:
    """The NVIDIA driver's version; empty where it can't be told."""
    return next((gpu.driver for gpu in gpus() if gpu.driver), "")


def parse_gpus(answer: str) -> list[Gpu]:
    """Read what ``nvidia-smi --query-gpu`` prints as CSV without headings and units, one GPU a line."""
    columns = [*_TEXTS, *_NUMBERS, "reasons"]
    return [_to_gpu(dict(zip(columns, row, strict=True))) for row in _rows(answer) if len(row) == len(columns)]


def parse_processes(answer: str) -> list[GpuProcess]:
    """Read what ``nvidia-smi --query-compute-apps`` prints as CSV: bus, process id and name a line."""
    return [
        GpuProcess(row[0], int(row[1]), ", ".join(row[2:])) for row in _rows(answer) if row[1:] and row[1].isdecimal()
    ]


def _nvidia_smi(subject: str, columns: list[str]) -> str:
    command = ["nvidia-smi", f"--query-{subject}={','.join(columns)}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, timeout=_SMI_TIMEOUT_S, check=True).stdout


def _rows(answer: str) -> Iterator[list[str]]:
    for row in csv.reader(answer.splitlines(), skipinitialspace=True):
        yield [cell.strip() for cell in row]


def _to_gpu(row: dict[str, str]) -> Gpu:
    values: dict[str, Any] = {name: row[name] if _is_known(row[name]) else None for name in _TEXTS}
    values |= {name: _number(row[name]) for name in _NUMBERS}
    return Gpu(**values, limited_by=_limits(row["reasons"]))


def _is_known(cell: str) -> bool:
    return bool(cell) and cell != "N/A" and not cell.startswith("[")  # [N/A], [Not Supported], [Unknown Error]


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _limits(cell: str) -> tuple[str, ...] | None:
    try:
        bits = int(cell, 16)
    except ValueError:
        return None
    return tuple(name for bit, name in _LIMITS.items() if bits & bit)


def _address(bus_id: str) -> tuple[int, ...]:
    """PCI domain, bus and device of ``00000000:0F:00.0``."""
    return tuple(int(part, 16) for part in bus_id.partition(".")[0].split(":"))


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def _maybe(read: Callable[[], Any]) -> Any:
    """Read a value; None when it can't be read, whatever the reason: a record must not end what it is a record of."""
    try:
        return read()
    except Exception:
        return None
