"""Specs and prompt files: what is read, and what bad input is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypersd_bench.errors import InputError
from hypersd_bench.prompts import load_prompts
from hypersd_bench.runner.spec import load_spec


def test_flags_lie_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("models: [lcm, 'teacher@25,50', {name: mine, path: a/b}, x/y.safetensors]\nsteps: [4]\n")
    spec = load_spec(path, {"steps": ["1", "2"], "seed": None})
    assert spec.steps == (1, 2)
    assert spec.seed == 0
    assert [(ref.name, ref.steps) for ref in spec.models] == [
        ("lcm", None), ("teacher", (25, 50)), ("mine", None), ("y", None)]  # fmt: skip
    assert spec.models[3].path == Path("x/y.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [lcm]\nstep: [1]", "unknown key 'step' .*did you mean 'steps'"),
        ("models: [{nam: lcm}]", "unknown key 'nam' .*did you mean 'name'"),
        ("models: [lcm]\ntiming: {repeat: 3}", "did you mean 'repeats'"),
        ("models: [lcm]\ncontrasts: [{name: x, model: lcm, againts: tcd}]", "did you mean 'against'"),
        ("models: [lcm]\ncontrasts: [{name: x, model: lcm}]", r"contrasts\.0\.against: field required"),
        ("models: [lcm]\ncontrasts: [{name: x, model: lcm, against: tcd, steps: []}]", "at least 1 item"),
        ("models: [lcm]\nsteps: [0]", r"steps\.0: input should be greater"),
        ("models: [lcm@four]", "valid integer"),
        ("models: []", "at least 1 item"),
        ("steps: [1]", "no models"),
        ("- a\n- b", "must be a mapping"),
        ("models: [", "not YAML"),
        ("", "must be a mapping"),
    ],
)
def test_a_bad_spec_gets_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_spec(path, {})
    assert "\n" not in str(caught.value)


def test_a_missing_spec_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"can't read spec .*none\.yaml"):
        load_spec(tmp_path / "none.yaml", {})


def test_prompt_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffa fox\r\n\r\n  a  red   car \r\n".encode())
    assert [p.text for p in load_prompts("a.txt", tmp_path).prompts] == ["a fox", "a red car"]
    (tmp_path / "b.tsv").write_text('Prompt\tCategory\n"G I G G L E" on a sign\tText\n')
    assert load_prompts("b.tsv", tmp_path).prompts[0].text == '"G I G G L E" on a sign'
    (tmp_path / "c.csv").write_text('id,prompt\n1,"a fox, and a hen"\n')
    assert load_prompts("c.csv", tmp_path).prompts[0].text == "a fox, and a hen"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"\n \n", "holds no prompt"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.txt", b"a\0b", "not a text file"),
        ("a.csv", b"words\na fox\n", "no column 'prompt'"),
        ("a.csv", b"", "no column 'prompt'"),
        ("b.txt", None, "can't read prompt file"),
    ],
)
def test_a_bad_prompt_file_gets_one_line(tmp_path: Path, name: str, data: bytes | None, message: str) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        load_prompts(name, tmp_path)


def test_an_unknown_prompt_set_gets_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'pocket/held-out'"):
        load_prompts("pocket/heldout")


def test_a_prompt_set_is_cut_but_never_stretched() -> None:
    prompts = load_prompts("pocket/held-out")
    assert prompts.select(3, "first", 0).prompts == prompts.prompts[:3]
    assert len({p.text for p in prompts.prompts}) == len(prompts.prompts)
    with pytest.raises(InputError, match="were asked for"):
        prompts.select(10_000, "first", 0)
