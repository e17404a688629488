"""Is my run healthy? Alarms in plain words, from nothing but the rows that a run logs.

A `Watch` sees the rows of ``train.jsonl`` and ``scoreboard.jsonl`` one by one. What it knows follows from those rows
alone: a run that is resumed shows them to a new watch and stands where the old one stood. No torch, no clock, no
method. Each alarm is one `Rule`: the figures it needs, its test, its advice (docs/health.md says more on each).

An alarm looks at moving means over ``Limits.window`` rows of one stage, without the stage's first steps. It rings
once, and again only after its figure came back well inside the limit.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from hypersd_bench.errors import InputError

TRAIN_LOG, SCOREBOARD = "train.jsonl", "scoreboard.jsonl"
COURSE_POINTS = 128  # to how many means the course of a figure over its whole stage is thinned


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When an alarm rings. Steps are optimizer steps of the stage, rows are rows of the log."""

    window: int = 4  # rows of a moving mean; ours: 20 steps at the loop's one row per five
    settle_steps: int = 10  # first steps of a stage that nothing looks at; ours
    patience_steps: int = 200  # after which a player should have learned something; ours
    came_back: float = 0.8  # share of a limit below which an alarm is over; ours
    loss_rise: float = 3.0  # times its own minimum; ours: 1.5 at most in the shipped runs
    gradient_rise: float = 10.0  # times the stage's median; ours: 2.2 times its minimum at most in the shipped runs
    won_gap: float = 0.95  # p_real - p_fake; ours: an error rate of a few per cent
    vanishing_gap: float = 0.8  # p_real - p_fake that already counts when the student's gradient is gone; ours
    vanishing_gradient: float = 0.1  # of its largest moving mean in the stage; ours
    separated_gap: float = 0.05  # p_real - p_fake of a discriminator that has learned anything; ours: shipped Lightning
    lost_gap: float = 0.1  # p_fake - p_real of one that is turned round; ours
    saturation_margin: float = 0.05  # share of saturated pixels beyond the teacher's; ours
    contrast_ratio: float = 1.3  # pixel standard deviation over the teacher's; ours
    critic_gap: float = 0.1  # (critic - teacher) / teacher, error on the student's samples; ours
    critic_still: float = 1e-4  # the same, in size, below which the critic is still the teacher; ours
    critic_rise: float = 2.0  # times its own minimum, where only the critic's loss is logged; ours
    trend_rows: int = 30  # rows from which a trend is read; ours
    trend_errors: float = 5.0  # standard errors that a slope must be from zero; ours: it is looked at in every row
    diversity_ratio: float = 0.7  # student's over teacher's, per step count; ours
    board_window: int = 2  # scoreboards of a moving mean; ours


@dataclass(frozen=True)
class Alarm:
    """What rang, when, why (with the figures) and what to do. ``step`` counts in the stage; 0 where a row has none."""

    name: str
    stage: str
    step: int
    images_seen: int
    message: str
    advice: str


@dataclass(frozen=True)
class Verdict:
    """What a rule says now: ``over`` its limit, well ``inside`` it, or between the two, where nothing changes."""

    over: bool
    inside: bool
    message: str


@dataclass(frozen=True)
class Rule:
    """An alarm: its test, and the keys without which it can't be watched (one that ends in / is a prefix)."""

    name: str
    needs: tuple[str, ...]
    test: Callable[[Figures, Limits], Verdict | None]
    advice: str


class Course:
    """A figure over its whole stage, in at most ``COURSE_POINTS`` means of equally many rows."""

    def __init__(self) -> None:
        self.means: list[float] = []
        self._rows_per_mean = 1
        self._open: list[float] = []

    def add(self, value: float) -> None:
        """Take in the next row's value."""
        self._open.append(value)
        if len(self._open) < self._rows_per_mean:
            return
        self.means.append(fmean(self._open))
        self._open = []
        if len(self.means) == COURSE_POINTS:
            self.means = [fmean(self.means[i : i + 2]) for i in range(0, COURSE_POINTS, 2)]
            self._rows_per_mean *= 2


