"""RunSpec to Plan: every name resolved, every file checked, before anything is generated."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hypersd_bench import provenance, registry
from hypersd_bench.catalog.base import distilled_family, teacher, weight_files
from hypersd_bench.catalog.spec import ModelSpec
from hypersd_bench.contracts import MetricInfo
from hypersd_bench.errors import InputError, unknown_name
from hypersd_bench.pipelines import base_folder
from hypersd_bench.prompts import PromptSet, load_prompts
from hypersd_bench.runner.spec import Contrast, ModelRef, RunSpec


@dataclass(frozen=True)
class Configuration:
    """One column of the benchmark: a model, called ``label``, at one step count."""

    label: str
    model: ModelSpec
    steps: int


@dataclass(frozen=True)
class Plan:
    """What a run will do."""

    spec: RunSpec
    configurations: tuple[Configuration, ...]
    prompts: PromptSet
    metrics: tuple[MetricInfo, ...]
    baseline: str
    contrasts: tuple[Contrast, ...] = ()

    @property
    def num_images(self) -> int:
        """Images in all."""
        return len(self.configurations) * len(self.prompts.prompts) * self.spec.replicates


def make_plan(spec: RunSpec, folder: Path = Path()) -> Plan:
    """Resolve a spec; relative paths are taken from ``folder``, where the spec lies."""
    known = catalogue(spec.base)
    configurations = [c for ref in spec.models for c in _configurations(ref, spec, known, folder)]
    labels = list(dict.fromkeys(c.label for c in configurations))
    if len({(c.label, c.steps) for c in configurations}) < len(configurations):
        raise InputError("a model is named twice at the same step count; give one of them another name")
    if spec.baseline and spec.baseline not in labels:
        raise unknown_name("baseline", spec.baseline, labels)
    base_folder(spec.base)
    return Plan(
        spec=spec,
        configurations=tuple(configurations),
        prompts=load_prompts(spec.prompts, folder).first(spec.num_prompts),
        metrics=metric_infos(spec.metrics),
        baseline=spec.baseline or labels[0],
        contrasts=_contrasts(spec, configurations),
    )


def catalogue(base: str) -> dict[str, list[ModelSpec]]:
    """The models known for a base, by family: those of the catalogue, and always its own teacher."""
    families: dict[str, list[ModelSpec]] = {"teacher": [teacher(base)]} if base != "pocket" else {}
    for row in registry.rows("family"):
        for model in registry.resolve("family", row)():
            if model.base == base:
                families.setdefault(model.family, []).append(model)
    return families


def metric_infos(ids: Iterable[str]) -> tuple[MetricInfo, ...]:
    """What the named metrics say of themselves; raises InputError for an unknown one."""
    return tuple(registry.resolve("metric", id).info for id in ids)


def manifest(plan: Plan, device: str, out: Path) -> dict[str, Any]:
    """What ``run.json`` holds."""
    return {
        "spec": plan.spec.model_dump(mode="json", exclude={"out"}),
        "spec_hash": _spec_hash(plan),
        "provenance": provenance.collect(device).to_json(),
        "models": [_describe(plan, label, out) for label in dict.fromkeys(c.label for c in plan.configurations)],
        "prompts": {
            "id": plan.prompts.id,
            "count": len(plan.prompts.prompts),
            "sha256": plan.prompts.sha256,
        },
        "metrics": [asdict(info) for info in plan.metrics],
        "baseline": plan.baseline,
        "contrasts": [contrast.model_dump(mode="json") for contrast in plan.contrasts],
        "notes": list(dict.fromkeys(c.model.notes for c in plan.configurations if c.model.notes)),
    }


def _configurations(
    ref: ModelRef, spec: RunSpec, known: dict[str, list[ModelSpec]], folder: Path
) -> list[Configuration]:
    if ref.path is not None:
        path = (folder / ref.path).expanduser()
        if not path.exists():
            raise InputError(f"model {ref.name!r}: no file or folder {path}")
        candidates = distilled_family(path, ref.name, spec.base)
    elif ref.name in known:
        candidates = known[ref.name]
    else:
        raise unknown_name("model", ref.name, known, f"the catalogue of base {spec.base!r}")
    return [Configuration(ref.name, _pick(ref.name, candidates, steps), steps) for steps in ref.steps or spec.steps]


def _contrasts(spec: RunSpec, configurations: Iterable[Configuration]) -> tuple[Contrast, ...]:
    """The spec's contrasts with their step counts; raises InputError for one that the run can't answer."""
    steps: dict[str, list[int]] = defaultdict(list)
    for configuration in configurations:
        steps[configuration.label].append(configuration.steps)
    names = [contrast.name for contrast in spec.contrasts]
    for contrast in spec.contrasts:
        if names.count(contrast.name) > 1:
            raise InputError(f"two contrasts are called {contrast.name!r}; give one of them another name")
        if contrast.model == contrast.against:
            raise InputError(f"contrast {contrast.name!r} compares {contrast.model} with itself; name another model")
        for label in (contrast.model, contrast.against):
            if label not in steps:
                raise unknown_name("model", label, steps, f"contrast {contrast.name!r}")
    return tuple(contrast.model_copy(update={"steps": _shared_steps(contrast, steps)}) for contrast in spec.contrasts)


def _shared_steps(contrast: Contrast, steps: Mapping[str, Iterable[int]]) -> tuple[int, ...]:
    """A contrast's step counts, each of them run by both of its models."""
    shared = sorted(set(steps[contrast.model]) & set(steps[contrast.against]))
    lacking = sorted(set(contrast.steps or ()) - set(shared))
    if lacking or not shared:
        raise InputError(
            f"contrast {contrast.name!r}: {contrast.model} and {contrast.against} aren't both run at "
            f"{', '.join(map(str, lacking)) or 'any one number of'} steps; "
            f"they share: {', '.join(map(str, shared)) or 'none'}"
        )
    return tuple(sorted(set(contrast.steps or shared)))


