"""What a user can get wrong with ``run``: one line with the remedy, exit code 2, and a run that can go on."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from numpy import zeros
from safetensors.numpy import save_file

from hypersd_bench.cli.main import main
from hypersd_bench.sampling import lcm
from hypersd_bench.store import RunStore
from tests.tiny_base import make_tiny_base
from tests.tiny_lora import make_lora


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture
def spec(base: Path, tmp_path: Path) -> Path:
    """A small spec that runs."""
    (tmp_path / "prompts.txt").write_text("a fox\na car\n")
    raw = {"base": str(base), "models": ["teacher"], "steps": [1], "prompts": "prompts.txt", "timing": False}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path / "spec.yaml"


def change(spec: Path, **changes: object) -> None:
    spec.write_text(yaml.safe_dump(yaml.safe_load(spec.read_text()) | changes))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run, and return the one line that came."""
    code = main(["run", *arguments])
    said = capsys.readouterr().err.strip()
    assert code == 2, said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    return lines[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"modles": ["x"]}, "did you mean 'models'"),
        ({"timing": {"repeat": 3}}, "did you mean 'repeats'"),
        ({"models": [{"name": "teacher", "stesp": [1]}]}, "did you mean 'steps'"),
        ({"models": [{"name": "teacher", "sampler": {"guidance_scal": 3}}]}, "did you mean 'guidance_scale'"),
        ({"models": [{"name": "teacher", "force": True}]}, "'force' belongs at the top of the spec"),
        ({"models": ["teacher@"]}, "no step counts after @; write teacher@4"),
        ({"models": ["teacher", "teacher"]}, "teacher@1 is named twice"),
        ({"models": [{"name": "..", "path": "plain.safetensors", "contract": "lcm"}]}, "can't be called '..'"),
        (
            {"models": [{"name": name, "path": "plain.safetensors", "contract": "lcm"} for name in ("a/b", "A_b")]},
            "a/b and A_b would share a folder",
        ),
        ({"models": [{"name": "teacher", "steps": [0]}]}, "greater than or equal to 1, not 0"),
        ({"models": ["teecher"]}, "did you mean 'teacher'"),
        ({"models": []}, "models"),
        ({"dtype": "float8"}, "dtype: input should be 'float32', 'bfloat16' or 'float16'"),
        ({"dtype": "float16"}, "float16 needs a GPU"),
        ({"selection": "last"}, "selection: input should be 'first' or 'random'"),
        ({"num_prompts": 0}, "num_prompts"),
        ({"num_prompts": 3}, "has 2 prompts; 3 were asked for"),
        ({"prompts": "empty.txt"}, "holds no prompt"),
        ({"prompts": "partipromts"}, "did you mean 'partiprompts'"),
        ({"prompts_file": "nowhere.json", "prompts": "coco/2017-val-5k"}, "nowhere.json"),
        ({"base": "nowhere/at/all"}, "is not a diffusers pipeline folder"),
        ({"pipeline": "./nowhere"}, "is not a diffusers pipeline folder"),
        ({"metrics": ["clip-score/vit-b32"]}, "did you mean 'clip-score/vit-b-32'"),
        ({"models": [{"name": "mine", "path": "plain.safetensors"}]}, "carries no sampler contract"),
        ({"models": [{"name": "mine", "path": "plain.safetensors", "contract": "lmc"}]}, "did you mean 'lcm'"),
        ({"models": [{"name": "mine", "path": "half.safetensors"}]}, "truncated"),
        ({"models": [{"name": "teacher", "steps": [3]}]}, "made for 1, 2, 4, 8, 25, 50"),
    ],
)
def test_a_spec_that_can_not_run(
    base: Path, spec: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], said: str
) -> None:
    folder = spec.parent
    (folder / "empty.txt").write_text("\n\n")
    lora = make_lora(base, folder / "half.safetensors", lcm((1,)))
    lora.write_bytes(lora.read_bytes()[:-10])
    save_file({"unet.x.lora_A.weight": zeros(1)}, folder / "plain.safetensors")
    change(spec, **changes)
    assert said in refused(capsys, str(spec), "--out", str(folder / "run"))
    assert not (folder / "run").exists()  # nothing half-written


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--device", "cuda"], "is not available here"),
        (["--device", "gpu"], "unknown device 'gpu'; say cpu, cuda, or cuda:1"),
        (["--contract", "lcm"], "--contract is for a model given by its path"),
        (["--workers", "2"], "--engine ray"),
        (["--dtype", "int8"], "'int8' is not one of"),
        (["--batch-size", "0"], "batch_size"),
    ],
)
def test_flags_that_can_not_be(
    spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    if "cuda" in flags:
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a GPU here")
    assert said in refused(capsys, str(spec), "--out", str(tmp_path / "run"), *flags)


def test_a_folder_of_something_else(spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    assert "not an empty folder" in refused(capsys, str(spec), "--out", str(tmp_path / "thesis"))
    assert os.listdir(tmp_path / "thesis") == ["chapter.tex"]


@pytest.mark.parametrize("out", ["file", "file/run", "/proc/run"])
def test_an_out_that_can_not_be_written_is_refused_before_weights_come(
    spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr("hypersd_bench.runner.benchmark.bring", lambda *_: pytest.fail("weights were brought"))
    assert "choose another --out" in refused(capsys, str(spec), "--out", str(tmp_path / out))


def test_a_broken_tokenizer_is_named(
    base: Path, spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "base"
    shutil.copytree(base, mine)
    for file in (mine / "tokenizer").iterdir():
        file.write_text("{")
    change(spec, base=str(mine))
    arguments = [str(spec), "--out", str(tmp_path / "run")]
    assert f"{mine / 'tokenizer'} holds no whole CLIP tokenizer" in refused(capsys, *arguments)
    assert main(["plan", *arguments]) == 2
    assert f"{mine / 'tokenizer'} holds no whole CLIP tokenizer" in capsys.readouterr().err


def test_what_another_program_put_beside_the_weights_is_not_checked(
    base: Path, spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "base"
    shutil.copytree(base, mine)
    (mine / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"half a file")
    change(spec, base=str(mine))
    assert main(["fetch", str(spec)]) == 0, capsys.readouterr().err
    capsys.readouterr()


def test_an_image_that_was_deleted_is_made_again_and_entered_anew(
    spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(spec, batch_size=1)  # alone as in a batch: the same bits
    out = tmp_path / "run"
    assert main(["run", str(spec), "--out", str(out)]) == 0
    store = RunStore.open(out)
    rows = store.images()
    store.record_images([replace(rows[0], sha256="0" * 64)])  # as of a file that was another one
    (out / rows[0].file).unlink()
    listed, real = [], os.scandir

    def scandir(folder: str | Path) -> object:
        listed.append(str(folder))
        return real(folder)

    monkeypatch.setattr("hypersd_bench.runner.generate.os.scandir", scandir)
    assert main(["run", str(spec), "--out", str(out)]) == 0
    assert store.images() == rows
    assert listed.count(str(out / "images" / "teacher" / "1")) == 1
    capsys.readouterr()


def test_a_full_disk_stops_the_run_and_it_goes_on_when_there_is_room(
    spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(spec, steps=[1, 2, 4], batch_size=1)
    out, real, calls = tmp_path / "run", os.fsync, iter(range(1000))

    def full(file: int) -> None:
        if next(calls) >= 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    with monkeypatch.context() as patch:
        patch.setattr("hypersd_bench.store.os.fsync", full)
        assert "No space left on device" in refused(capsys, str(spec), "--out", str(out))
    made = len(RunStore.open(out).images())
    assert 0 < made < 6
    assert not list(out.rglob("*.partial"))
    assert main(["run", str(spec), "--out", str(out)]) == 0
    assert len(RunStore.open(out).images()) == 6
    capsys.readouterr()
