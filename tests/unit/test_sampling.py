"""Sampler contracts against diffusers' own schedulers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler, TCDScheduler
from safetensors.torch import save_file

from hypersd_bench.errors import InputError
from hypersd_bench.sampling import (
    METADATA_KEY,
    SamplerContract,
    ddim_trailing,
    euler_trailing,
    lcm,
    read_contract,
    skipping,
    tcd,
    trailing,
)

SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CONTRACTS = [ddim_trailing((1, 2, 4, 8, 25, 50)), euler_trailing((1, 2, 4, 8)), lcm((1, 2, 4, 8)), tcd((1, 2, 4, 8))]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 8, 25, 50])
def test_trailing_timesteps_are_those_of_ddim_and_euler(steps: int) -> None:
    for scheduler_class in (DDIMScheduler, EulerDiscreteScheduler):
        scheduler = scheduler_class(**SD, timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        assert [int(t) for t in scheduler.timesteps] == list(trailing(steps))


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_skipping_timesteps_are_those_lcm_and_tcd_choose(steps: int) -> None:
    for scheduler_class in (LCMScheduler, TCDScheduler):
        scheduler = scheduler_class(**SD)
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == list(skipping(steps))


def test_published_grids() -> None:
    # hyper-sd.md section 9, trap 1: the two families of grids differ
    assert skipping(4) == (999, 759, 499, 259)
    assert trailing(4) == (999, 749, 499, 249)


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.scheduler)
def test_a_contract_sets_its_own_timesteps_on_any_base(contract: SamplerContract) -> None:
    scheduler = contract.make_scheduler({**SD, "timestep_spacing": "leading", "steps_offset": 7})
    for steps, timesteps in contract.timesteps.items():
        contract.set_timesteps(scheduler, steps)
        assert [int(t) for t in scheduler.timesteps] == list(timesteps)


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.scheduler)
def test_a_contract_survives_json(contract: SamplerContract) -> None:
    assert SamplerContract.from_json(contract.to_json()) == contract


def test_an_unsupported_step_count_names_the_supported_ones() -> None:
    with pytest.raises(InputError, match=r"mine can't be sampled in 3 steps: .* 1, 2, 4, 8$"):
        lcm((8, 4, 2, 1)).require_steps(3, "mine")


def test_timesteps_that_the_scheduler_would_not_take_are_refused() -> None:
    wrong = SamplerContract("DDIMScheduler", timesteps={2: (999, 400)}, settings={"timestep_spacing": "trailing"})
    with pytest.raises(InputError, match="contract says"):
        wrong.set_timesteps(wrong.make_scheduler(SD), 2)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"timesteps": {"x": [1]}, "scheduler": "s"}', '{"timesteps": 3}'])
def test_what_is_no_contract_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="not a sampler contract"):
        SamplerContract.from_json(text)


def test_contract_in_a_file_and_what_can_be_wrong_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({"a": torch.ones(4)}, path, {METADATA_KEY: tcd((4,)).to_json()})
    assert read_contract(path) == tcd((4,))
    whole = path.read_bytes()
    for broken in (whole[:-1], whole + b"x", whole[:5], b"", b"\xff" * 64, json.dumps({}).encode()):
        path.write_bytes(broken)
        with pytest.raises(InputError, match="not a whole safetensors file"):
            read_contract(path)
    save_file({"a": torch.ones(4)}, path)
    with pytest.raises(InputError, match="carries no sampler contract"):
        read_contract(path)
    with pytest.raises(InputError, match="can't read"):
        read_contract(tmp_path / "absent.safetensors")


def test_a_negative_prompt_is_named_only_where_there_is_one() -> None:
    """A run's fingerprint is of this text: what was made before the field was there must stay what it is."""
    plain = lcm((4,))
    assert "negative_prompt" not in plain.to_json()
    guided = replace(ddim_trailing((25,)), guidance_scale=5.0, negative_prompt="blurry")
    for contract in (plain, guided):
        assert SamplerContract.from_json(contract.to_json()) == contract
