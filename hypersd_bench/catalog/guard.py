"""The misuse guard: what a spec asks of a checkpoint against what its authors made it for.

Few-step weights hold for one scheduler, one set of timesteps and, mostly, no guidance; sampled otherwise they give bad
pictures without an error, and a comparison that nobody should read. A breach is refused, or with ``force`` recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from inspect import signature
from typing import Any

from hypersd_bench.catalog.spec import ModelSpec
from hypersd_bench.errors import InputError
from hypersd_bench.sampling import SPACINGS, SamplerContract, scheduler_class, timesteps_of

NUMBERS = ("guidance_scale", "embedded_guidance", "eta", "lora_scale")


def as_asked(
    model: ModelSpec, steps: int, changes: Mapping[str, Any], force: bool
) -> tuple[ModelSpec, tuple[str, ...]]:
    """The model with the sampler that is asked for, at one step count, and what that breaks of its contract.

    changes: fields of the contract to replace, or ``spacing``, a rule of ``sampling.SPACINGS`` or of the scheduler's
    own, from which the timesteps follow. Without ``force`` a breach raises InputError with the right call.
    """
    own = model.contract
    if not changes and steps in own.timesteps:
        return model, ()
    if steps not in own.timesteps and not force:
        own.require_steps(steps, model.name)
    asked = _changed(own.stretched(steps), steps, changes)
    if asked.eta is not None and "eta" not in signature(scheduler_class(asked.scheduler).step).parameters:
        raise InputError(f"{model.name}: {asked.scheduler} has no eta; leave it out")
    breaches = tuple(find_breaches(model, asked, steps))
    if breaches and not force:
        raise InputError(f"{model.name}: {'; '.join(breaches)}. The right call: {right_call(own, steps)}. "
                         "With --force it is run as asked, and the report says so")  # fmt: skip
    return replace(model, contract=asked), breaches


def find_breaches(model: ModelSpec, asked: SamplerContract, steps: int) -> list[str]:
    """What of an asked sampler is not as the weights were made for, each in a few words."""
    own = model.contract
    found = []
    if steps not in own.timesteps:
        made_for = ", ".join(map(str, sorted(own.timesteps)))
        found.append(f"{steps} steps from weights made for {made_for}")
    if asked.scheduler != own.scheduler:
        found.append(f"{asked.scheduler} instead of {own.scheduler}")
    elif dict(asked.settings) != dict(own.settings):
        found.append(f"scheduler settings {dict(asked.settings)} instead of {dict(own.settings)}")
    if steps in own.timesteps and asked.timesteps[steps] != own.timesteps[steps]:
        found.append(f"timesteps {list(asked.timesteps[steps])} instead of {list(own.timesteps[steps])}")
    if asked.prediction_type != own.prediction_type:
        found.append(f"prediction type {asked.prediction_type!r} instead of {own.prediction_type!r}")
    if asked.shifted_timestep != own.shifted_timestep:
        found.append(f"timesteps told shifted to {asked.shifted_timestep} instead of {own.shifted_timestep}")
    numbers = [name for name in NUMBERS if name != "eta" or asked.scheduler == own.scheduler]
    return found + [problem for name in numbers if (problem := _out_of_range(model, asked, name))]


def right_call(contract: SamplerContract, steps: int) -> str:
    """How to sample, in a few words."""
    counts = [steps] if steps in contract.timesteps else sorted(contract.timesteps)
    timesteps = " or ".join(str(list(contract.timesteps[count])) for count in counts[:3])
    words = [contract.scheduler, f"timesteps {timesteps}", f"guidance_scale {contract.guidance_scale:g}"]
    if contract.embedded_guidance is not None:
        words.append(f"embedded_guidance {contract.embedded_guidance:g}")
    if contract.eta:
        words.append(f"eta {contract.eta:g}")
    if contract.negative_prompt:
        words.append(f"negative prompt {contract.negative_prompt!r}")
    return ", ".join(words)


def _changed(own: SamplerContract, steps: int, changes: Mapping[str, Any]) -> SamplerContract:
    """The contract with other fields; timesteps that follow from scheduler and spacing are worked out."""
    spacing = changes.get("spacing")
    fields = {key: value for key, value in changes.items() if key != "spacing"}
    if "timesteps" in fields:  # a whole contract
        return replace(own, **fields).stretched(steps)
    if fields.get("scheduler", own.scheduler) != own.scheduler:
        fields = {"settings": {}, "eta": None, **fields}  # another scheduler's own
    if spacing:
        fields["settings"] = {**fields.get("settings", own.settings), "timestep_spacing": spacing}
    asked = replace(own, **fields)
    if not spacing and asked.scheduler == own.scheduler:
        return asked
    rule = SPACINGS.get(spacing or own.spacing)
    timesteps = rule(steps) if rule and asked.takes_timesteps else timesteps_of(asked, steps)
    return replace(asked, timesteps={**own.timesteps, steps: timesteps})


def _out_of_range(model: ModelSpec, asked: SamplerContract, name: str) -> str:
    """Why a number of the sampler is outside what the weights were made for; empty when it is inside."""
    own, value = getattr(model.contract, name), getattr(asked, name)
    low, high = model.allowed.get(name, (own, own))
    if value == own or (value is not None and low is not None and low <= value <= high):
        return ""
    if name == "guidance_scale" and own <= 1 and high <= 1:  # 0 and 1 both mean none
        return "" if value <= 1 else f"guidance_scale {value:g} on weights made to be sampled without guidance"
    wanted = "none" if own is None else f"{low:g}" if low == high else f"{low:g} to {high:g}"
    return f"{name} {'none' if value is None else f'{value:g}'} instead of {wanted}"
