"""Every alarm rings on a run built to trigger it and is silent on a healthy one; the shipped runs are the real ones."""

from __future__ import annotations

import inspect
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from distill import health
from distill.health import BOARD_RULES, TRAINING_RULES, Alarm, Course, Limits, Watch, read_rows, summary, trend
from hypersd_bench.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "hypersd_bench" / "pocket" / "weights" / "lora"
NUM_ROWS = 120
Row = dict[str, Any]
RULES = [rule.name for rule in (*TRAINING_RULES, *BOARD_RULES)]


def read_alarms(folder: Path) -> list[Alarm]:
    """Every alarm of the run in a folder, finished or not, in the order they rang."""
    watch = Watch()
    for row in read_rows(folder):
        watch.see(row)
    watch.close()
    return watch.fired


def healthy(i: int, noise: random.Random) -> Row:
    """The ``i``-th row of a run with every figure: falling loss, players who part and meet again, rising rewards."""
    apart = 0.4 * (i / 10 if i < 10 else max(0.0, 1 - (i - 10) / 40))  # .4 at its height, nothing from row 50 on
    return {
        "method": "hyper-sd", "stage": "one", "step": 5 * (i + 1), "images_seen": 320 * (i + 1),
        "loss": 0.7 * noise.uniform(0.7, 1.3), "grad_norm": 0.5 * noise.lognormvariate(0, 0.4),
        "p_real": 0.5 + apart / 2 + noise.gauss(0, 0.02), "p_fake": 0.5 - apart / 2 + noise.gauss(0, 0.02),
        "critic_loss": 0.2 * noise.uniform(0.8, 1.2), "critic_gap": -0.05 + noise.gauss(0, 0.03),
        "reward/aesthetic": 5.0 + 0.01 * i + noise.gauss(0, 0.2), "held_out/clip": 0.3 + noise.gauss(0, 0.02),
        "saturation": 0.06 + noise.gauss(0, 0.01), "teacher_saturation": 0.05 + noise.gauss(0, 0.01),
        "contrast": 0.26 + noise.gauss(0, 0.01), "teacher_contrast": 0.25,
    }  # fmt: skip


def run(change: Callable[[int], Row] = lambda i: {}, num_rows: int = NUM_ROWS, seed: int = 0) -> Iterator[Row]:
    """A healthy run, changed by what ``change`` says of each row; None takes a figure away."""
    noise = random.Random(seed)
    for i in range(num_rows):
        row = healthy(i, noise) | change(i)
        yield {key: value for key, value in row.items() if value is not None}


def mse_only(i: int) -> Row:
    return {"p_real": None, "p_fake": None, "loss": 0.02 * 0.99**i}


def boards(student: float, num: int = 5, **more: Any) -> Iterator[Row]:
    for i in range(num):
        common = {"kind": "scoreboard", "stage": "one", "images_seen": 1000 * (i + 1), "metrics": {}}
        yield {**common, "model": "student", "steps": 4, "diversity": student, **more}
        yield {**common, "model": "teacher", "steps": 25, "diversity": 0.5}


def rang(rows: Iterable[Row]) -> list[str]:
    watch = Watch()
    names = [alarm.name for row in rows for alarm in watch.see(row)]
    return names + [alarm.name for alarm in watch.close()]


# each on a run built to trigger it: (alarm, change), everything else as in the healthy run

