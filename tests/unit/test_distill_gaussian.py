"""Hyper-SD's losses where everything is known: data N(mu, s^2 I), whose score and ODE have closed forms.

x_t ~ N(alpha mu, v I),  v = alpha^2 s^2 + sigma^2;   eps(x, t) = sigma (x - alpha mu) / v
the probability-flow ODE from t to u:  x_u = alpha_u mu + sqrt(v_u / v_t) (x_t - alpha_t mu)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.batch import Batch, Condition
from distill.losses import distribution_matching
from distill.methods import hyper_sd
from distill.presets import HyperSDSettings
from distill.schedule import NoiseSchedule
from distill.segments import Interval, draw_interval, segment_start, solver_grid
from distill.stages import Losses
from hypersd_bench.sampling import trailing
from tests.tiny_cast import SD

SCHEDULE = NoiseSchedule.from_config(SD, set_alpha_to_one=True)
SETTINGS = HyperSDSettings(offset_noise=0.0)
GUIDANCE = (2.0, 4.0)
SHAPE = (2, 2, 2)
NOTHING = Condition(torch.zeros(1, 1, 1))


@dataclass(frozen=True)
class Gaussian:
    """Data N(mu, s^2 I)."""

    mu: float
    s: float

    def variance(self, t: Tensor) -> Tensor:
        return SCHEDULE.alpha(t) ** 2 * self.s**2 + SCHEDULE.sigma(t) ** 2

    def eps(self, x: Tensor, t: Tensor) -> Tensor:
        return SCHEDULE.sigma(t) * (x - SCHEDULE.alpha(t) * self.mu) / self.variance(t)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        return -(x - SCHEDULE.alpha(t) * self.mu) / self.variance(t)

    def flow(self, x: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """The exact solution of the ODE from t to u."""
        scale = (self.variance(u) / self.variance(t)).sqrt()
        return SCHEDULE.alpha(u) * self.mu + scale * (x - SCHEDULE.alpha(t) * self.mu)

    def mean_eps(self, x: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """The one noise whose DDIM step from t to u lands on the exact solution; eps itself where the span is empty."""
        ratio = SCHEDULE.alpha(u) / SCHEDULE.alpha(t)
        shift = SCHEDULE.sigma(u) - ratio * SCHEDULE.sigma(t)
        exact = (self.flow(x, t, u) - ratio * x) / torch.where(shift == 0, 1.0, shift)
        return torch.where(shift == 0, self.eps(x, t), exact)

    def batch(self, size: int, seed: int = 0) -> Batch:
        z0 = torch.randn(size, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        names = [""] * size
        return Batch(self.mu + self.s * z0, NOTHING.expand(size), NOTHING, names, names, SHAPE)


DATA = Gaussian(mu=0.7, s=0.5)
Eps = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Cast:
    """Roles whose answers are functions; the teacher's needs no guidance, it is exact."""

    teacher: Eps
    student: Eps
    ema: Eps
    critic: Eps | None = None
    schedule: NoiseSchedule = SCHEDULE
    feedback: Any = None

    def predict(self, role: str, x: Tensor, t: Tensor, cond: Condition, *, grad: bool | None = None) -> Tensor:
        answer: Tensor = getattr(self, role)(x, t)
        return answer

    def guided(self, x: Tensor, t: Tensor, cond: Condition, uncond: Condition, g: Tensor) -> Tensor:
        return self.teacher(x, t)


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tscd(cast: Any, batch: Batch, k: int, grid: int, rng: torch.Generator) -> Tensor:
    """TSCD's loss; ``cast`` is a Cast, which has all of Roles that it asks for."""
    settings = replace(SETTINGS, grid=grid)
    losses: Losses = hyper_sd.tscd(batch, cast, rng, k=k, guidance=GUIDANCE, settings=settings)
    assert losses.student is not None
    return losses.student


def all_exact(k: int, grid: int, size: int, teacher_is_exact: bool) -> Cast:
    """A cast that knows where each draw will end, and answers with the noise that leads exactly there."""
    t, t_prev, t_end = draw_interval(size, k, 1000, grid, seeded())

    def to_end(x: Tensor, now: Tensor) -> Tensor:
        return DATA.mean_eps(x, now, t_end)

    return Cast((lambda x, _: DATA.mean_eps(x, t, t_prev)) if teacher_is_exact else DATA.eps, to_end, to_end)


