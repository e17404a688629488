"""The documentation's commands run: each in a folder that holds what its page speaks of, small and made up.

Some only parse (``tests/unit/test_docs.py``): ``NOT_RUN`` says which, and what runs them instead.
"""

from __future__ import annotations

import shlex
import shutil
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml

from hypersd_bench.cli.main import main
from hypersd_bench.pocket import WEIGHTS
from tests.documented import ROOT, commands
from tests.synthetic_run import CLIP as MADE_UP
from tests.synthetic_run import make_run
from user_study.study import load_study
from user_study.votes.store import Ballot

CLIP = replace(MADE_UP, id="clip-score/vit-b-32")
MODELS = ("hyper-sd", "lightning", "turbo")
RUNS = ("pocket", "sdxl", "sdxl-few-step", "mine", "old", "new", "try")
NOT_RUN = {  # patterns of commands, and why
    "distill hyper-sd*": "trains for minutes to weeks: test_whole_chain, test_distill_chain",
    "distill export*": "wants a trained run: test_whole_chain, test_distill_formats",
    "fetch*": "downloads: test_published_run, through a stand-in of the hub",
    "run --base pocket*": "makes hundreds of images: test_whole_chain",
    "run --base sdxl*": "downloads: test_published_run",
    "run specs/sdxl-few-step.yaml*": "downloads: test_published_run, test_ray",
    "score*": "reads photographs: test_scoring, test_metrics_from_hub",
    "reproduce hyper-sd-table2": "downloads: test_reproduce_run",
    "reproduce hyper-sd-table2 --models*": "downloads: test_reproduce_run",
    "reproduce mlperf-sdxl*": "downloads: test_reproduce_run",
    "study serve*": "serves until it is stopped: test_study_service, test_study_page",
    "pocket check": "takes minutes: test_pocket_build",
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user's: specs, scored runs, a training run's curves, a study with votes."""
    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(ROOT / "specs", folder / "specs")
    (folder / "hypersd_bench").symlink_to(ROOT / "hypersd_bench")  # whose weights a spec names
    _smaller(folder / "specs" / "pocket.yaml", steps=[1], metrics=["clip-score/pocket"], timing=None)
    _smaller(folder / "specs" / "sdxl-few-step.yaml", prompts="pocket/held-out")
    for name in RUNS:
        make_run(folder / "runs" / name, MODELS, (1, 4), 12, 1, clip=CLIP)
    shutil.copytree(WEIGHTS / "lora" / "hyper-sd", folder / "runs" / "distill" / "hyper-sd")
    _study(folder)
    return folder


def _smaller(spec: Path, **changes: Any) -> None:
    """Have a spec make one image of each configuration."""
    spec.write_text(yaml.safe_dump(yaml.safe_load(spec.read_text()) | {"num_prompts": 1, "replicates": 1} | changes))


def _study(folder: Path) -> None:
    """A study of the run sdxl with three raters' votes, and the votes exported."""
    run, study = str(folder / "runs" / "sdxl"), folder / "study"
    pairs = "hyper-sd@4:lightning@4"
    assert main(["study", "new", run, "--pairs", pairs, "--practice", "0", "--out", str(study)]) == 0
    votes = load_study(study).open_votes()
    for number in range(3):
        rater = votes.join()
        votes.consent(rater, "en")
        turn = votes.begin(rater)
        while turn.items:
            item = turn.items[0]
            ballot = Ballot(f"{number}-{item.assignment_id}"[:40], item.assignment_id, {"overall": item.a_side}, 2000)
            turn = votes.vote(rater, ballot)[1]
    votes.close()
    assert main(["study", "analyse", str(study)]) == 0
    for out in (study / "votes.csv", folder / "votes.csv"):
        assert main(["study", "export", str(study), "--out", str(out)]) == 0


def runnable() -> list[str]:
    """The commands that are run, each once."""
    texts = dict.fromkeys(shlex.join(words) for _, words in commands())
    return [text for text in texts if not any(fnmatchcase(text, pattern) for pattern in NOT_RUN)]


@pytest.mark.parametrize("text", runnable())
def test_it_runs(text: str, desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shutil.copytree(desk, tmp_path / "desk", symlinks=True))
    words = shlex.split(text)
    if words[:2] == ["study", "new"]:
        shutil.rmtree("study")
    if words[0] == "run":
        shutil.rmtree("runs")
    assert main(words) == (1 if words[0] == "verify" else 0)  # made-up runs do not hold what they say


def test_what_does_not_run_is_documented_still() -> None:
    texts = [shlex.join(words) for _, words in commands()]
    assert [pattern for pattern in NOT_RUN if not any(fnmatchcase(text, pattern) for text in texts)] == []
