"""Raters with known tastes, for tests and benchmarks: Davidson's model with a side effect, and spammers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from user_study.assignment import Given, next_item
from user_study.design import Choice, Configuration, Design, Pair
from user_study.records import AssignmentRow, RaterRow, VoteRow


@dataclass(frozen=True)
class Tastes:
    """What raters prefer. strength: by configuration, in log-odds; tie: log nu; side: log-odds towards the left.

    prompt_sd, rater_sd: how far strengths differ between prompts and between raters.
    """

    strength: Mapping[str, float]
    tie: float = -0.7
    side: float = 0.0
    prompt_sd: float = 0.3
    rater_sd: float = 0.2
    seed: int = 0


@dataclass
class SimulatedRater:
    """One rater; a spammer presses the left key at once, whatever is shown."""

    name: str
    tastes: Tastes
    spammer: bool = False
    rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng([self.tastes.seed, *self.name.encode()])

    def choose(self, pair: Pair, a_left: bool) -> tuple[Choice, int]:
        """What the rater chooses, and how long that takes in milliseconds."""
        if self.spammer:
            return ("left" if self.rng.random() < 0.97 else "right"), int(self.rng.integers(150, 400))
        time = int(self.rng.lognormal(8.2, 0.5))
        if pair.b.spoiled:  # anybody sees that, nearly always
            right = self.rng.random() < 0.97
            return ("left" if right == a_left else "right"), time
        left, right_arm = (pair.a, pair.b) if a_left else (pair.b, pair.a)
        x, y = (self._strength(arm.configuration, pair.prompt_id) for arm in (left, right_arm))
        side, tie = self.tastes.side / 2, self.tastes.tie + (x + y) / 2
        weights = np.exp([x + side, tie, y - side])
        outcome = ("left", "tie", "right")[self.rng.choice(3, p=weights / weights.sum())]
        return ("both-bad" if outcome == "tie" and self.rng.random() < 0.2 else outcome), time  # type: ignore[return-value]

    def _strength(self, configuration: Configuration, prompt_id: str) -> float:
        name = str(configuration)
        prompt = np.random.default_rng([self.tastes.seed, 1, *f"{prompt_id} {name}".encode()])
        own = np.random.default_rng([self.tastes.seed, 2, *f"{self.name} {name}".encode()])
        spread = prompt.normal(0, self.tastes.prompt_sd) + own.normal(0, self.tastes.rater_sd)
        return float(self.tastes.strength[name] + spread)


def simulate(
    design: Design, tastes: Tastes, num_raters: int, num_spammers: int = 0
) -> tuple[list[VoteRow], list[AssignmentRow], list[RaterRow]]:
    """A whole study without a server: every rater's session from the first item to the last."""
    votes, assignments, raters = [], [], []
    load: dict[str, int] = {}
    for r in range(num_raters + num_spammers):
        rater = SimulatedRater(f"rater{r:03d}", tastes, spammer=r >= num_raters)
        raters.append(RaterRow(rater.name, False, "en", _at(r), _at(r)))
        given: list[Given] = []
        while (item := next_item(design, rater.name, given, load)) is not None:
            choice, time = rater.choose(item.pair, item.a_side == "left")
            position = len(given)
            name = f"{rater.name}-{position}"
            given.append(Given(item.pair.id, item.kind, item.a_side, position))
            if item.kind == "main":
                load[item.pair.id] = load.get(item.pair.id, 0) + 1
            assignments.append(
                AssignmentRow(
                    name, rater.name, item.pair.id, item.kind, item.a_side, position, item.propensity, _at(r), _at(r),
                    True,
                )
            )  # fmt: skip
            votes.append(
                VoteRow(
                    rater.name, name, item.pair.id, item.kind, item.a_side, dict.fromkeys(design.criteria, choice),
                    position, item.propensity, False, time, 0, "en", "key", "1280x860", 1.0, design.hash, _at(r),
                    _at(r),
                )
            )  # fmt: skip
    return votes, assignments, raters


def _at(r: int) -> str:
    return f"2026-01-01T{r % 24:02d}:{r // 24 % 60:02d}:00.000+00:00"
