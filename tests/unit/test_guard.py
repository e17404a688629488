"""The misuse guard: what the authors' recipes forbid is refused with the right call, or forced and recorded."""

from __future__ import annotations

from typing import Any

import pytest

from hypersd_bench import registry
from hypersd_bench.catalog.guard import as_asked
from hypersd_bench.catalog.spec import ModelSpec
from hypersd_bench.errors import InputError


def entry(name: str) -> ModelSpec:
    models: list[ModelSpec] = [model for row in registry.rows("family") for model in registry.resolve("family", row)()]
    return next(model for model in models if model.name == name)


@pytest.mark.parametrize(
    ("name", "steps", "changes", "said"),
    [
        (
            "hyper-sdxl-4steps-lora",
            4,
            {"guidance_scale": 7.5},
            "guidance_scale 7.5 on weights made to be sampled",
        ),
        (
            "hyper-sdxl-4steps-lora",
            4,
            {"scheduler": "EulerDiscreteScheduler"},
            "EulerDiscreteScheduler instead of",
        ),
        ("hyper-sdxl-4steps-lora", 4, {"spacing": "leading"}, "timesteps [750, 500, 250, 0] instead of [999, 749, 499"),
        ("sdxl-lightning-4step-unet", 4, {"spacing": "linspace"}, "timesteps [999, 666, 333, 0] instead of [999, 749"),
        (
            "sdxl-lightning-1step-unet",
            1,
            {"prediction_type": "epsilon"},
            "prediction type 'epsilon' instead of",
        ),
        ("hyper-sdxl-unified-lora", 4, {"spacing": "trailing"}, "timesteps [999, 749, 499, 249] instead of [999, 759"),
        ("lcm-sdxl-unet", 4, {"embedded_guidance": 20.0}, "embedded_guidance 20 instead of 3 to 13"),
        ("hyper-sdxl-8steps-cfg-lora", 8, {"guidance_scale": 0.0}, "guidance_scale 0 instead of 5 to 8"),
        ("hyper-sdxl-4steps-lora", 4, {"lora_scale": 0.5}, "lora_scale 0.5 instead of 1"),
        ("tcd-sdxl-lora", 4, {"eta": 1.5}, "eta 1.5 instead of 0 to 1"),
    ],
)
def test_the_usual_mistakes_are_refused_with_the_right_call(
    name: str, steps: int, changes: dict[str, Any], said: str
) -> None:
    model = entry(name)
    with pytest.raises(InputError) as caught:
        as_asked(model, steps, changes, force=False)
    assert said in str(caught.value)
    assert f"The right call: {model.contract.scheduler}, timesteps {list(model.contract.timesteps[steps])}" in str(
        caught.value
    )
    forced, breaches = as_asked(model, steps, changes, force=True)
    assert len(breaches) >= 1
    assert any(said in breach for breach in breaches)
    scheduler = forced.contract.make_scheduler({"beta_schedule": "scaled_linear"})
    forced.contract.set_timesteps(scheduler, steps)  # what is forced can be run


@pytest.mark.parametrize(
    ("name", "steps", "changes"),
    [
        ("hyper-sdxl-4steps-lora", 4, {"guidance_scale": 1.0}),  # 0 and 1 both mean none
        ("lcm-lora-sdxl", 4, {"guidance_scale": 1.5}),  # the card's own range
        ("tcd-sdxl-lora", 8, {"eta": 0.9}),
        ("hyper-sdxl-unified-lora", 8, {"eta": 0.3}),
        ("hyper-sdxl-8steps-cfg-lora", 8, {"guidance_scale": 7.5}),
        ("sdxl-lightning-4step-unet", 4, {"spacing": "trailing"}),  # its own
    ],
)
def test_what_the_recipe_leaves_open_may_be_chosen(name: str, steps: int, changes: dict[str, Any]) -> None:
    model, breaches = as_asked(entry(name), steps, changes, force=False)
    assert breaches == ()
    for field, value in changes.items():
        assert field == "spacing" or getattr(model.contract, field) == value


def test_a_step_count_the_weights_were_not_made_for() -> None:
    lightning = entry("sdxl-lightning-4step-unet")
    with pytest.raises(InputError, match="can't be sampled in 8 steps: its weights were made for 4"):
        as_asked(lightning, 8, {}, force=False)
    forced, breaches = as_asked(lightning, 8, {}, force=True)
    assert breaches == ("8 steps from weights made for 4",)
    assert forced.contract.timesteps[8] == (999, 874, 749, 624, 499, 374, 249, 124)
    with pytest.raises(InputError, match="follow no rule that gives 4 steps"):  # [800]: nobody knows the next
        as_asked(entry("hyper-sdxl-1step-unet"), 4, {}, force=True)


def test_an_eta_belongs_to_its_scheduler() -> None:
    lora = entry("hyper-sdxl-4steps-lora")
    forced, _ = as_asked(lora, 4, {"scheduler": "EulerDiscreteScheduler"}, force=True)
    assert (lora.contract.eta, forced.contract.eta) == (0.0, None)
    with pytest.raises(InputError, match="EulerDiscreteScheduler has no eta; leave it out"):
        as_asked(lora, 4, {"scheduler": "EulerDiscreteScheduler", "eta": 0.5}, force=True)


def test_a_scheduler_nobody_knows() -> None:
    with pytest.raises(InputError, match="did you mean 'DDIMScheduler'"):
        as_asked(entry("hyper-sdxl-4steps-lora"), 4, {"scheduler": "DDIMSheduler"}, force=True)
    with pytest.raises(InputError, match="unknown scheduler"):
        as_asked(entry("hyper-sdxl-4steps-lora"), 4, {"scheduler": "StableDiffusionPipeline"}, force=True)