def test_the_closed_forms_agree_with_each_other() -> None:
    """Small DDIM steps with the exact noise arrive at the closed form of the flow."""
    x = torch.randn(3, *SHAPE, dtype=torch.float64)
    walked = x
    for now, then in pairwise(range(999, 498, -1)):
        walked = SCHEDULE.ddim(walked, DATA.eps(walked, at(now)), at(now), at(then))
    exact = DATA.flow(x, torch.tensor([999]), torch.tensor([499]))
    assert float((walked - exact).abs().max()) < 5e-3 * float((x - exact).abs().max())
    t = torch.tensor([499])
    x = x.requires_grad_()
    log_density = -((x - SCHEDULE.alpha(t) * DATA.mu) ** 2 / (2 * DATA.variance(t))).sum()
    torch.testing.assert_close(torch.autograd.grad(log_density, x)[0], DATA.score(x, t))
    torch.testing.assert_close(DATA.eps(x, t), -SCHEDULE.sigma(t) * DATA.score(x, t))


@pytest.mark.parametrize("k", [8, 4, 2, 1])
def test_the_exact_solution_has_no_tscd_loss(k: int) -> None:
    batch = DATA.batch(64)
    exact = all_exact(k, 40, 64, teacher_is_exact=True)
    assert float(tscd(exact, batch, k, 40, seeded())) < 1e-20
    wrong = replace(exact, student=DATA.eps)  # the exact noise at t is not the exact jump
    assert float(tscd(wrong, batch, k, 40, seeded())) > 1e-6


@pytest.mark.parametrize("k", [8, 1])
def test_with_the_teachers_ddim_steps_the_loss_shrinks_with_the_grid(k: int) -> None:
    """The square of a local error of second order: five times finer is 5^4 times less."""
    batch = DATA.batch(2000)
    losses = [float(tscd(all_exact(k, grid, 2000, False), batch, k, grid, seeded())) for grid in (8, 40, 200)]
    assert losses[0] > 100 * losses[1] > 100**2 * losses[2] > 0


class Linear:
    """A student that is linear in x, eps = a_t x + b_t, for every point of a grid: the shape of the exact answer."""

    def __init__(self, grid: int) -> None:
        self.points = solver_grid(1000, grid)
        self.weights = torch.zeros(2, 1001, dtype=torch.float64, requires_grad=True)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        a, b = self.weights[:, t].reshape(2, -1, 1, 1, 1)
        answer: Tensor = a * x + b
        return answer

    def frozen(self) -> Linear:
        copy = Linear(len(self.points))
        copy.weights = self.weights.detach().clone()
        return copy

    def descend(self, loss: Tensor) -> None:
        """Newton's step, exact for a square loss: points are independent, so two directions give every 2 x 2 block."""
        (gradient,) = torch.autograd.grad(loss, self.weights, create_graph=True)
        columns = [torch.autograd.grad(gradient[i].sum(), self.weights, retain_graph=True)[0] for i in range(2)]
        blocks = torch.stack(columns)[:, :, self.points].permute(2, 1, 0)
        step = torch.linalg.solve(blocks, gradient.detach()[:, self.points].T)
        with torch.no_grad():
            self.weights[:, self.points] -= step.T


