"""Where and with what something was made: git revision, package versions, machine, device, file hashes."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hypersd_bench.contracts import Provenance

PACKAGES = ("hypersd-bench", "torch", "diffusers", "transformers", "peft", "accelerate", "open_clip_torch",
            "torchmetrics", "numpy")  # fmt: skip


def collect(device: str = "cpu") -> Provenance:
    """Collect the provenance of something made now, by this process, on ``device``."""
    return Provenance(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        git=git_revision(),
        packages={name: found for name in PACKAGES if (found := _version(name))},
        python=sys.version.split()[0],
        machine=f"{platform.system()} {platform.machine()}, {_processor()}",
        device=_device_name(device),
    )


def sha256(path: Path) -> str:
    """Hash a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_revision() -> str:
    """The checkout's commit, with ``+changes`` when files differ from it; empty outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _device_name(device: str) -> str:
    if not device.startswith("cuda"):
        return device
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})"