SICK: dict[str, tuple[str, Callable[[int], Row]]] = {
    "the loss climbs": ("loss-diverges", lambda i: mse_only(i) | {"loss": 0.98**i if i < 60 else 1.1 ** (i - 60)}),
    "the loss climbs from the start": ("loss-diverges", lambda i: mse_only(i) | {"loss": 0.02 * 1.05**i}),
    "the gradient is fifty times what it was": ("gradient-explodes", lambda i: {"grad_norm": 25.0} if i > 90 else {}),
    "told apart for certain": ("discriminator-won", lambda i: {"p_real": 0.99, "p_fake": 0.01} if i > 60 else {}),
    "told apart well, and no gradient": (
        "discriminator-won",
        lambda i: {"p_real": 0.95, "p_fake": 0.08, "grad_norm": 0.01} if i > 60 else {},
    ),
    "turned round": ("discriminator-lost", lambda i: {"p_real": 0.35, "p_fake": 0.65} if i > 60 else {}),
    "never told apart": ("discriminator-idle", lambda i: {"p_real": 0.5 + 0.01 * (-1) ** i, "p_fake": 0.5}),
    "pixels burn out": ("saturation", lambda i: {"saturation": 0.05 + 0.002 * i}),
    "contrast grows": ("saturation", lambda i: {"contrast": 0.25 + 0.002 * i}),
    "the critic falls behind the teacher": ("critic-lags", lambda i: {"critic_gap": -0.05 + 0.005 * i}),
    "the critic never moves": ("critic-lags", lambda i: {"critic_gap": 0.0}),
    "only the critic's loss, and it climbs": (
        "critic-lags",
        lambda i: {"critic_gap": None, "critic_loss": 0.2 + 0.005 * i},
    ),
    "a reward is hacked": (
        "reward-hacking",
        lambda i: {"held_out/clip": 0.3 - 0.0008 * i + 0.02 * (-1) ** i, "held_out/other": 1.0},
    ),
    "a reward is hacked at once": (
        "reward-hacking",
        lambda i: {
            "reward/aesthetic": 5 + 0.03 * max(0, i - 80) + 0.2 * (-1) ** i,
            "held_out/clip": 0.3 - 0.003 * max(0, i - 80) + 0.02 * (-1) ** i,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize(("alarm", "change"), SICK.values(), ids=SICK.keys())
def test_it_rings_once_where_it_must_and_nothing_else_does(alarm: str, change: Callable[[int], Row]) -> None:
    assert rang(run(change)) == [alarm]


def test_diversity_rings_once_where_the_student_has_half_of_the_teachers() -> None:
    assert rang(boards(0.25)) == ["diversity-lost"]


def test_every_rule_has_its_sick_run_and_its_page() -> None:
    assert {name for name, _ in SICK.values()} | {"diversity-lost"} == set(RULES)
    page = (ROOT / "docs" / "health.md").read_text()
    assert [line[4:].strip("`") for line in page.splitlines() if line.startswith("### ")] == RULES


# silence


@pytest.mark.parametrize("seed", range(10))
def test_healthy_runs_are_silent(seed: int) -> None:
    assert rang([*run(seed=seed, num_rows=400), *boards(0.48)]) == []
    assert rang(run(mse_only, seed=seed, num_rows=400)) == []


def test_an_equilibrium_reached_after_parting_is_healthy() -> None:
    rows = list(run(num_rows=400))
    assert all(abs(row["p_real"] - row["p_fake"]) < 0.15 for row in rows[50:])  # for 350 of 400 rows
    assert rang(rows) == []


FIRST: list[Row] = [
    {"loss": 1e3},
    {"grad_norm": 1e4},
    {"p_real": 1.0, "p_fake": 0.0},
    {"saturation": 1.0},
    {"critic_gap": 9.0},
]


@pytest.mark.parametrize("first", FIRST)
def test_the_first_steps_say_nothing(first: Row) -> None:
    settled = Limits().settle_steps
    assert rang(run(lambda i: first if 5 * (i + 1) < settled else {})) == []


@pytest.mark.parametrize("spike", [{"grad_norm": 1e3}, {"p_real": 1.0, "p_fake": 0.0}, {"p_real": 0.3, "p_fake": 0.5}])
def test_one_wild_row_says_nothing(spike: Row) -> None:
    assert rang(run(lambda i: spike if i == 80 else {})) == []


def test_a_generators_loss_may_rise_as_its_opponent_improves() -> None:
    assert rang(run(lambda i: {"loss": 0.7 + 0.02 * i, "p_real": 0.8, "p_fake": 0.2})) == []


def test_a_hinge_that_was_met_and_is_nearly_met_is_no_divergence() -> None:
    def hinge(i: int) -> Row:
        return mse_only(i) | {"loss": max(0.0, 1 - i / 40) if i < 80 else 0.1, "grad_norm": 0.0 if i < 100 else 1.0}

    assert rang(run(hinge)) == []


def test_rewards_that_rise_together_are_no_hacking() -> None:
    assert rang(run(lambda i: {"held_out/clip": 0.3 + 0.001 * i})) == []


def test_rewards_that_fall_together_are_no_hacking() -> None:
    assert rang(run(lambda i: {"held_out/clip": 0.3 - 0.001 * i, "reward/aesthetic": 5 - 0.01 * i})) == []


def test_a_critic_better_than_the_teacher_does_not_lag() -> None:
    assert rang(run(lambda i: {"critic_gap": -0.4, "critic_loss": 0.1 + 0.01 * i})) == []


def test_a_step_count_that_the_stage_is_not_made_for_is_passed_over() -> None:
    assert rang(boards(0.25, supported=False)) == []
    assert rang(boards(0.25, supported=True)) == ["diversity-lost"]


def test_one_poor_scoreboard_says_nothing() -> None:
    assert rang(boards(0.25, num=1)) == []


# once, over, and again


def test_an_alarm_rings_again_only_after_it_was_over() -> None:
    def waves(i: int) -> Row:
        return {"saturation": 0.2} if 20 <= i < 40 or 70 <= i < 90 else {}

    watch = Watch()
    steps = [alarm.step for row in run(waves) for alarm in watch.see(row)]
    assert len(steps) == 2
    assert 5 * 21 <= steps[0] <= 5 * 25
    assert 5 * 71 <= steps[1] <= 5 * 75
    assert watch.standing == []
    assert [alarm.step for alarm in watch.cleared] == steps


def test_hovering_at_the_limit_rings_once() -> None:
    limit = Limits().saturation_margin
    hover = rang(run(lambda i: {"saturation": limit * (1.1 if i // 6 % 2 else 0.9), "teacher_saturation": 0.0}))
    assert hover == ["saturation"]


def test_each_stage_may_ring_for_itself() -> None:
    sick = SICK["told apart for certain"][1]
    rows = [*run(sick), *run(lambda i: sick(i) | {"stage": "two"})]
    watch = Watch()
    assert [alarm.stage for row in rows for alarm in watch.see(row)] == ["one", "two"]


def test_a_short_stage_is_judged_at_its_end() -> None:
    """The next stage's first row ends a stage, and so does the end of the run; nothing rings twice."""
    equal: Row = {"p_real": 0.5, "p_fake": 0.5}
    rows = [row | equal | {"stage": name} for name in ("a", "b") for row in run(num_rows=3)]
    watch = Watch()
    assert [[alarm.stage for alarm in watch.see(row)] for row in rows] == [[], [], [], ["a"], [], []]
    assert [alarm.stage for alarm in watch.close()] == ["b"]
    assert watch.close() == []


@pytest.mark.parametrize("name", ["told apart for certain", "a reward is hacked", "never told apart"])
@pytest.mark.parametrize("cut", [1, 37, 100])
def test_a_resumed_watch_stands_where_the_old_one_stood(name: str, cut: int) -> None:
    rows = [json.loads(json.dumps(row)) for row in [*run(SICK[name][1]), *boards(0.25)]]
    whole, resumed = Watch(), Watch()
    for row in rows:
        whole.see(row)
    for row in rows[:cut]:
        resumed.see(row)
    again = Watch()  # what resuming does: the log's rows to a new watch, then the new rows
    for row in [*rows[:cut], *rows[cut:]]:
        again.see(row)
    assert again.fired[: len(resumed.fired)] == resumed.fired
    assert again.fired == whole.fired
    assert whole.fired


# the figures in the words


def test_the_message_has_the_figures() -> None:
    watch = Watch()
    alarm = next(alarm for row in run(SICK["told apart for certain"][1]) for alarm in watch.see(row))
    assert "p_real - p_fake is 0.98." in alarm.message
    assert alarm.advice
    [poor] = [alarm for row in boards(0.25) for alarm in watch.see(row)]
    assert "At 4 steps" in poor.message
    assert "50%" in poor.message


def test_every_limit_says_where_it_is_from() -> None:
    lines = [line for line in inspect.getsource(Limits).splitlines() if " = " in line]
    assert len(lines) == len(Limits.__dataclass_fields__)
    assert [line for line in lines if "ours" not in line.partition("#")[2]] == []


# statistics


def test_a_trend_is_the_slopes_t_where_residuals_alternate() -> None:
    """With no positive autocorrelation nothing is corrected: scipy's slope over its standard error."""
    values = [0.3 * i + (1.0, -1.2, 0.7, -0.8)[i % 4] for i in range(24)]
    line = stats.linregress(range(24), values)
    assert trend(values) == pytest.approx(line.slope / line.stderr, rel=1e-9)


def test_trends_without_noise() -> None:
    assert trend([1.0] * 20) == 0
    assert trend([0.0] * 20) == 0
    assert trend([0.1 * i for i in range(20)]) == float("inf")
    assert trend([-0.1 * i for i in range(20)]) == float("-inf")


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8])
def test_a_wandering_figure_seldom_looks_like_a_trend(rho: float) -> None:
    """AR(1) without slope: it passes 1 time in 50 at most, and plain least squares at rho 0.8 more than 1 in 12."""
    rng, limit = np.random.default_rng(0), Limits().trend_errors
    corrected = plain = 0
    for _ in range(1000):
        walk = list(rng.standard_normal(1) / (1 - rho**2) ** 0.5)
        for shock in rng.standard_normal(Limits().trend_rows - 1):
            walk.append(rho * walk[-1] + shock)
        line = stats.linregress(range(len(walk)), walk)
        plain += abs(line.slope / line.stderr) > limit
        corrected += abs(trend(walk)) > limit
    assert corrected <= 20
    assert rho < 0.8 or plain > 80


def test_a_course_keeps_the_mean_and_the_order_in_bounded_space() -> None:
    course = Course()
    for i in range(4096):
        course.add(float(i))
    assert len(course.means) < health.COURSE_POINTS
    assert all(a < b for a, b in pairwise(course.means))
    assert np.mean(course.means) == pytest.approx(2047.5)


# the real runs, and folders


@pytest.mark.parametrize("method", ["lcm", "tcd"])
def test_shipped_runs_are_silent(method: str) -> None:
    assert read_alarms(SHIPPED / method) == []


def test_shipped_lightning_learned_nothing_from_its_discriminator() -> None:
    """docs/negative-results.md: p_real and p_fake end where they began."""
    alarms = read_alarms(SHIPPED / "lightning")
    assert {alarm.name for alarm in alarms} == {"discriminator-idle"}
    stages = [f"{n}-{kind}" for n in (8, 4, 2, 1) for kind in ("conditional", "unconditional")]
    assert [alarm.stage for alarm in alarms] == stages


def test_shipped_hyper_sd_rings_for_its_discriminators_alone() -> None:
    alarms = read_alarms(SHIPPED / "hyper-sd")
    assert [(alarm.name, alarm.stage) for alarm in alarms] == [
        ("discriminator-idle", "2-segments"), ("discriminator-idle", "1-segments"),
    ]  # fmt: skip


def test_a_folder_is_read_with_its_scoreboard_and_a_line_cut_by_a_kill(tmp_path: Path) -> None:
    rows = list(run(SICK["told apart for certain"][1]))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"method": "hyp')
    (tmp_path / "scoreboard.jsonl").write_text("".join(json.dumps(row) + "\n" for row in boards(0.25)))
    seen = [row["images_seen"] for row in read_rows(tmp_path)]
    assert seen == sorted(seen)
    assert len(seen) == len(rows) + 10
    assert [alarm.name for alarm in read_alarms(tmp_path)] == ["diversity-lost", "discriminator-won"]


def test_folders_without_a_readable_log_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no train\.jsonl; name the folder"):
        read_alarms(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"step": 5}\nnot a row\n{"step": 10}\n')
    with pytest.raises(InputError, match=r"train\.jsonl, line 2: .*remove the line"):
        read_alarms(tmp_path)


def test_the_summary_has_a_line_per_alarm_and_says_what_was_not_watched() -> None:
    rows = read_rows(SHIPPED / "tcd")
    [calm, blind] = summary(rows)
    assert calm == f"No alarm in {len(rows)} rows of the log."
    assert "reward-hacking" in blind
    assert "loss-diverges" not in blind
    [won, spread] = summary([*run(SICK["told apart for certain"][1]), *boards(0.25)])
    assert won.startswith("discriminator-won in one (step 3")
    assert spread.startswith("diversity-lost in one (3,000 images)")
    [over] = summary([*run(lambda i: {"saturation": 0.2} if 20 <= i < 40 else {}), *boards(0.48)])
    assert "Over after" in over


def test_figures_that_are_no_numbers_are_left_out() -> None:
    assert rang(run(lambda i: {"saturation": float("nan"), "critic_gap": float("inf"), "contrast": None})) == []


def test_no_torch_is_loaded() -> None:
    code = "import distill.health, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