class Figure:
    """One logged figure of a stage: its last values, its course, the moving mean and that mean's extremes."""

    def __init__(self, window: int, trend_rows: int) -> None:
        self.recent: deque[float] = deque(maxlen=max(window, trend_rows))
        self.course = Course()
        self.first = self.lowest = self.highest = self.level = math.nan
        self._window = window

    @property
    def settled(self) -> bool:
        """Whether a whole window has been seen."""
        return not math.isnan(self.level)

    @property
    def last(self) -> list[float]:
        """The window's values, or as many as there are."""
        return list(self.recent)[-self._window :]

    def add(self, value: float) -> None:
        """Take in the next row's value."""
        self.recent.append(value)
        self.course.add(value)
        if len(self.recent) < self._window:
            return
        self.level = fmean(self.last)
        self.first = self.first if not math.isnan(self.first) else self.level
        self.lowest = min(self.level, self.lowest) if not math.isnan(self.lowest) else self.level
        self.highest = max(self.level, self.highest) if not math.isnan(self.highest) else self.level


class Figures:
    """Every figure of the stage in progress, how far it is, and whether it has ended."""

    def __init__(self, window: int, trend_rows: int) -> None:
        self._window, self._trend_rows = window, trend_rows
        self._figures: dict[str, Figure] = {}
        self.step = self.images_seen = 0
        self.ended = False

    def add(self, values: Mapping[str, float]) -> None:
        """Take in a row's figures."""
        for key, value in values.items():
            if key not in self._figures:
                self._figures[key] = Figure(self._window, self._trend_rows)
            self._figures[key].add(value)

    def any(self, key: str) -> Figure | None:
        """The figure, if it was logged at all."""
        return self._figures.get(key)

    def settled(self, key: str) -> Figure | None:
        """The figure, once a whole window of it was seen."""
        figure = self._figures.get(key)
        return figure if figure and figure.settled else None

    def under(self, prefix: str) -> dict[str, Figure]:
        """The figures whose keys start so, by their full keys."""
        return {key: figure for key, figure in self._figures.items() if key.startswith(prefix)}


