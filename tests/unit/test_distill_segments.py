from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.segments import check_grid, draw_interval, segment_start, solver_grid
from hypersd_bench.errors import InputError
from hypersd_bench.sampling import trailing


@st.composite
def grids(draw: st.DrawFn) -> tuple[int, int, int]:
    """(T, k, N) with T = k * length, and a skip that divides the length."""
    k, points, skip = draw(st.integers(1, 16)), draw(st.integers(1, 12)), draw(st.integers(2, 12))
    return k * points * skip, k, k * points


@given(grids(), st.integers(0, 2**31))
def test_no_interval_is_inverted_and_every_end_lies_in_its_segment(grid: tuple[int, int, int], seed: int) -> None:
    num_timesteps, k, num_points = grid
    check_grid(num_timesteps, num_points, (k,))
    rng = torch.Generator().manual_seed(seed)
    t, t_prev, t_end = draw_interval(64, k, num_timesteps, num_points, rng)
    start = segment_start(t, k, num_timesteps)
    assert bool((start <= t_end).all())
    assert bool((t_end <= t_prev).all())
    assert bool((t_prev < t).all())


@given(grids())
def test_every_point_of_the_grid_leaves_a_segment_to_draw_from(grid: tuple[int, int, int]) -> None:
    num_timesteps, k, num_points = grid
    t = solver_grid(num_timesteps, num_points)
    t_prev = (t - num_timesteps // num_points).clamp(min=0)
    assert bool((segment_start(t, k, num_timesteps) <= t_prev).all())


@given(grids())
def test_segments_are_in_order_and_cover_the_trajectory(grid: tuple[int, int, int]) -> None:
    """Starts never fall with t, every segment has its grid points, and each start is a grid point or 0."""
    num_timesteps, k, num_points = grid
    t = solver_grid(num_timesteps, num_points)
    starts = segment_start(t, k, num_timesteps)
    assert bool((starts.diff() >= 0).all())
    assert set(starts.tolist()) <= {0, *t.tolist()}
    own, counts = (t // (num_timesteps // k)).unique(return_counts=True)
    assert own.tolist() == list(range(k))
    assert counts.tolist() == [num_points // k] * k
    assert int(t[-1]) == num_timesteps - 1


@given(grids(), st.integers(0, 2**31))
def test_no_interval_is_empty(grid: tuple[int, int, int], seed: int) -> None:
    """Every timestep from t_b to t_prev can be drawn, and the teacher's step always has somewhere to go."""
    num_timesteps, k, num_points = grid
    skip = num_timesteps // num_points
    t, t_prev, _ = draw_interval(64, k, num_timesteps, num_points, torch.Generator().manual_seed(seed))
    start = segment_start(t, k, num_timesteps)
    assert bool((t_prev - start + 1 >= 1).all())
    later = t >= skip  # all but the first point of the grid, whose step stops at 0
    assert (t - t_prev)[later].tolist() == [skip] * int(later.sum())
    assert t_prev[~later].tolist() == [0] * int((~later).sum())


@given(st.integers(2, 400), st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(0, 450))
def test_a_grid_is_allowed_exactly_when_it_holds_every_boundary(
    num_timesteps: int, segments: list[int], num_points: int
) -> None:
    """The refusal against the definition: equal segments, a whole skip, every trailing boundary on the grid."""
    good = (
        all(num_timesteps % k == 0 for k in segments)
        and 0 < num_points < num_timesteps
        and num_timesteps % num_points == 0
        and all(
            {(j + 1) * (num_timesteps // k) - 1 for j in range(k)}
            <= set(range(num_timesteps // num_points - 1, num_timesteps, num_timesteps // num_points))
            for k in segments
        )
    )
    if good:
        check_grid(num_timesteps, num_points, segments)
        for k in segments:
            draw_interval(8, k, num_timesteps, num_points, torch.Generator().manual_seed(0))  # asserts its order
    else:
        with pytest.raises(InputError):
            check_grid(num_timesteps, num_points, segments)


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_boundaries_are_the_timesteps_of_inference(k: int) -> None:
    starts = segment_start(solver_grid(1000, 40), k, 1000).unique().tolist()
    assert starts == [0, *sorted(trailing(k))[:-1]]  # trailing: 124, 249, ..., 999; the last is the start of sampling
    grid = set(solver_grid(1000, 40).tolist())
    assert set(trailing(k)) <= grid


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_draws_cover_every_point_and_both_ends_of_the_interval(k: int) -> None:
    t, t_prev, t_end = draw_interval(20_000, k, 1000, 40, torch.Generator().manual_seed(0))
    assert t.unique().tolist() == solver_grid(1000, 40).tolist()
    t_b = segment_start(t, k, 1000)
    wide = t_prev - t_b > 0  # the others have one end to draw
    assert bool((wide & (t_end == t_b)).any())
    assert bool((wide & (t_end == t_prev)).any())


def test_the_papers_formula_inverts_intervals_which_is_why_ours_differs() -> None:
    t = solver_grid(1000, 50)  # the usual grid; equation 11 taken literally
    literal = t // 125 * 125
    assert int((literal > (t - 20).clamp(min=0)).sum()) == 7  # 14 % at k = 8


@pytest.mark.parametrize("num_points", [0, 20, 50, 100, 1000])
def test_a_grid_that_misses_boundaries_is_refused_with_those_that_work(num_points: int) -> None:
    with pytest.raises(InputError, match=r"8, 40, 200"):
        check_grid(1000, num_points, (8, 4, 2, 1))


def test_segments_that_do_not_divide_the_trajectory_are_refused() -> None:
    with pytest.raises(InputError, match="equal segments"):
        check_grid(1000, 40, (3,))
