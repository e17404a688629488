"""A whole study folder of a made-up run, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.synthetic_run import make_run
from tests.tiny_design import SESSION
from user_study.design import Rules
from user_study.making import Plan, make_design
from user_study.study import Study, new_study
from user_study.wording import load_wording


def make_study(
    folder: Path,
    models: tuple[str, ...] = ("one", "two"),
    steps: tuple[int, ...] = (4,),
    num_prompts: int = 5,
    criteria: tuple[str, ...] = ("overall",),
    plan: Plan | None = None,
    **session: Any,
) -> Study:
    """Make a run in ``folder / "run"`` and a study of it in ``folder / "study"``."""
    run = make_run(folder / "run", models=models, steps=steps, num_prompts=num_prompts, replicates=1)
    design = make_design(run, plan or Plan(), criteria, load_wording(None, criteria), {**SESSION, **session}, Rules())
    return new_study(run, folder / "study", design)