class Watch:
    """Sees a run's rows in the order they were written, and says what rings.

    fired: every alarm so far. standing: those not over; a stage's end leaves them standing. cleared: images seen when
    an alarm was over. keys: every figure seen, derived ones too.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.fired: list[Alarm] = []
        self.cleared: dict[Alarm, int] = {}
        self.keys: set[str] = set()
        self._train = _Desk("", self._new_figures())
        self._boards: dict[int, _Desk] = {}
        self._teacher: dict[int, float] = {}  # step count -> diversity

    @property
    def standing(self) -> list[Alarm]:
        """Alarms that rang and are not over."""
        return [alarm for alarm in self.fired if alarm not in self.cleared]

    def see(self, row: Mapping[str, Any]) -> list[Alarm]:
        """Take in the next row; returns the alarms that ring because of it."""
        return self._see_board(row) if row.get("kind") == "scoreboard" else self._see_training(row)

    def close(self) -> list[Alarm]:
        """End the last stage: what can only be said at a stage's end is said now, once."""
        if self._train.figures.ended:
            return []
        self._train.figures.ended = True
        return self._judge(self._train, TRAINING_RULES)

    def _see_training(self, row: Mapping[str, Any]) -> list[Alarm]:
        alarms: list[Alarm] = []
        stage = str(row.get("stage", ""))
        if stage != self._train.stage or self._train.figures.ended:
            alarms = self.close() if self._train.stage else []
            self._train = _Desk(stage, self._new_figures())
        figures = self._train.figures
        figures.step, figures.images_seen = int(row.get("step", 0)), int(row.get("images_seen", 0))
        values = _derived(_numbers(row))
        self.keys |= values.keys()
        if figures.step < self.limits.settle_steps:
            return alarms
        figures.add(values)
        return alarms + self._judge(self._train, TRAINING_RULES)

    def _see_board(self, row: Mapping[str, Any]) -> list[Alarm]:
        """Take in a scoreboard row; one of a step count the stage is not made for (``supported``: false) is passed."""
        numbers = _numbers(row)
        if not {"diversity", "steps"} <= numbers.keys() or row.get("supported") is False:
            return []
        steps = int(numbers["steps"])
        if row.get("model") == "teacher":
            self._teacher[steps] = numbers["diversity"]
            return []
        if not self._teacher:
            return []
        desk = self._board(str(row.get("stage", "")), steps)
        teacher = self._teacher[max(self._teacher)]  # the more steps, the more it is the teacher
        desk.figures.add({"diversity": numbers["diversity"], "teacher_diversity": teacher, "steps": steps})
        desk.figures.step, desk.figures.images_seen = int(row.get("step", 0)), int(row.get("images_seen", 0))
        self.keys.add("diversity")
        return self._judge(desk, BOARD_RULES)

    def _board(self, stage: str, steps: int) -> _Desk:
        """The desk of a step count: its figures outlast a stage, as the student does, and may ring once in each."""
        desk = self._boards.get(steps)
        if desk is None or desk.stage != stage:
            desk = _Desk(stage, desk.figures if desk else Figures(self.limits.board_window, 0))
            self._boards[steps] = desk
        return desk

    def _judge(self, desk: _Desk, rules: Sequence[Rule]) -> list[Alarm]:
        rang = []
        for rule in rules:
            verdict = rule.test(desk.figures, self.limits)
            standing = desk.standing.get(rule.name)
            if verdict is None:
                continue
            if standing and verdict.inside:
                self.cleared[desk.standing.pop(rule.name)] = desk.figures.images_seen
            elif verdict.over and not standing:
                at = desk.figures
                alarm = Alarm(rule.name, desk.stage, at.step, at.images_seen, verdict.message, rule.advice)
                desk.standing[rule.name] = alarm
                rang.append(alarm)
        self.fired += rang
        return rang

    def _new_figures(self) -> Figures:
        return Figures(self.limits.window, self.limits.trend_rows)


class _Desk:
    """A stage under watch, with the alarms that stand in it."""

    def __init__(self, stage: str, figures: Figures) -> None:
        self.stage, self.figures = stage, figures
        self.standing: dict[str, Alarm] = {}


def summary(rows: Iterable[Mapping[str, Any]], limits: Limits | None = None) -> list[str]:
    """One line per alarm of a whole run, then a line for what could not be watched for want of figures."""
    watch = Watch(limits)
    num_rows = 0
    for num_rows, row in enumerate(rows, start=1):  # noqa: B007, the count is used below
        watch.see(row)
    watch.close()
    lines = [describe(alarm, watch.cleared.get(alarm)) for alarm in watch.fired]
    lines = lines or [f"No alarm in {num_rows} rows of the log."]
    blind = [rule.name for rule in (*TRAINING_RULES, *BOARD_RULES) if not _watched(rule, watch.keys)]
    return [*lines, f"Not watched, as the run logs no figures for it: {', '.join(blind)}."] if blind else lines


def describe(alarm: Alarm, cleared: int | None = None) -> str:
    """An alarm as one line; with the images seen when it was over, if it was."""
    place = f"step {alarm.step}, {alarm.images_seen:,} images" if alarm.step else f"{alarm.images_seen:,} images"
    end = f" (Over after {cleared:,} images.)" if cleared is not None else ""
    return f"{alarm.name} in {alarm.stage} ({place}): {alarm.message} {alarm.advice}{end}"


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """A run's log and scoreboard rows by images seen; raises InputError where there is no log or a broken one."""
    if not (folder / TRAIN_LOG).is_file():
        raise InputError(f"{folder} holds no {TRAIN_LOG}; name the folder of a distillation")
    rows = _rows(folder / TRAIN_LOG)
    if (folder / SCOREBOARD).is_file():
        rows += _rows(folder / SCOREBOARD)
    return sorted(rows, key=lambda row: float(row.get("images_seen", 0)))  # stable: training first at equal images


