"""The device and the processor: whether torch can use them, and whether they are ours alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import psutil

from hypersd_bench.errors import first_line
from hypersd_bench.health.finding import Finding
from hypersd_bench.machine import Gpu, GpuProcess, gpu_of, gpu_processes, gpus, num_cores

_GIB, _MIB_PER_GIB = 2**30, 1024
IN_USE_MIB, IN_USE_PERCENT = 1024, 5  # more than an idle GPU holds and does with a screen on it
SLOWED = ("power cap", "hardware slowdown", "thermal slowdown", "hardware thermal slowdown", "power brake")


def examine_compute() -> Iterator[Finding]:
    """Look at torch's device, its GPUs, threads and bf16; needs a torch that loads."""
    import torch

    from hypersd_bench.pocket.training import fast_bf16

    found = gpus()
    others = gpu_processes() if found else []  # both before torch opens the device and takes memory itself
    cuda = torch.cuda.is_available()
    if cuda:
        device = _cuda(found[0].driver if found else None)
        yield device
        cuda = device.state == "ok"  # a device that fails can't be asked for its address either
        for name in (f"cuda:{i}" for i in range(torch.cuda.device_count()) if cuda):
            if gpu := gpu_of(name, found):
                yield gpu_use(name, gpu, [process for process in others if process.bus_id == gpu.bus_id])
                yield gpu_clocks(name, gpu)
    else:
        yield without_cuda(found)
    threads, cores = torch.get_num_threads(), num_cores()
    detail = f"torch uses {threads} on {cores} cores"
    if threads == cores:
        yield Finding("threads", "ok", detail)
    else:
        yield Finding("threads", "note", f"{detail}: latencies on the CPU depend on it", f"set OMP_NUM_THREADS={cores}")
    if fast_bf16(torch.device("cuda" if cuda else "cpu")):
        yield Finding("bf16", "ok", "fast")
    else:
        remedy = "nothing for a benchmark; train on CUDA, or on a CPU with AVX512-BF16"
        yield Finding("bf16", "note", "slow here: training uses float32", remedy)


def examine_load() -> Finding:
    """Other work on the machine makes every latency wrong."""
    load, cores = psutil.getloadavg()[0], num_cores()
    detail = f"{load:.1f} on {cores} cores"
    if load > 0.5 * cores:
        return Finding("load", "note", f"{detail}: latencies would be wrong", "stop other work before you time")
    return Finding("load", "ok", detail)


def without_cuda(found: Sequence[Gpu]) -> Finding:
    """Say why there is no CUDA device: no GPU, a hidden one, or one that torch can't use."""
    if not found:
        detail = "cpu: enough for the miniature, not for models of SDXL's size"
        return Finding("device", "note", detail, "use a machine with an NVIDIA GPU for those")
    what = f"cpu, though this machine has the GPU {found[0].name} with driver {found[0].driver or 'unknown'}"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        remedy = "unset CUDA_VISIBLE_DEVICES to use it"
        return Finding("device", "note", f"{what}: CUDA_VISIBLE_DEVICES={hidden!r} hides it", remedy)
    remedy = "update the driver, or install a torch built for it; `nvidia-smi` names the newest CUDA it runs"
    return Finding("device", "note", f"{what}: {_why_no_cuda()}", remedy)


def gpu_use(name: str, gpu: Gpu, others: Sequence[GpuProcess]) -> Finding:
    """Say whether somebody else is on a GPU: their work changes latencies and leaves less memory."""
    free = "" if gpu.memory_free_mib is None else f"{gpu.memory_free_mib / _MIB_PER_GIB:.1f} GiB free"
    busy = [f"{process.name} (process {process.pid})" for process in others]
    if not busy and (gpu.memory_used_mib or 0) > IN_USE_MIB:  # a container does not see who else is there
        busy.append(f"{(gpu.memory_used_mib or 0) / _MIB_PER_GIB:.1f} GiB held")
    if not busy and (gpu.utilisation_percent or 0) > IN_USE_PERCENT:
        busy.append(f"{gpu.utilisation_percent:.0f} % busy")
    if not busy:
        return Finding(f"{name} use", "ok", ", ".join(filter(None, [free, "nobody else on it"])))
    detail = ", ".join(filter(None, [free, f"in use: {', '.join(busy)}"]))
    return Finding(f"{name} use", "note", detail, "stop that work, or choose another GPU with CUDA_VISIBLE_DEVICES")


def gpu_clocks(name: str, gpu: Gpu) -> Finding:
    """Say whether something holds a GPU's clocks down: heat, power, or a lowered power limit."""
    parts = [
        f"SM {_of(gpu.sm_mhz, gpu.sm_max_mhz, 'MHz')}",
        f"memory {_of(gpu.memory_mhz, gpu.memory_max_mhz, 'MHz')}",
        f"{_of(gpu.power_w, gpu.power_limit_w, 'W')}",
        f"{_number(gpu.temperature_c)} °C",
        f"persistence {(gpu.persistence or 'unknown').lower()}",
    ]
    slowed = [reason for reason in gpu.limited_by or () if reason in SLOWED]
    if slowed:
        detail = f"{', '.join(parts)}; slowed by {', '.join(slowed)}"
        remedy = "let it cool or stop other work, then look at: nvidia-smi -q -d PERFORMANCE"
        return Finding(f"{name} clocks", "note", detail, remedy)
    if gpu.power_limit_w and gpu.power_default_w and gpu.power_limit_w < gpu.power_default_w:
        detail = f"{', '.join(parts)}; its power limit is below the default of {gpu.power_default_w:.0f} W"
        remedy = f"nvidia-smi -pl {gpu.power_default_w:.0f}, or give the limit with every latency"
        return Finding(f"{name} clocks", "note", detail, remedy)
    return Finding(f"{name} clocks", "ok", ", ".join(parts))


def _cuda(driver: str | None) -> Finding:
    """Run something small on the first CUDA device: a GPU that this torch has no kernels for fails only then."""
    import torch

    versions = f"driver {driver or 'unknown'}, torch built for CUDA {torch.version.cuda}"
    try:
        properties = torch.cuda.get_device_properties(0)
        torch.ones(8, device="cuda").sum().item()
    except Exception as error:  # whatever the driver says
        remedy = "install a driver and a torch that fit this GPU, or set CUDA_VISIBLE_DEVICES= to run on the CPU"
        return Finding("device", "bad", f"cuda fails: {first_line(error)} ({versions})", remedy)
    count = torch.cuda.device_count()
    more = f" and {count - 1} more" if count > 1 else ""
    memory = f"{properties.total_memory / _GIB:.0f} GiB"
    return Finding("device", "ok", f"cuda: {properties.name}{more}, {memory}, {versions}")


def _why_no_cuda() -> str:
    import torch

    if not torch.backends.cuda.is_built():
        return "this torch is built without CUDA"
    try:
        torch.cuda.init()
    except Exception as error:
        return first_line(error)
    return "torch finds no CUDA device"


def _of(value: float | None, limit: float | None, unit: str) -> str:
    return f"{_number(value)} of {_number(limit)} {unit}"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.0f}"
