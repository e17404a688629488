"""The catalogue of published checkpoints: against diffusers' schedulers, and against facts typed here a second time."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import diffusers
import pytest
import torch
from click.testing import CliRunner

from hypersd_bench import registry
from hypersd_bench.catalog import base as bases
from hypersd_bench.catalog.published import TABLES, UNSTATED
from hypersd_bench.catalog.spec import HubWeights, ModelSpec
from hypersd_bench.cli.list import list_command
from hypersd_bench.runner.plan import make_plan
from hypersd_bench.runner.spec import RunSpec
from hypersd_bench.sampling import SamplerContract

SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
MODELS = [
    model
    for row in registry.FAMILIES
    if row != "pocket"
    for model in registry.resolve("family", row)()
]  # fmt: skip
BY_NAME = {(model.base, model.name): model for model in MODELS}
CFG_FREE = {
    "hyper-sd", "hyper-sd-unified", "lightning", "lightning-lora", "lcm", "lcm-unet", "tcd", "turbo", "pcm",
    "pcm-lcmlike", "dmd2", "dmd2-lora", "flash", "nitro-realism", "nitro-vibrant", "tdm",
}  # fmt: skip
each_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{model.base}-{model.name}")


def picked(base: str, family: str, steps: int) -> ModelSpec:
    spec = RunSpec.model_validate({"base": base, "models": [{"name": family, "steps": [steps]}]})
    return make_plan(spec).configurations[0].model


def made(contract: SamplerContract) -> Any:
    return contract.make_scheduler({**SD, "timestep_spacing": "leading", "steps_offset": 1})


def test_names_are_unique_within_a_base() -> None:
    assert max(Counter((model.base, model.name) for model in MODELS).values()) == 1


def test_every_family_that_the_issue_names_is_there_for_its_bases() -> None:
    found: dict[str, set[str]] = {}
    for model in MODELS:
        found.setdefault(model.family, set()).add(model.base)
    both = {"sdxl", "sd15"}
    assert found == {
        "teacher": {"sdxl", "sd15", "sd21"},
        "hyper-sd": both,
        "hyper-sd-unified": both,
        "hyper-sd-cfg": both,
        "lightning": {"sdxl"},
        "lightning-lora": {"sdxl"},
        "lcm": both,
        "lcm-unet": both,
        "tcd": {"sdxl", "sd15", "sd21"},
        "turbo": {"sdxl", "sd21"},
        "pcm": both,
        "pcm-normalcfg": both,
        "pcm-lcmlike": both,
        "dmd2": {"sdxl"},
        "dmd2-lora": {"sdxl"},
        "flash": both,
        "nitro-realism": {"sdxl"},
        "nitro-vibrant": {"sdxl"},
        "tdm": {"sd15"},
        "perflow": both,
    }


@each_model
def test_the_contract_survives_json(model: ModelSpec) -> None:
    assert SamplerContract.from_json(model.contract.to_json()) == model.contract


@each_model
def test_the_scheduler_takes_exactly_the_contracts_timesteps(model: ModelSpec) -> None:
    for steps, timesteps in model.contract.timesteps.items():
        scheduler = made(model.contract)
        model.contract.set_timesteps(scheduler, steps, model.name)
        assert [round(float(t)) for t in scheduler.timesteps] == list(timesteps)
        assert len(timesteps) == steps


@each_model
def test_the_scheduler_gives_the_timesteps_by_itself_unless_they_are_the_authors_own(model: ModelSpec) -> None:
    authors_own = model.family.startswith("dmd2") or model.name == "hyper-sdxl-1step-unet"
    for steps, timesteps in model.contract.timesteps.items():
        scheduler = made(model.contract)
        scheduler.set_timesteps(steps)
        agrees = [round(float(t)) for t in scheduler.timesteps] == list(timesteps)
        assert agrees is not authors_own


@each_model
def test_the_scheduler_knows_every_setting(model: ModelSpec) -> None:
    scheduler = made(model.contract)
    for key, value in {**model.contract.settings, "prediction_type": model.contract.prediction_type}.items():
        assert scheduler.config[key] == value
    assert model.contract.scheduler == type(scheduler).__name__
    if model.family != "perflow":
        assert type(scheduler) is getattr(diffusers, model.contract.scheduler)


@each_model
def test_sampling_with_a_perfect_eps_ends_at_the_clean_picture(model: ModelSpec) -> None:
    # A model of one point: eps that leads back to it from anywhere (x0 itself for a UNet that predicts it).
    contract = model.contract
    if contract.scheduler == "PeRFlowScheduler" or contract.shifted_timestep or contract.timesteps == {1: (800,)}:
        pytest.skip("eps of this model is not that of its timestep")
    steps = max(contract.timesteps)
    scheduler = made(contract)
    contract.set_timesteps(scheduler, steps)
    generator = torch.Generator().manual_seed(0)
    point = torch.randn(1, 4, 8, 8, generator=generator)
    x = torch.randn(1, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
    abar = scheduler.alphas_cumprod
    options: dict[str, Any] = {} if contract.eta is None else {"eta": contract.eta}
    if contract.scheduler != "DDIMScheduler":
        options["generator"] = generator
    for t in scheduler.timesteps:
        x_in, a = scheduler.scale_model_input(x, t), abar[int(t)]
        eps = (x_in - a.sqrt() * point) / (1 - a).sqrt()
        output = point if contract.prediction_type == "sample" else eps
        x = scheduler.step(output, t, x, return_dict=False, **options)[0]
    assert (x - point).abs().max() < 0.15  # schedulers that stop at abar_0 leave 3 % of the noise


@pytest.mark.parametrize("name", ["nitrosd-realism", "nitrosd-vibrant"])
def test_eps_of_a_unet_that_is_told_a_shifted_timestep_is_converted_at_that_timestep(name: str) -> None:
    # As the authors' TimestepShiftLCMScheduler: x0 at the timestep told, new noise at the grid's own next one.
    contract = BY_NAME["sdxl", name].contract
    scheduler = made(contract)
    contract.set_timesteps(scheduler, 4)
    told = [contract.told_timestep(int(t)) for t in scheduler.timesteps]
    assert told == {"nitrosd-realism": [249, 187, 124, 62], "nitrosd-vibrant": [499, 374, 249, 124]}[name]
    abar = scheduler.alphas_cumprod
    for step, t in enumerate(scheduler.timesteps):
        x, eps = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(step))
        after, x0 = scheduler.step(
            eps, contract.told_timestep(t), x, return_dict=False, generator=torch.Generator().manual_seed(9)
        )
        a = abar[told[step]]
        torch.testing.assert_close(x0, (x - (1 - a).sqrt() * eps) / a.sqrt(), rtol=0, atol=1e-4)
        if step < 3:
            b = abar[(999, 749, 499, 249)[step + 1]]
            noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
            torch.testing.assert_close(after, b.sqrt() * x0 + (1 - b).sqrt() * noise, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("base", "family", "steps", "timesteps"),
    [  # where the authors' grids differ: two that index 50 points, trailing ones, and those told
        ("sdxl", "lcm", 4, (999, 759, 499, 259)),
        ("sdxl", "tcd", 4, (999, 759, 499, 259)),
        ("sdxl", "tcd", 8, (999, 879, 759, 639, 499, 379, 259, 139)),
        ("sdxl", "hyper-sd-unified", 8, (999, 879, 759, 639, 499, 379, 259, 139)),
        ("sd15", "hyper-sd-unified", 4, (999, 759, 499, 259)),
        ("sdxl", "flash", 4, (999, 759, 499, 259)),
        ("sdxl", "hyper-sd", 4, (999, 749, 499, 249)),
        ("sdxl", "hyper-sd", 8, (999, 874, 749, 624, 499, 374, 249, 124)),
        ("sdxl", "lightning", 4, (999, 749, 499, 249)),
        ("sdxl", "lightning-lora", 8, (999, 874, 749, 624, 499, 374, 249, 124)),
        ("sdxl", "pcm", 4, (999, 749, 499, 249)),
        ("sdxl", "turbo", 4, (999, 749, 499, 249)),
        ("sdxl", "dmd2", 4, (999, 749, 499, 249)),
        ("sdxl", "dmd2-lora", 4, (999, 749, 499, 249)),
        ("sdxl", "dmd2", 1, (399,)),
        ("sdxl", "hyper-sd", 1, (800,)),
        ("sd15", "hyper-sd", 1, (999,)),
        ("sdxl", "lightning", 1, (999,)),
        ("sdxl", "nitro-realism", 3, (999, 749, 499)),
        ("sdxl", "nitro-vibrant", 4, (999, 749, 499, 249)),
        ("sd15", "tdm", 4, (999, 749, 500, 250)),
        ("sd15", "perflow", 4, (1000, 750, 500, 250)),
    ],
)
def test_timesteps_are_the_authors(base: str, family: str, steps: int, timesteps: tuple[int, ...]) -> None:
    assert picked(base, family, steps).contract.timesteps[steps] == timesteps


@pytest.mark.parametrize(
    ("base", "family", "steps", "name"),
    [
        ("sdxl", "hyper-sd", 1, "hyper-sdxl-1step-unet"),
        ("sd15", "hyper-sd", 1, "hyper-sd15-1step-lora"),
        ("sdxl", "hyper-sd", 2, "hyper-sdxl-2steps-lora"),
        ("sd15", "hyper-sd", 8, "hyper-sd15-8steps-lora"),
        ("sdxl", "hyper-sd-unified", 1, "hyper-sdxl-unified-lora"),
        ("sdxl", "hyper-sd-cfg", 8, "hyper-sdxl-8steps-cfg-lora"),
        ("sdxl", "lightning", 1, "sdxl-lightning-1step-unet"),
        ("sdxl", "lightning", 4, "sdxl-lightning-4step-unet"),
        ("sdxl", "lightning-lora", 4, "sdxl-lightning-4step-lora"),
        ("sdxl", "lcm", 4, "lcm-lora-sdxl"),
        ("sdxl", "lcm-unet", 4, "lcm-sdxl-unet"),
        ("sdxl", "dmd2", 1, "dmd2-sdxl-1step-unet"),
        ("sdxl", "dmd2", 4, "dmd2-sdxl-4step-unet"),
        ("sdxl", "pcm", 8, "pcm-sdxl-smallcfg-8step"),
        ("sd21", "teacher", 50, "teacher"),
    ],
)
def test_a_familys_curve_picks_the_checkpoint_made_for_the_steps(base: str, family: str, steps: int, name: str) -> None:
    assert picked(base, family, steps).name == name


@each_model
def test_guidance_is_off_where_the_authors_sample_without_it(model: ModelSpec) -> None:
    assert (model.contract.guidance_scale <= 1) is (model.family in CFG_FREE)


def test_what_each_family_leaves_open() -> None:
    found = {(m.family, m.base): dict(m.allowed) for m in MODELS if m.allowed and m.family != "pcm-normalcfg"}
    guidance, eta = "guidance_scale", {"eta": (0, 1)}
    assert {family for family, _ in found} == {
        "hyper-sd", "hyper-sd-unified", "hyper-sd-cfg", "lcm", "lcm-unet", "tcd", "pcm", "pcm-lcmlike", "dmd2-lora",
        "perflow",
    }  # fmt: skip
    assert found["lcm", "sdxl"] == {guidance: (1, 2)}
    assert found["lcm-unet", "sdxl"] == {"embedded_guidance": (3, 13)}
    assert found["hyper-sd-cfg", "sdxl"] == {guidance: (5, 8)}
    assert found["hyper-sd-unified", "sd15"] == found["tcd", "sd21"] == eta
    assert found["dmd2-lora", "sdxl"] == {"lora_scale": (0.5, 1)}
    assert found["pcm", "sd15"] == {guidance: (1, 2)}
    assert ("hyper-sd", "sdxl") not in found


@each_model
def test_a_contracts_own_numbers_are_within_what_is_allowed(model: ModelSpec) -> None:
    for name, (low, high) in model.allowed.items():
        own = getattr(model.contract, name)
        none = name == "guidance_scale" and own == 0 and low <= 1  # 0 and 1 both mean none
        assert none or low <= own <= high


def test_the_rest_of_the_known_recipes() -> None:
    def contract(base: str, name: str) -> SamplerContract:
        found: SamplerContract = BY_NAME[base, name].contract
        return found

    assert contract("sdxl", "sdxl-lightning-1step-unet").prediction_type == "sample"
    assert contract("sdxl", "sdxl-lightning-2step-unet").prediction_type == "epsilon"
    assert contract("sdxl", "hyper-sdxl-unified-lora").eta == 1
    assert contract("sdxl", "tcd-sdxl-lora").eta == 0.3
    assert contract("sdxl", "lcm-sdxl-unet").embedded_guidance == 8
    assert contract("sd15", "lcm-dreamshaper-v7").embedded_guidance == 8
    assert contract("sdxl", "nitrosd-realism").shifted_timestep == 250
    assert contract("sdxl", "nitrosd-vibrant").shifted_timestep == 500
    assert contract("sdxl", "sdxl-turbo").scheduler == "EulerAncestralDiscreteScheduler"
    assert contract("sd15", "tdm-dreamshaper-lora").scheduler == "DPMSolverMultistepScheduler"
    assert contract("sdxl", "hyper-sdxl-1step-unet").scheduler == "LCMScheduler"
    assert sorted(contract("sdxl", "lcm-lora-sdxl").timesteps) == [2, 3, 4, 5, 6, 7, 8]
    assert {25, 50} <= contract("sdxl", "teacher").timesteps.keys()
    assert all(model.contract.lora_scale == 1 for model in MODELS)


@each_model
def test_where_the_weights_are_has_the_right_form(model: ModelSpec) -> None:
    hub_id = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
    weights = model.weights
    if model.kind == "base":
        assert weights is None
        assert bool(model.pipeline) is (model.family != "teacher")
    else:
        assert isinstance(weights, HubWeights)
        assert hub_id.fullmatch(weights.repo)
        assert weights.revision == "main"  # a run pins the commit; no made-up ones here
        assert weights.is_folder or re.search(r"\.(safetensors|bin|pt)$", weights.file)
        assert model.kind == "unet" or not weights.is_folder
    assert not model.pipeline or hub_id.fullmatch(model.pipeline)


def test_weights_that_are_pickles() -> None:
    pickles = {m.name for m in MODELS if isinstance(m.weights, HubWeights) and m.weights.file.endswith((".bin", ".pt"))}
    assert pickles == {"dmd2-sdxl-1step-unet", "tdm-dreamshaper-lora"}


def test_who_was_trained_on_a_metric() -> None:
    trained = {model.family for model in MODELS if model.trained_on}
    assert trained == {"hyper-sd", "hyper-sd-unified", "hyper-sd-cfg", "nitro-vibrant"}
    rewards = ("aesthetic/laion-v1", "aesthetic/laion-v2", "image-reward/v1")
    assert {model.trained_on for model in MODELS} == {(), rewards}


def test_who_has_unconfirmed_parts() -> None:
    assert {model.family for model in MODELS if not model.unconfirmed} == {
        "lightning", "lightning-lora", "lcm", "lcm-unet", "tcd", "turbo", "pcm", "dmd2", "dmd2-lora", "flash",
        "nitro-realism", "tdm",
    }  # fmt: skip
    assert "community" in BY_NAME["sdxl", "hyper-sdxl-8steps-cfg-lora"].unconfirmed
    assert "guidance" in BY_NAME["sd15", "lcm-dreamshaper-v7"].unconfirmed
    assert BY_NAME["sd21", "sd-turbo"].unconfirmed


@each_model
def test_every_entry_says_its_licence(model: ModelSpec) -> None:
    assert model.license


@pytest.mark.parametrize("name", ["sdxl-turbo", "dmd2-sdxl-4step-lora", "flash-sdxl", "nitrosd-realism"])
def test_licences_that_forbid_selling_say_so(name: str) -> None:
    assert re.search(r"NC|non-commercial", BY_NAME["sdxl", name].license)


@pytest.mark.parametrize(
    ("base", "name", "source", "values"),
    [
        ("sdxl", "hyper-sdxl-1step-unet", "Table 2", {"CLIP": 32.85, "Aes": 5.85, "IR": 1.19, "Pick": 0.231}),
        ("sd15", "hyper-sd15-1step-lora", "Table 2", {"CLIP": 30.87, "Aes": 5.79, "IR": 0.29, "Pick": 0.215}),
        ("sd15", "lcm-lora-sdv1-5", "Table 2", {"CLIP": 30.36, "Aes": 5.66, "IR": -0.37, "Pick": 0.212}),
        ("sdxl", "sdxl-lightning-4step-lora", "Table 2", {"CLIP": 32.40, "Aes": 5.63, "IR": 0.72, "Pick": 0.229}),
        ("sdxl", "hyper-sdxl-2steps-lora", "Table 3", {"CLIP": 32.61, "Aes": 5.84, "IR": 1.04, "Pick": 0.232}),
        ("sdxl", "nitrosd-vibrant", "Table 1", {"CLIP": 0.314, "FID": 38.49, "Aes": 5.92, "IR": 0.991}),
        ("sdxl", "dmd2-sdxl-1step-unet", "DMD2", {"FID": 19.01}),
        ("sdxl", "dmd2-sdxl-4step-lora", "DMD2", {"FID": 19.68}),
        ("sdxl", "sdxl-lightning-8step-unet", "own table", {"FID": 21.43, "patch FID": 33.55, "CLIP": 25.86}),
        ("sdxl", "sdxl-lightning-8step-lora", "own table", {"FID": 22.30, "patch FID": 33.92, "CLIP": 25.77}),
        (
            "sdxl", "pcm-sdxl-smallcfg-4step", "SenseFlow",
            {"FID-T": 14.38, "patch FID-T": 17.77, "CLIP": 0.3242, "HPSv2": 0.2920, "Pick": 22.54, "IR": 0.6926},
        ),
        ("sdxl", "teacher", "UniFL", {"FID": 27.92}),
    ],
)  # fmt: skip
def test_published_values_are_the_papers(base: str, name: str, source: str, values: dict[str, float]) -> None:
    rows = [row for row in BY_NAME[base, name].published if source in row.source]
    assert values in [dict(row.values) for row in rows]


def test_the_unified_lora_has_a_published_row_at_each_of_the_papers_steps() -> None:
    rows = BY_NAME["sdxl", "hyper-sdxl-unified-lora"].published
    assert {row.steps: row.values["IR"] for row in rows} == {1: 1.06, 2: 1.15, 4: 1.15, 8: 1.14}


def test_published_rows_are_of_the_entrys_own_steps_and_name_their_protocol() -> None:
    for model in MODELS:
        for row in model.published:
            assert row.steps in model.contract.timesteps
            assert row.source
            assert row.protocol
            assert row.values


def test_every_published_row_belongs_to_an_entry_but_for_those_known_not_to() -> None:
    stated = {
        (base, family, steps) for table in TABLES for base, family, steps, _ in table.parsed() if base != UNSTATED
    }
    entries = {(model.base, model.family, steps) for model in MODELS for steps in model.contract.timesteps}
    assert stated - entries == {
        ("sdxl", "teacher", 32),  # Lightning's baseline
        ("sdxl", "teacher", 40),  # SenseFlow's
        ("sdxl", "lcm-unet", 1),  # LCM's authors say 2 to 8
        ("sdxl", "senseflow", 4),
    }


def test_each_table_has_as_many_rows_as_printed() -> None:
    assert [len(table.parsed()) for table in TABLES] == [13, 2, 8, 13, 13, 3, 4, 2, 4, 8]


def listed(*arguments: str) -> Any:
    result = CliRunner().invoke(list_command, ["models", *arguments, "--json"], catch_exceptions=False)
    return json.loads(result.output)


def test_list_chooses_by_family_and_base() -> None:
    names = [item["name"] for item in listed("--family", "hyper-sd", "--base", "sdxl")]
    assert names == [f"hyper-sdxl-{rest}" for rest in ("1step-unet", "2steps-lora", "4steps-lora", "8steps-lora")]
    assert {item["base"] for item in listed("--family", "tcd")} == {"sdxl", "sd15", "sd21", "pocket"}
    assert {item["base"] for item in listed("--base", "sd21")} == {"sd21"}


def test_list_as_json_says_everything() -> None:
    item = next(item for item in listed("--base", "sdxl") if item["name"] == "dmd2-sdxl-4step-lora")
    assert item["weights"] == "tianweiy/DMD2@main:dmd2_sdxl_4step_lora_fp16.safetensors"
    assert item["contract"]["timesteps"] == {"4": [999, 749, 499, 249]}
    assert item["allowed"] == {"lora_scale": [0.5, 1.0]}
    assert [row["values"] for row in item["published"]] == [{"FID": 19.68}]


def test_list_shows_people_what_is_unconfirmed() -> None:
    output = CliRunner().invoke(list_command, ["models", "--family", "hyper-sd-cfg", "--base", "sd15"]).output
    assert "unconfirmed" in output.splitlines()[0]
    assert "sampler: community use" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models", "--family", "hyper-sdd"], "did you mean 'hyper-sd'"),
        (["models", "--base", "sdx"], "did you mean 'sdxl'"),
        (["models", "--family", "tdm", "--base", "sdxl"], "it has some for: sd15"),
        (["metrics", "--base", "sdxl"], "choose among models"),
    ],
)
def test_list_says_what_is_wrong(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(list_command, arguments)
    assert message in str(result.exception)


def test_bases_are_those_that_the_pipelines_know() -> None:
    from hypersd_bench.pipelines import HUB_BASES

    assert bases.LICENSES.keys() == HUB_BASES.keys()