def _rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines):  # a kill cuts the last line at most
            raise InputError(f"{path}, line {number}: not a JSON object; remove the line, or go on from a checkpoint")
    return rows


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _derived(values: Mapping[str, float]) -> dict[str, float]:
    """The row's figures, and those that compare two of them in the same row."""
    derived = dict(values)
    if {"p_real", "p_fake"} <= values.keys():
        derived["gap"] = values["p_real"] - values["p_fake"]
    if {"saturation", "teacher_saturation"} <= values.keys():
        derived["excess_saturation"] = values["saturation"] - values["teacher_saturation"]
    if "contrast" in values and values.get("teacher_contrast", 0) > 0:
        derived["contrast_ratio"] = values["contrast"] / values["teacher_contrast"]
    return derived


def _watched(rule: Rule, keys: Iterable[str]) -> bool:
    return all(any(key == need or (need[-1] == "/" and key.startswith(need)) for key in keys) for need in rule.needs)


# trends


def trend(values: Sequence[float]) -> float:
    """The least-squares slope of equally spaced values, in its own standard errors.

    The residuals' lag-1 autocorrelation rho, where positive, leaves n (1 - rho) / (1 + rho) of n values to count
    (AR(1), large n): without it a figure that merely wanders would seem to climb. Residuals of a fitted line show
    rho too small by about (2 + 4 rho) / n (least squares with a trend), which is put back first.
    """
    n = len(values)
    middle, mean = (n - 1) / 2, fmean(values)
    spread = n * (n * n - 1) / 12  # sum of (i - middle)^2
    slope = sum((i - middle) * value for i, value in enumerate(values)) / spread
    residuals = [value - mean - slope * (i - middle) for i, value in enumerate(values)]
    squares = sum(r * r for r in residuals)
    if squares <= (1e-9 * max(map(abs, values))) ** 2:  # a line but for rounding
        return math.copysign(math.inf, slope) if abs(slope) * n > 1e-9 * abs(mean) else 0.0
    rho = sum(a * b for a, b in pairwise(residuals)) / squares
    rho = min(max((n * rho + 2) / (n - 4), 0.0), 0.99)
    return slope / math.sqrt(squares / (n - 2) / spread) * math.sqrt((1 - rho) / (1 + rho))


class _Trend(NamedTuple):
    """How many errors a figure climbs or falls, which figure, and its values over the span looked at."""

    errors: float
    key: str
    values: Sequence[float]


def _steepest(figures: Mapping[str, Figure], sign: int, limits: Limits, whole: bool) -> _Trend:
    """The figure that climbs (sign 1) or falls (-1) most surely, over the last rows or the whole stage."""
    spans = {
        key: figure.course.means if whole else list(figure.recent)[-limits.trend_rows :]
        for key, figure in figures.items()
    }
    return max(
        _Trend(sign * trend(span) if len(span) >= limits.trend_rows else 0.0, key, span) for key, span in spans.items()
    )