def _pick(name: str, candidates: list[ModelSpec], steps: int) -> ModelSpec:
    """The checkpoint made for a step count; of several, the one made for it most exactly."""
    fitting = [model for model in candidates if steps in model.contract.timesteps]
    if fitting:
        return min(fitting, key=lambda model: len(model.contract.timesteps))
    timesteps = {count: ts for model in candidates for count, ts in model.contract.timesteps.items()}
    replace(candidates[0].contract, timesteps=timesteps).require_steps(steps, name)
    raise AssertionError("require_steps refuses a step count that no checkpoint has")


def _describe(plan: Plan, label: str, out: Path) -> dict[str, Any]:
    mine = [c for c in plan.configurations if c.label == label]
    first = mine[0].model
    timesteps = {c.steps: c.model.contract.timesteps[c.steps] for c in mine}
    training = next((c.model.training for c in mine if c.model.training), None)
    return {
        "name": label,
        "label": label,
        "family": first.family,
        "steps": sorted(timesteps),
        "contract": asdict(replace(first.contract, timesteps=timesteps)),
        "checkpoints": {str(c.steps): {**_checkpoint(c.model), "card": dict(c.model.card)} for c in mine},
        "license": first.license,
        "trained_on": sorted({metric for c in mine for metric in c.model.trained_on}),
        "training": os.path.relpath(training, out) if training else None,
        "notes": first.notes,
    }


def _checkpoint(model: ModelSpec) -> dict[str, str]:
    """A model's weights; a sharded UNet's hash is that of its files' hashes."""
    if model.weights is None:
        return {"name": model.name, "file": "", "sha256": ""}
    hashes = [provenance.sha256(file) for file in weight_files(model.weights)]
    sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    return {"name": model.name, "file": model.weights.name, "sha256": sha256}


def _spec_hash(plan: Plan) -> str:
    """Hash of everything that decides the images; metrics, timing and batch size may change between starts."""
    base = base_folder(plan.spec.base)
    decisive = {
        "base": {str(path.relative_to(base)): provenance.sha256(path) for path in sorted(base.rglob("*.safetensors"))},
        "configurations": [
            [c.label, c.steps, _checkpoint(c.model), c.model.contract.to_json()] for c in plan.configurations
        ],
        "prompts": plan.prompts.sha256,
        "replicates": plan.spec.replicates,
        "seed": plan.spec.seed,
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
