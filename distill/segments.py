"""Trajectory segments: which timesteps a TSCD draw connects (Hyper-SD 2404.13686, section 3.1, eq. 11).

The trajectory 0 .. T-1 is cut into k segments of L = T/k. A draw takes a point t_n of the solver grid s-1, 2s-1, ...,
T-1, the grid point before it t_{n-1} = max(t_n - s, 0), the start of its segment t_b, and an end t_end anywhere in
[t_b, t_{n-1}]. Equation 11 taken literally gives t_b > t_{n-1} for the first grid point of every segment but one; with

    t_b = max(floor(t_n / L) L - 1, 0)

and a skip s that divides L no interval is inverted, and the boundaries are the timesteps of DDIM's trailing spacing.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm
from typing import NamedTuple

import torch
from torch import Tensor

from hypersd_bench.errors import InputError


class Interval(NamedTuple):
    """A batch of draws, each (B,) int64 with t_b <= t_end <= t_prev < t."""

    t: Tensor
    t_prev: Tensor
    t_end: Tensor


def check_grid(num_timesteps: int, num_points: int, segments: Sequence[int]) -> None:
    """Raise InputError, naming grids that work, unless the grid holds every boundary of every segmentation."""
    if any(k < 1 or num_timesteps % k for k in segments):
        raise InputError(f"{num_timesteps} timesteps can't be cut into {list(segments)} equal segments")
    common = lcm(*segments)  # skip = T/N divides T/k exactly when k divides N
    works = [n for n in range(common, num_timesteps, common) if num_timesteps % n == 0]  # N = T would start at t = 0
    if num_points not in works:
        raise InputError(
            f"a solver grid of {num_points} points misses boundaries of {list(segments)} segments of {num_timesteps} "
            f"timesteps; these grids work: {', '.join(map(str, works)) or 'none'}"
        )


def solver_grid(num_timesteps: int, num_points: int) -> Tensor:
    """The grid's timesteps s-1, 2s-1, ..., T-1: (N,) int64."""
    skip = num_timesteps // num_points
    return torch.arange(1, num_points + 1) * skip - 1


def segment_start(t: Tensor, k: int, num_timesteps: int) -> Tensor:
    """t_b of timesteps (B,) when the trajectory has k segments."""
    length = num_timesteps // k
    return (t // length * length - 1).clamp(min=0)


def draw_interval(batch_size: int, k: int, num_timesteps: int, num_points: int, rng: torch.Generator) -> Interval:
    """Draw t uniformly from the grid and t_end uniformly from its segment's part before t_prev."""
    t = solver_grid(num_timesteps, num_points)[torch.randint(num_points, (batch_size,), generator=rng)]
    t_prev = (t - num_timesteps // num_points).clamp(min=0)
    t_b = segment_start(t, k, num_timesteps)
    uniform = torch.rand(batch_size, generator=rng, dtype=torch.float64)
    t_end = t_b + (uniform * (t_prev - t_b + 1)).long()
    assert bool(((t_b <= t_end) & (t_end <= t_prev) & (t_prev < t)).all()), "inverted interval: check_grid was skipped"
    return Interval(t, t_prev, t_end)
