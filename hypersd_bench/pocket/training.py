"""The loop that trains the miniature's own parts: cosine learning rate, EMA, bf16 where it helps, exact resume.

Distillation has a loop of its own in ``distill``; this one only makes what a user of a real model downloads.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from hypersd_bench.pocket.scenes import SIZE, render, scenes

CHECKPOINT_EVERY_S = 120.0
LOG_EVERY = 25


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a stage trains."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 100
    ema: float = 0.999
    weight_decay: float = 0.01
    grad_clip: float = 1.0

    def rate(self, step: int) -> float:
        """Learning rate at a step: linear warm-up, then cosine to 2 %."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.02 + 0.98 * 0.5 * (1 + float(np.cos(np.pi * min(1.0, progress)))))


def fit(
    name: str,
    module: nn.Module,
    loss_at: Callable[[int], tuple[Tensor, dict[str, float]]],
    schedule: Schedule,
    folder: Path,
    device: torch.device,
) -> dict[str, Any]:
    """Train ``module`` and leave its EMA weights in it.

    ``loss_at(step)`` draws everything random from the step number, so a resumed run is the run that was interrupted.
    Returns what the card says of the training: steps, seconds, last loss. Curves go to ``folder/<name>.jsonl``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.99), weight_decay=schedule.weight_decay
    )
    ema = {key: value.detach().clone() for key, value in module.state_dict().items()}
    start, seconds = _resume(folder / f"{name}.pt", module, optimizer, ema)
    saved_at, began, losses = time.monotonic(), time.monotonic(), []
    with tqdm(total=schedule.steps, initial=start, desc=f"pocket {name}", unit="step", mininterval=2) as bar:
        for step in range(start, schedule.steps):
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
            with torch.autocast(device.type, torch.bfloat16, enabled=fast_bf16(device)):
                loss, extra = loss_at(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(module.parameters(), schedule.grad_clip)
            optimizer.step()
            _update_ema(ema, module, min(schedule.ema, (1 + step) / (10 + step)))
            losses.append(float(loss.detach()))
            if not np.isfinite(losses[-1]):
                raise FloatingPointError(f"pocket {name}: loss is {losses[-1]} at step {step}")
            bar.update()
            if (step + 1) % LOG_EVERY == 0:
                row = {"step": step + 1, "loss": float(np.mean(losses)), "grad_norm": float(norm), **extra}
                losses = []
                bar.set_postfix(loss=f"{row['loss']:.4f}")
                with (folder / f"{name}.jsonl").open("a") as log:
                    log.write(json.dumps(row) + "\n")
            if time.monotonic() - saved_at > CHECKPOINT_EVERY_S or step + 1 == schedule.steps:
                spent = seconds + time.monotonic() - began
                _save(folder / f"{name}.pt", step + 1, spent, module, optimizer, ema)
                saved_at = time.monotonic()
    module.load_state_dict(ema)
    module.eval()
    spent = seconds + time.monotonic() - began
    return {**asdict(schedule), "seconds": round(spent), "device": device.type, "torch": torch.__version__}


def fast_bf16(device: torch.device) -> bool:
    """Say whether bf16 autocast is faster than float32 here: on CUDA, and on CPUs with bf16 instructions."""
    if device.type == "cuda":
        return True
    flags = Path("/proc/cpuinfo")
    return device.type == "cpu" and flags.exists() and "avx512_bf16" in flags.read_text()


def scene_pool(folder: Path, count: int, first_seed: int = 0, split: str = "train") -> NDArray[np.uint8]:
    """Render scenes once and keep them: (count, 64, 64, 3) uint8, memory-mapped."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"scenes-{split}-{first_seed}-{count}.npy"
    if not path.exists():
        pool = np.empty((count, SIZE, SIZE, 3), np.uint8)
        for i, scene in enumerate(tqdm(scenes(first_seed, count, split), total=count, desc="pocket scenes")):
            pool[i] = render(scene).image
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.save(file, pool)
        os.replace(partial, path)
    stored: NDArray[np.uint8] = np.load(path, mmap_mode="r")
    return stored


def to_unit(images: NDArray[np.uint8], device: torch.device) -> Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def _update_ema(ema: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    for key, value in module.state_dict().items():
        if value.is_floating_point():
            ema[key].lerp_(value.detach(), 1 - decay)
        else:
            ema[key].copy_(value)


def _save(
    path: Path,
    step: int,
    seconds: float,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: dict[str, Tensor],
) -> None:
    state = {"step": step, "seconds": seconds, "module": module.state_dict(), "ema": ema}
    partial = path.with_suffix(".partial")
    torch.save({**state, "optimizer": optimizer.state_dict()}, partial)
    os.replace(partial, path)


def _resume(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, ema: dict[str, Tensor]
) -> tuple[int, float]:
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, map_location="cpu", weights_only=True)
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    for key, value in state["ema"].items():
        ema[key].copy_(value)
    return int(state["step"]), float(state["seconds"])
