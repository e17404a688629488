"""Hostile input: whatever stands in a file that comes from outside, the answer is a value or one clear error.

The default suite tries a seeded few of each; ``pytest -m nightly tests/unit/test_fuzz.py`` tries 2,000 of each.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save_file

from hypersd_bench.cli.main import main
from hypersd_bench.errors import HypersdBenchError
from hypersd_bench.prompts import load_prompts
from hypersd_bench.reference import open_reference, read_picture
from hypersd_bench.runner.spec import load_spec
from hypersd_bench.sampling import (
    CARD_KEY,
    METADATA_KEY,
    SamplerContract,
    ddim_trailing,
    read_card,
    read_contract,
)
from hypersd_bench.store import RunStore
from metrics.comparison import View
from reports.pictures import embed_picture
from reports.read import read_report
from reports.study import read_study
from reports.training import read_log
from tests.hostile import FEW, MANY, garbled, mutated
from tests.simulated_raters import Tastes, simulate
from tests.synthetic_run import make_run
from tests.tiny_study import make_study
from user_study.analysis import analyse
from user_study.design import load_design
from user_study.wording import load_wording


class Input:
    """One kind of outside input: what is sound, written where, and read by what."""

    def __init__(
        self, file: Path, sound: Any, read: Callable[[], Any], dump: Callable[[Any], str] = json.dumps
    ) -> None:
        self.file, self.sound, self.read, self.dump = file, sound, read, dump
        self.sealed = self._state()

    def attempt(self, seed: int) -> None:
        """Write a spoiled one and read it; only our own errors may come, and no other file may change."""
        spoiled = (
            garbled(self.sound, seed) if isinstance(self.sound, bytes) else self._dumped(mutated(self.sound, seed))
        )
        self.file.write_bytes(spoiled)
        said = ""
        try:
            self.read()
        except HypersdBenchError as error:
            said = str(error).strip()
        assert "\n" not in said, "one line"
        assert self._state() == self.sealed, "nothing beside it was written"

    def _dumped(self, value: Any) -> bytes:
        return self.dump(value).encode("utf-8", errors="surrogatepass")

    def _state(self) -> set[str]:
        return {str(path) for path in self.file.parent.iterdir() if not path.name.startswith("ledger.sqlite")}


def _spec(folder: Path) -> Input:
    sound = yaml.safe_load((Path(__file__).parents[2] / "specs" / "pocket.yaml").read_text())
    file = folder / "spec.yaml"
    file.touch()
    return Input(file, sound, lambda: load_spec(file, {}), yaml.safe_dump)


def _wording(folder: Path) -> Input:
    sound = {"en": {"title": "t", "consent": ["c"], "instructions": ["i"], "questions": {"overall": "q"}}}
    file = folder / "words.yaml"
    file.touch()
    return Input(file, sound, lambda: load_wording(file, ("overall",)), yaml.safe_dump)


def _prompts(suffix: str, text: str) -> Callable[[Path], Input]:
    def make(folder: Path) -> Input:
        file = folder / f"prompts{suffix}"
        file.touch()
        return Input(file, text.encode(), lambda: load_prompts(file.name, folder))

    return make


def _weights(folder: Path) -> Input:
    file = folder / "lora.safetensors"
    told = {METADATA_KEY: ddim_trailing((1, 4)).to_json(), CARD_KEY: json.dumps({"method": "lcm"})}
    save_file({"x": np.zeros(4, np.float32)}, file, metadata=told)
    return Input(file, file.read_bytes(), lambda: (read_contract(file), read_card(file)))


def _contract(folder: Path) -> Input:
    file = folder / "contract.json"
    file.touch()
    return Input(file, json.loads(ddim_trailing((1, 4)).to_json()), lambda: SamplerContract.from_json(file.read_text()))


def _manifest(folder: Path) -> Input:
    run = make_run(folder / "run", models=("a", "b"), steps=(1,), num_prompts=2)
    return Input(run.folder / "run.json", run.manifest, lambda: View([RunStore.open(run.folder)]).summaries)


def _ledger(folder: Path) -> Input:
    run = make_run(folder / "run", models=("a", "b"), steps=(1,), num_prompts=2)
    file = run.folder / "ledger.sqlite"
    return Input(file, file.read_bytes(), lambda: read_report(RunStore.open(run.folder)))


def _design(folder: Path) -> Input:
    study = make_study(folder, num_prompts=3)
    file = study.folder / "design.json"
    return Input(file, json.loads(file.read_text()), lambda: load_design(file))


def _analysis(folder: Path) -> Input:
    study = make_study(folder, num_prompts=3)
    found = analyse(study.design, *simulate(study.design, Tastes({"one@4": 1.0, "two@4": 0.0}), 4), study.run())
    file = study.folder / "analysis.json"
    file.touch()
    return Input(file, found.to_json(), lambda: read_study(study.folder))


def _log(folder: Path) -> Input:
    file = folder / "train.jsonl"
    rows = [{"stage": "8", "images_seen": 64 * i, "loss": 1.0 / i} for i in range(1, 9)]
    file.touch()
    return Input(file, "\n".join(map(json.dumps, rows)).encode(), lambda: read_log(folder, "x"))


def _picture(suffix: str) -> Callable[[Path], Input]:
    def make(folder: Path) -> Input:
        file = folder / f"picture{suffix}"
        pixels = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
        Image.fromarray(pixels).save(file)

        def read() -> None:
            for of_its_own in (read_picture, lambda path: embed_picture(path.parent, path.name)):
                with suppress(HypersdBenchError):
                    of_its_own(file)

        return Input(file, file.read_bytes(), read)

    return make


def _reference(folder: Path) -> Input:
    file = folder / "statistics.npz"
    np.savez(file, mu=np.zeros(4), sigma=np.eye(4))
    sound = file.read_bytes()
    return Input(file, sound, lambda: open_reference(file, False))


INPUTS: dict[str, Callable[[Path], Input]] = {
    "spec": _spec,
    "wording": _wording,
    "prompts.txt": _prompts(".txt", "a fox\na house on a hill\n"),
    "prompts.jsonl": _prompts(".jsonl", '{"prompt": "a fox"}\n{"prompt": "a house", "category": "x"}\n'),
    "prompts.csv": _prompts(".csv", 'prompt,category\n"a fox, red",x\na house,y\n'),
    "weights": _weights,
    "contract": _contract,
    "manifest": _manifest,
    "ledger": _ledger,
    "design": _design,
    "analysis": _analysis,
    "training log": _log,
    "picture.png": _picture(".png"),
    "picture.jpg": _picture(".jpg"),
    "picture.webp": _picture(".webp"),
    "reference": _reference,
}


@pytest.fixture(params=INPUTS)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Input:
    return INPUTS[request.param](tmp_path)


def test_a_few_of_each(source: Input) -> None:
    FEW(given(st.integers(0, 2**32))(source.attempt))()


@pytest.mark.nightly
def test_many_of_each(source: Input) -> None:
    MANY(given(st.integers(0, 2**32))(source.attempt))()


WORDS = ("compare", "report", "list", "export", "score", "study", "analyse", "--json", "--metrics", "--steps", "-1", "",
         "a", "\u0663", "../x", "--out", "--format", "latex", "--within", "nan", "1e999", "models", "metrics", "%",
         "--no-such", "--diff", "--fail-on", "x:y:z", ":", "--only", "tables")  # fmt: skip


@given(words=st.lists(st.sampled_from(WORDS), max_size=7))
@FEW
def test_no_command_line_ends_in_a_traceback(words: list[str]) -> None:
    assert main(words) in (0, 1, 2)
