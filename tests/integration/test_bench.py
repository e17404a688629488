"""The bench: models take turns on one pipeline, and none leaves anything behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hypersd_bench.bench import Bench
from hypersd_bench.catalog.local import teacher
from hypersd_bench.catalog.spec import ModelSpec
from hypersd_bench.errors import InputError
from hypersd_bench.pipelines import load_base, vae_dtype
from hypersd_bench.runner.plan import make_plan
from hypersd_bench.runner.spec import load_spec
from hypersd_bench.sampling import lcm
from tests.tiny_base import make_tiny_base
from tests.tiny_lora import make_lora
from tests.tiny_sdxl import make_tiny_sdxl


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


def weights_of(bench: Bench, base: Path) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in bench.base(str(base)).unet.state_dict().items()}


def test_loras_and_unets_in_turn_leave_the_base_to_the_bit(base: Path, tmp_path: Path) -> None:
    lora = make_lora(base, tmp_path / "mine.safetensors", lcm((1,)))
    state = {name: weight * 1.01 for name, weight in load_base(str(base)).unet.state_dict().items()}
    save_file(state, tmp_path / "unet.safetensors")
    models = [
        ModelSpec("lora", "lora", str(base), "lora", lcm((1,)), weights=lora),
        ModelSpec("unet", "unet", str(base), "unet", lcm((1,)), weights=tmp_path / "unet.safetensors"),
        teacher(str(base)),
    ]
    bench = Bench()
    before = weights_of(bench, base)
    for model in (*models, *reversed(models)):
        pipe = bench.seat(model, str(base))
        same = all(torch.equal(weight, before[name]) for name, weight in pipe.unet.state_dict().items())
        assert same == (model.kind == "base")
        assert pipe is bench.seat(model, str(base))  # seated already
    after = bench.base(str(base)).unet.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_a_device_with_a_number_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for device in ("cpu", "cuda", "cuda:1"):
        Bench(device)
    assert chosen == [torch.device("cuda:1")]


def test_a_pipeline_that_predicts_v_is_refused_under_a_contract_for_eps(base: Path, tmp_path: Path) -> None:
    folder = make_tiny_base(tmp_path / "v")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    with pytest.raises(InputError, match=r"predicts v, and the contract says epsilon.*force: true"):
        Bench().seat(teacher(str(folder)), str(folder))
    asked = {"name": "teacher", "sampler": {"prediction_type": "v_prediction"}}
    raw = {"base": str(folder), "models": [asked], "steps": [1], "force": True}
    (configuration,) = make_plan(load_spec(None, raw)).configurations
    assert Bench().seat(configuration.model, str(folder))


def test_only_sdxls_own_autoencoder_stays_in_float32(base: Path, tmp_path: Path) -> None:
    sdxl = make_tiny_sdxl(tmp_path / "sdxl")
    assert vae_dtype(str(sdxl), torch.float16) == torch.float32
    assert vae_dtype(str(base), torch.float16) == torch.float16  # though diffusers' default config says force_upcast
    config = sdxl / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"force_upcast": False}))
    assert vae_dtype(str(sdxl), torch.float16) == torch.float16


def test_out_of_memory_while_fusing_is_not_called_a_misfit(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = make_lora(base, tmp_path / "mine.safetensors", lcm((1,)))
    model = ModelSpec("lora", "lora", str(base), "lora", lcm((1,)), weights=lora)
    bench = Bench()
    before = weights_of(bench, base)

    def full(**_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench.base(str(base)), "fuse_lora", full)
    with pytest.raises(torch.OutOfMemoryError):
        bench.seat(model, str(base))
    after = bench.base(str(base)).unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_revisions_pin_what_is_on_the_hub_and_nothing_else(base: Path) -> None:
    raw = {"base": "sdxl", "models": [{"name": "turbo", "revision": "fp16"}], "steps": [1]}
    (turbo,) = make_plan(load_spec(None, raw)).configurations
    assert turbo.pipeline == "stabilityai/sdxl-turbo@fp16"
    raw["models"] = [{"name": "hyper-sd", "revision": "v1"}]
    (hyper,) = make_plan(load_spec(None, raw)).configurations
    assert str(hyper.model.weights) == "ByteDance/Hyper-SD@v1:Hyper-SDXL-1step-Unet.safetensors"
    with pytest.raises(InputError, match="revision is for weights of the hub"):
        make_plan(load_spec(None, {"base": str(base), "models": [{"name": "teacher", "revision": "x"}], "steps": [1]}))
