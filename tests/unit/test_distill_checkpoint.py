from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.checkpoint import Position, RunFolder, keep_log_until, load_position, load_state
from distill.presets import find_preset
from distill.settings import Settings
from distill.sources.order import batch_indices
from hypersd_bench.errors import InputError


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    base = tmp_path / "base"
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        (base / part).mkdir(parents=True)
    (base / "model_index.json").write_text("{}")
    (base / "unet" / "diffusion_pytorch_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return Settings("hyper-sd", str(base), find_preset("tiny"))


def open_run(path: Path, settings: Settings, fresh: bool = False) -> RunFolder:
    return RunFolder.open(path, settings, {}, fresh)


def test_the_same_settings_go_on(tmp_path: Path, settings: Settings) -> None:
    open_run(tmp_path / "run", settings).finish_stage({"name": "a", "file": "a.safetensors"})
    assert [stage["name"] for stage in open_run(tmp_path / "run", settings).manifest["stages"]] == ["a"]


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 1}, "seed"), ({"method": "lcm"}, "method"), ({"preset": find_preset("pocket")}, "preset")],
)
def test_other_settings_are_refused_by_name(
    tmp_path: Path, settings: Settings, change: dict[str, object], named: str
) -> None:
    open_run(tmp_path / "run", settings)
    with pytest.raises(InputError, match=rf"its {named} is .*--fresh"):
        open_run(tmp_path / "run", replace(settings, **change))  # type: ignore[arg-type]


def test_another_base_under_the_same_name_is_refused(tmp_path: Path, settings: Settings) -> None:
    open_run(tmp_path / "run", settings)
    header = b'{"__metadata__":{}}'
    weights = Path(settings.base) / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match="base_unet_sha256"):
        open_run(tmp_path / "run", settings)


def test_a_foreign_folder_is_left_alone(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(InputError, match="holds no distillation"):
            open_run(tmp_path / "run", settings, fresh)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_fresh_removes_what_a_run_wrote_and_nothing_else(tmp_path: Path, settings: Settings) -> None:
    run = open_run(tmp_path / "run", settings)
    run.save(Position(0, 4, 4, 1.0), {"a": torch.ones(1)}, {})
    run.finish_stage({"name": "a", "file": "a.safetensors"})
    for name in ("a.safetensors", "notes.txt", "train.jsonl"):
        (run.path / name).write_text("")
    assert open_run(tmp_path / "run", replace(settings, seed=1), fresh=True).manifest["stages"] == []
    assert sorted(path.name for path in run.path.iterdir()) == ["distill.json", "notes.txt"]


def test_a_run_that_cannot_begin_leaves_no_folder_but_never_takes_a_begun_one(
    tmp_path: Path, settings: Settings
) -> None:
    first = open_run(tmp_path / "run", settings)
    open_run(tmp_path / "run", settings).discard()
    assert (tmp_path / "run" / "distill.json").exists()
    first.discard()
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_comes_back_whole(tmp_path: Path, settings: Settings) -> None:
    run = open_run(tmp_path / "run", settings)
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    position = Position(1, 8, 40, 3.5)
    folder = run.save(position, layer.state_dict(), {"student": optimizer.state_dict()})
    assert run.latest() == folder
    assert load_position(folder) == position
    weights, optimizers = load_state(folder)
    assert all(torch.equal(weights[name], value) for name, value in layer.state_dict().items())
    moments = optimizers["student"]["state"][0]["exp_avg"]
    assert torch.equal(moments, optimizer.state_dict()["state"][0]["exp_avg"])


def test_a_checkpoint_cut_off_in_writing_does_not_count(tmp_path: Path, settings: Settings) -> None:
    run = open_run(tmp_path / "run", settings)
    good = run.save(Position(0, 4, 4, 1.0), {"a": torch.ones(1)}, {})
    partial = run.path / "checkpoints" / "00-000000000008.partial"
    partial.mkdir()
    (partial / "optimizers.pt").write_bytes(b"half")
    assert run.latest() == good
    assert load_position(run.save(Position(0, 8, 8, 2.0), {"a": torch.ones(1)}, {})).images == 8


def test_old_checkpoints_are_pruned_and_a_stages_start_follows_its_end(tmp_path: Path, settings: Settings) -> None:
    run = open_run(tmp_path / "run", settings)
    for position in (Position(0, 4, 4), Position(0, 8, 8), Position(1, 0, 8)):
        run.save(position, {"a": torch.ones(1)}, {})
    latest = run.latest()
    assert latest is not None
    assert load_position(latest) == Position(1, 0, 8)
    assert len(list((run.path / "checkpoints").iterdir())) == 2


def test_the_log_forgets_what_will_be_done_again(tmp_path: Path) -> None:
    log = tmp_path / "train.jsonl"
    log.write_text("".join(json.dumps({"images_seen": n}) + "\n" for n in (4, 8, 12)) + '{"images_se')
    keep_log_until(log, 8)
    assert [json.loads(line)["images_seen"] for line in log.read_text().splitlines()] == [4, 8]


def test_a_broken_manifest_is_one_line(tmp_path: Path, settings: Settings) -> None:
    open_run(tmp_path / "run", settings)
    (tmp_path / "run" / "distill.json").write_text("{")
    with pytest.raises(InputError, match=r"can't read .*distill\.json"):
        open_run(tmp_path / "run", settings)


def test_the_command_repeats_the_run(settings: Settings) -> None:
    longer = replace(settings, preset=replace(settings.preset, images=256), seed=3)
    assert settings.command.endswith("--preset tiny --seed 0")
    assert longer.command.endswith("--preset tiny --set images=256 --seed 3")


def test_batches_are_a_function_of_images_seen_alone() -> None:
    whole = batch_indices(0, 10, 0, 30)
    parts = [batch_indices(0, 10, position, 6) for position in (0, 6, 12, 18, 24)]
    assert [int(i) for part in parts for i in part] == whole.tolist()
    for epoch in (whole[:10], whole[10:20], whole[20:]):
        assert Counter(epoch.tolist()) == Counter(range(10))
    assert whole[:10].tolist() != whole[10:20].tolist()
    assert whole.tolist() != batch_indices(1, 10, 0, 30).tolist()