def trained(k: int, grid: int, per_point: int = 16) -> Linear:
    """The fixed point of TSCD: student and EMA the same, no step changes them any more."""
    student = Linear(grid)
    batch = DATA.batch(grid * per_point)
    for _ in range(grid // k + 1):  # how many draws a boundary is away from the farthest point of its segment
        cast = Cast(DATA.eps, student, student.frozen())
        student.descend(tscd(cast, batch, k, grid, seeded()))
    before = student.weights.detach().clone()
    student.descend(tscd(Cast(DATA.eps, student, student.frozen()), batch, k, grid, seeded()))
    torch.testing.assert_close(student.weights, before, rtol=1e-5, atol=1e-6)
    return student


def every_point_to_its_boundary(batch_size: int, k: int, num_timesteps: int, num_points: int, rng: Any) -> Interval:
    """Draws that hold every point of the grid equally often, and end where inference does."""
    t = solver_grid(num_timesteps, num_points).repeat(batch_size // num_points)
    return Interval(t, (t - num_timesteps // num_points).clamp(min=0), segment_start(t, k, num_timesteps))


def boundaries(k: int) -> list[tuple[int, int]]:
    return list(pairwise([*trailing(k), 0]))


def at(t: int) -> Tensor:
    return torch.tensor([t])


def errors(student: Eps, k: int) -> list[float]:
    """At every boundary, how far the student's step is from the exact solution, relative to how far that goes."""
    found = []
    for t, u in boundaries(k):
        x = SCHEDULE.alpha(at(t)) * DATA.mu + DATA.variance(at(t)).sqrt() * torch.randn(64, *SHAPE).double()
        exact = DATA.flow(x, at(t), at(u))
        step = SCHEDULE.ddim(x, student(x, at(t)), at(t), at(u)).detach()
        found.append(float((step - exact).norm() / (exact - x).norm()))
    return found


@pytest.mark.parametrize("k", [8, 1])
def test_the_fixed_point_is_the_exact_solution_at_each_boundary(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained on ends at the boundary: the teacher's many steps to the digit, the exact flow as the grid gets finer."""
    monkeypatch.setattr(hyper_sd, "draw_interval", every_point_to_its_boundary)
    found = {grid: trained(k, grid) for grid in (8, 40, 200)}
    for grid, student in found.items():
        for t, u in boundaries(k):
            x = walked = torch.randn(5, *SHAPE, dtype=torch.float64)
            stops = [*range(t, u, -1000 // grid), u]
            for a, b in pairwise(stops):
                walked = SCHEDULE.ddim(walked, DATA.eps(walked, at(a)), at(a), at(b))
            step = SCHEDULE.ddim(x, student(x, at(t)).detach(), at(t), at(u))
            torch.testing.assert_close(step, walked, rtol=1e-6, atol=1e-8)
    coarse, fine, finest = (torch.tensor(errors(found[grid], k)) for grid in (8, 40, 200))
    assert bool((finest < 0.3 * fine).all())  # DDIM is of first order: a fifth
    assert bool((fine < coarse).all())
    assert float(finest.max()) < 0.06


@pytest.mark.parametrize("k", [8, 2, 1])
def test_with_ends_anywhere_in_the_segment_the_fixed_point_is_a_compromise(k: int) -> None:
    """A network that is not told t_end can't be exact for all of them: nearer than one DDIM step, not exact."""
    student, ddim = torch.tensor(errors(trained(k, 40, per_point=64), k)), torch.tensor(errors(DATA.eps, k))
    assert bool((student < 0.75 * ddim).all())
    assert bool((student[:-1] < 0.1).all())  # where the segment ends in noise
    assert 0.1 < float(student[-1]) < 0.5  # on the way to the clean end, most of the step is denoising


def test_distribution_matching_is_the_difference_of_scores() -> None:
    """grad = sigma^2 / alpha (score_fake - score_real)(x_t) / mean|x - x0_real|, by image, over all values."""
    real, fake = Gaussian(0.7, 0.5), Gaussian(-0.4, 0.8)
    batch = fake.batch(6)
    x = batch.latents.clone().requires_grad_()
    cast: Any = Cast(real.eps, real.eps, real.eps, critic=fake.eps)
    x0_real, x0_fake = hyper_sd.scores(x.detach(), batch, cast, seeded(), 8.0)
    (gradient,) = torch.autograd.grad(distribution_matching(x, x0_real, x0_fake), x)
    rng = seeded()
    t = torch.randint(20, 981, (6,), generator=rng)
    x_t = SCHEDULE.add_noise(batch.latents, torch.randn(6, *SHAPE, generator=rng), t)
    difference = SCHEDULE.sigma(t) ** 2 / SCHEDULE.alpha(t) * (fake.score(x_t, t) - real.score(x_t, t))
    scale = (batch.latents - x0_real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(gradient, difference / scale / x.numel())


def test_matching_distributions_makes_the_students_the_datas() -> None:
    """The student's mean and width, the only things it has, go to the data's when the critic knows the student."""
    mu, log_s = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (-1.0, 0.4))
    optimizer = torch.optim.Adam([mu, log_s], lr=0.05)
    for step in range(400):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / 400)
        batch = DATA.batch(64, seed=step)
        z = torch.randn(64, *SHAPE, generator=seeded(step)).double()
        x = mu + log_s.exp() * z
        student = Gaussian(float(mu.detach()), float(log_s.detach().exp()))
        cast: Any = Cast(DATA.eps, DATA.eps, DATA.eps, critic=student.eps)
        loss = distribution_matching(x, *hyper_sd.scores(x.detach(), batch, cast, seeded(1000 + step), 8.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(mu.detach()) == pytest.approx(DATA.mu, abs=0.03)
    assert float(log_s.detach().exp()) == pytest.approx(DATA.s, rel=0.05)
