"""Weights by path: with their own contract, with a given one, or recognised by a published file's name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hypersd_bench.catalog.hyper_sd import models as hyper_sd
from hypersd_bench.catalog.local import local_family, parse_contract, weight_files
from hypersd_bench.errors import InputError
from hypersd_bench.runner.plan import catalogue, make_plan
from hypersd_bench.runner.spec import load_spec
from hypersd_bench.sampling import METADATA_KEY, SamplerContract, lcm, tcd

KNOWN = {model.name: model for model in hyper_sd() if model.base == "sdxl"}


def weights(path: Path, tensor: str = "unet.mid.lora_A.weight", contract: SamplerContract | None = None) -> Path:
    save_file({tensor: np.zeros(1, np.float32)}, path, {METADATA_KEY: contract.to_json()} if contract else None)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lcm:steps=1-8", lcm(tuple(range(1, 9)))),
        ("tcd:steps=1,4:eta=0.5", tcd((1, 4), 0.5)),
        ("lcm:steps=4:embedded-guidance=8", lcm((4,), 8.0)),
        ("hyper-sdxl-4steps-lora", KNOWN["hyper-sdxl-4steps-lora"].contract),
    ],
)
def test_contracts_in_words(text: str, expected: SamplerContract) -> None:
    assert parse_contract(text, KNOWN) == expected


def test_a_copy_of_a_unet_that_another_program_fetched_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in ("model", "model.fp16", "model.non_ema"):
        save_file({"conv_in.weight": np.zeros(1)}, tmp_path / f"diffusion_pytorch_{name}.safetensors")
    assert [file.name for file in weight_files(tmp_path)] == ["diffusion_pytorch_model.safetensors"]


def test_a_contract_file(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(tcd((2, 4)).to_json())
    assert parse_contract("own.json", {}, tmp_path) == tcd((2, 4))
    (tmp_path / "own.yaml").write_text("scheduler: LCMScheduler\ntimesteps: {1: [800]}\n")
    assert parse_contract("own.yaml", {}, tmp_path).timesteps == {1: (800,)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lmc", "did you mean 'lcm'"),
        ("hyper-sdxl-4step-lora", "did you mean 'hyper-sdxl-4steps-lora'"),
        ("lcm:stesp=4", "did you mean 'steps'"),
        ("lcm:steps=four", "write settings as"),
        ("lcm:steps=0", "write settings as"),
        ("lcm:eta", "write settings as"),
        ("nowhere.json", "can't read contract"),
        ("broken.yaml", r"is not YAML: .*in line 1, column"),
        ("list.json", "not a sampler contract"),
    ],
)
def test_a_contract_that_is_none(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("a: [")
    (tmp_path / "list.json").write_text(json.dumps([1]))
    with pytest.raises(InputError, match=said):
        parse_contract(text, KNOWN, tmp_path)


def test_weights_without_a_contract_need_one(tmp_path: Path) -> None:
    path = weights(tmp_path / "mine.safetensors")
    with pytest.raises(InputError, match=r"carries no sampler contract.*--contract"):
        local_family(path, "mine", "sdxl", None, KNOWN.values())
    (model,) = local_family(path, "mine", "sdxl", lcm((4,)), KNOWN.values())
    assert (model.kind, model.weights, model.contract) == ("lora", path, lcm((4,)))


def test_a_unet_is_told_from_a_lora_and_from_neither(tmp_path: Path) -> None:
    unet = weights(tmp_path / "unet.safetensors", "conv_in.weight")
    assert local_family(unet, "mine", "sdxl", lcm((4,)), ())[0].kind == "unet"
    single = weights(tmp_path / "comfy.safetensors", "model.diffusion_model.input_blocks.0.0.weight")
    with pytest.raises(InputError, match="neither a LoRA nor the weights of a diffusers UNet"):
        local_family(single, "mine", "sdxl", lcm((4,)), ())
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"no \.safetensors file"):
        local_family(tmp_path / "weights.bin", "mine", "sdxl", lcm((4,)), ())


def test_a_published_file_is_recognised_by_its_name(tmp_path: Path) -> None:
    path = weights(tmp_path / "Hyper-SDXL-4steps-lora.safetensors")
    (model,) = local_family(path, "mine", "sdxl", None, KNOWN.values())
    assert model.contract == KNOWN["hyper-sdxl-4steps-lora"].contract
    assert model.weights == path
    assert "taken for hyper-sdxl-4steps-lora" in model.notes


def test_a_name_that_several_repositories_use_says_nothing(tmp_path: Path) -> None:
    known = [model for models in catalogue("sdxl").values() for model in models]
    with pytest.raises(InputError, match="carries no sampler contract"):
        local_family(weights(tmp_path / "pytorch_lora_weights.safetensors"), "mine", "sdxl", None, known)


def test_what_carries_its_contract_keeps_it(tmp_path: Path) -> None:
    path = weights(tmp_path / "Hyper-SDXL-4steps-lora.safetensors", contract=tcd((2,)))
    (model,) = local_family(path, "mine", "sdxl", lcm((4,)), KNOWN.values())
    assert model.contract == tcd((2,))  # the plan holds the given one against it


def test_of_several_checkpoints_the_one_made_for_the_step_count_is_taken() -> None:
    plan = make_plan(load_spec(None, {"base": "pocket", "models": ["hyper-sd"], "steps": [1, 4], "num_prompts": 1}))
    assert [c.model.name for c in plan.configurations] == ["hyper-sd-unified", "hyper-sd-4steps"]