def _from_to(values: Sequence[float]) -> str:
    quarter = max(1, len(values) // 4)
    return f"from {fmean(values[:quarter]):.4g} to {fmean(values[-quarter:]):.4g}"


# the rules


def _limit(value: float, limit: float, message: str, came_back: float) -> Verdict:
    return Verdict(value > limit, value < came_back * limit, message)


def _loss(figures: Figures, limits: Limits) -> Verdict | None:
    """Compare the loss with its own minimum; not a generator's, which rises as its opponent improves."""
    loss = figures.settled("loss")
    if loss is None or figures.any("p_fake"):
        return None
    rise, allowed = loss.level - loss.lowest, (limits.loss_rise - 1) * abs(loss.lowest)
    message = f"The loss is {loss.level:.4g}; it has been as low as {loss.lowest:.4g} in this stage."
    # above where it began, too: a hinge that was at zero and is now nearly so has risen without end
    return Verdict(
        rise > allowed and loss.level > loss.first,
        rise < limits.came_back * allowed or loss.level < loss.first,
        message,
    )


def _gradient(figures: Figures, limits: Limits) -> Verdict | None:
    """Compare the window's median with the stage's; medians, as one wild row is clipped and does no harm."""
    norm = figures.settled("grad_norm")
    if norm is None or len(norm.course.means) < 2 * limits.window:
        return None
    now, usual = median(norm.last), median(norm.course.means)
    if usual == 0:  # a hinge that is met most of the time has no usual gradient
        return None
    message = f"The gradient's norm is {now:.4g}, before clipping; {usual:.4g} is usual for this stage."
    return _limit(now, limits.gradient_rise * usual, message, limits.came_back)


def _won(figures: Figures, limits: Limits) -> Verdict | None:
    gap, norm = figures.settled("gap"), figures.settled("grad_norm")
    if gap is None:
        return None
    faded = norm is not None and norm.level < limits.vanishing_gradient * norm.highest
    limit = limits.vanishing_gap if faded else limits.won_gap
    message = f"The discriminator tells real from fake almost always: p_real - p_fake is {gap.level:.2f}."
    if norm is not None:
        message += f" The student's gradient norm is {norm.level:.3g}, at its largest it was {norm.highest:.3g}."
    return _limit(gap.level, limit, message, limits.came_back)


def _lost(figures: Figures, limits: Limits) -> Verdict | None:
    gap = figures.settled("gap")
    if gap is None:
        return None
    message = f"The discriminator takes fakes for more real than the real: p_real - p_fake is {gap.level:.2f}."
    return _limit(-gap.level, limits.lost_gap, message, limits.came_back)


def _idle(figures: Figures, limits: Limits) -> Verdict | None:
    """Ask whether real and fake were ever told apart: a gap that has closed again is a healthy equilibrium."""
    gap, real, fake = (figures.any(key) for key in ("gap", "p_real", "p_fake"))
    if gap is None or real is None or fake is None:
        return None
    # a stage may be too short to fill a window: its end is judged by what there is
    largest = max(abs(gap.lowest), abs(gap.highest)) if gap.settled else abs(fmean(gap.last))
    due = (gap.settled and figures.step >= limits.patience_steps) or (figures.ended and len(gap.recent) > 1)
    message = (
        f"The discriminator has learned nothing in {figures.step} steps: p_real {fmean(real.last):.2f}, "
        f"p_fake {fmean(fake.last):.2f}, and on average they were never {limits.separated_gap:g} apart."
    )
    return Verdict(due and largest < limits.separated_gap, gap.settled and largest >= limits.separated_gap, message)


def _saturation(figures: Figures, limits: Limits) -> Verdict | None:
    excess, contrast = figures.settled("excess_saturation"), figures.settled("contrast_ratio")
    student, teacher = figures.settled("saturation"), figures.settled("teacher_saturation")
    parts, ratios = [], []
    if excess and student and teacher:
        parts.append(
            f"{student.level:.1%} of the student's pixels are black or full, {teacher.level:.1%} of the teacher's"
        )
        ratios.append(excess.level / limits.saturation_margin)
    if contrast is not None:
        parts.append(f"its contrast is {contrast.level:.2f} times the teacher's")
        ratios.append((contrast.level - 1) / (limits.contrast_ratio - 1))
    return _limit(max(ratios), 1.0, f"Pictures burn out: {'; '.join(parts)}.", limits.came_back) if ratios else None


def _critic(figures: Figures, limits: Limits) -> Verdict | None:
    """Compare the critic with the teacher on the student's samples; by its loss alone where the gap is not logged."""
    gap, loss = figures.settled("critic_gap"), figures.settled("critic_loss")
    if gap is not None:
        if figures.step >= limits.patience_steps and max(abs(gap.lowest), abs(gap.highest)) < limits.critic_still:
            message = f"The critic does not move: after {figures.step} steps it still predicts what the teacher does."
            return Verdict(True, False, message)
        message = (
            f"The critic knows the student's samples worse than the teacher, which never saw any: "
            f"its error is {gap.level:+.0%} against the teacher's."
        )
        return _limit(gap.level, limits.critic_gap, message, limits.came_back)
    if loss is None:
        return None
    message = (
        f"The critic's error on the student's samples is {loss.level:.4g}; it has been as low as {loss.lowest:.4g}."
    )
    return _limit(loss.level, limits.critic_rise * loss.lowest, message, limits.came_back)


def _rewards(figures: Figures, limits: Limits) -> Verdict | None:
    """Look for a reward that rises while a held-out one falls, each beyond its noise (Goodhart's law)."""
    rewards, held_out = figures.under("reward/"), figures.under("held_out/")
    if not rewards or not held_out:
        return None
    # both over one span: the last rows for what turns at once, the whole stage for what creeps
    pairs = [(_steepest(rewards, 1, limits, whole), _steepest(held_out, -1, limits, whole)) for whole in (False, True)]
    up, down = max(pairs, key=lambda pair: min(pair[0].errors, pair[1].errors))
    message = (
        f"{up.key} rose {_from_to(up.values)} while {down.key}, which nothing optimises, fell {_from_to(down.values)}."
    )
    return _limit(min(up.errors, down.errors), limits.trend_errors, message, limits.came_back)


def _diversity(figures: Figures, limits: Limits) -> Verdict | None:
    student, teacher, steps = (figures.settled(key) for key in ("diversity", "teacher_diversity", "steps"))
    if student is None or teacher is None or steps is None or teacher.level <= 0:
        return None
    message = (
        f"At {steps.level:.0f} steps pictures of one prompt differ by {student.level:.3g}, the teacher's by "
        f"{teacher.level:.3g}: {student.level / teacher.level:.0%} of its diversity."
    )
    loss, allowed = 1 - student.level / teacher.level, 1 - limits.diversity_ratio
    return _limit(loss, allowed, message, limits.came_back)


TRAINING_RULES = (
    Rule("loss-diverges", ("loss",), _loss, "Lower the stage's learning rate and go on from the last checkpoint."),
    Rule(
        "gradient-explodes", ("grad_norm",), _gradient,
        "Lower the learning rate or the gradient clip; look for broken data if it came at once.",
    ),
    Rule(
        "discriminator-won", ("p_real", "p_fake"), _won,
        "Lower the discriminator's learning rate, or give the mean squared error more weight.",
    ),
    Rule(
        "discriminator-lost", ("p_real", "p_fake"), _lost,
        "Raise the discriminator's learning rate, or lower the student's.",
    ),
    Rule(
        "discriminator-idle", ("p_real", "p_fake"), _idle,
        "Give the stage more steps or the discriminator a higher rate; until then this stage trains nothing.",
    ),
    Rule(
        "saturation", ("saturation", "teacher_saturation"), _saturation,
        "Lower the guidance or the reward's weight and target, and look at the sample grid.",
    ),
    Rule(
        "critic-lags", ("critic_loss",), _critic,
        "Give the critic more steps per student step or a higher rate, or lower the student's.",
    ),
    Rule(
        "reward-hacking", ("reward/", "held_out/"), _rewards,
        "Stop here or lower the reward's weight and target; take the checkpoint from before the fall.",
    ),
)  # fmt: skip
BOARD_RULES = (
    Rule(
        "diversity-lost", ("diversity",), _diversity,
        "Lower the adversarial or reward weight, or stop earlier; compare the grid over several noises.",
    ),
)  # fmt: skip
