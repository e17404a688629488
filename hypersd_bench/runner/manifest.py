"""What ``run.json`` holds: all that a reader needs to repeat a run, and what decides whether a run may go on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from hypersd_bench import provenance
from hypersd_bench.catalog.local import weight_files
from hypersd_bench.catalog.spec import HubWeights, ModelSpec
from hypersd_bench.errors import InputError
from hypersd_bench.hub import check_whole, resolved_commit
from hypersd_bench.pipelines import DTYPES, base_folder, pipeline_weights, vae_dtype, weights_path
from hypersd_bench.runner.plan import Configuration, Plan
from hypersd_bench.store import RunStore

VERSION = 2
KEPT = ("timing", "workers", "extractors", "canaries")  # what later phases of a run enter


def manifest(plan: Plan, device: str, out: Path) -> dict[str, Any]:
    """What ``run.json`` holds of a plan whose weights are on this disk (``runner.weights.bring``)."""
    pipeline_hash = cache(_pipeline_hash)
    configurations = {str(c): _configuration(c, pipeline_hash(c.pipeline)) for c in plan.configurations}
    return {
        "version": VERSION,
        "spec": plan.spec.model_dump(mode="json", exclude={"out"}),
        "spec_hash": _spec_hash(plan, configurations),
        "provenance": provenance.collect(device).to_json(),
        "configurations": configurations,
        "models": [_describe(plan, label, out) for label in plan.labels],
        "prompts": _describe_prompts(plan),
        "metrics": [asdict(info) for info in plan.metrics],
        "baseline": plan.baseline,
        "contrasts": [contrast.model_dump(mode="json") for contrast in plan.contrasts],
        "notes": _notes(plan),
    }


def extended(store: RunStore, wanted: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The manifest of a run that goes on under a spec: with more prompts, replicates, models or step counts, or none.

    Raises InputError naming what would no longer be comparable: other noise, another text for a prompt, other weights,
    sampler or precision for a model.
    """
    old, folder = store.manifest, store.folder
    if old.get("version") != VERSION:
        raise InputError(f"{folder} is a run of another version; it can be scored and reported, not gone on with: "
                         "choose another --out")  # fmt: skip
    if old["spec"]["seed"] != wanted["spec"]["seed"]:
        raise _another_spec(folder, f"its seed is {old['spec']['seed']}, not {wanted['spec']['seed']}")
    for name, made in old["configurations"].items():
        asked = wanted["configurations"].get(name, made)
        if asked["fingerprint"] != made["fingerprint"]:
            unlike = [key for key in made if asked[key] != made[key] and key != "fingerprint"]
            raise _another_spec(folder, f"{name} was made with another {' and '.join(unlike)}")
    texts = {prompt.id: prompt.text for prompt in plan.prompts.prompts}
    for row in store.images():
        if texts.get(row.prompt_id, row.prompt) != row.prompt:
            why = f"its prompts are {old['prompts']['id']}, where {row.prompt_id} is {row.prompt!r}"
            raise _another_spec(folder, why)
    return {
        **wanted,
        "spec_hash": old["spec_hash"],  # the run's identity: studies and reports refer to it
        "provenance": old["provenance"],
        "starts": _starts(old, wanted),
        "metrics": list({entry["id"]: entry for entry in (*old["metrics"], *wanted["metrics"])}.values()),
        "configurations": {**old["configurations"], **wanted["configurations"]},
        "models": _merged_models(old["models"], wanted["models"]),
        "prompts": max(wanted["prompts"], old["prompts"], key=lambda prompts: prompts["count"]),
        "notes": list(dict.fromkeys([*old["notes"], *wanted["notes"]])),
        "scored_versions": {entry["id"]: entry["version"] for entry in old["metrics"]} | old.get("scored_versions", {}),
        **{key: old[key] for key in KEPT if key in old},
    }


def _starts(old: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The provenance of later starts that differs from the one before in anything but its time."""
    starts = list(old.get("starts", []))
    before = {**(starts[-1] if starts else old["provenance"]), "created": ""}
    return starts if before == {**wanted["provenance"], "created": ""} else [*starts, wanted["provenance"]]


def _another_spec(folder: Path, why: str) -> InputError:
    return InputError(f"{folder} holds a run of another spec: {why}; choose another --out, or remove that folder")


def _merged_models(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Models of both, each with the step counts of both; what is said of a model is the newer."""
    merged = {model["name"]: model for model in old}
    for model in new:
        before = merged.get(model["name"])
        if before:
            model = {
                **model,
                "steps": sorted({*before["steps"], *model["steps"]}),
                "contracts": {**before["contracts"], **model["contracts"]},
                "checkpoints": {**before["checkpoints"], **model["checkpoints"]},
                "breaches": list(dict.fromkeys([*before["breaches"], *model["breaches"]])),
            }
        merged[model["name"]] = model
    return list(merged.values())


def _configuration(configuration: Configuration, pipeline_hash: str) -> dict[str, Any]:
    """What decides a configuration's pictures, apart from prompt and noise, and the hash of it."""
    decisive = {
        "weights": _checkpoint(configuration.model)["sha256"],
        "pipeline": pipeline_hash,
        "sampler": _sampler(configuration),
        "precision": _precision(configuration),
    }
    fingerprint = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    return {**decisive, "fingerprint": fingerprint}


def _sampler(configuration: Configuration) -> dict[str, Any]:
    """The contract as used, at its one step count."""
    contract, steps = configuration.model.contract, configuration.steps
    used: dict[str, Any] = json.loads(replace(contract, timesteps={steps: contract.timesteps[steps]}).to_json())
    return used


def _precision(configuration: Configuration) -> str:
    """Of UNet and text encoders, and of the autoencoder where it is another."""
    dtype = DTYPES[configuration.dtype]
    vae = str(vae_dtype(configuration.pipeline, dtype)).removeprefix("torch.")
    return configuration.dtype if vae == configuration.dtype else f"{configuration.dtype}, autoencoder {vae}"


def _describe(plan: Plan, label: str, out: Path) -> dict[str, Any]:
    """A model as reports know it: all of its step counts together."""
    mine = [c for c in plan.configurations if c.label == label]
    first = mine[0].model
    training = next((c.model.training for c in mine if c.model.training), None)
    return {
        "name": label,
        "label": label,
        "family": first.family,
        "steps": sorted({c.steps for c in mine}),
        "checkpoints": {str(c.steps): {**_checkpoint(c.model), "card": dict(c.model.card)} for c in mine},
        "contracts": {str(c.steps): _sampler(c) for c in mine},
        "pipeline": mine[0].pipeline,
        "license": first.license,
        "trained_on": sorted({metric for c in mine for metric in c.model.trained_on}),
        "unconfirmed": "; ".join(dict.fromkeys(c.model.unconfirmed for c in mine if c.model.unconfirmed)),
        "breaches": list(dict.fromkeys(breach for c in mine for breach in c.breaches)),
        "published": [asdict(row) for c in mine for row in c.model.published if row.steps == c.steps],
        "training": os.path.relpath(training, out) if training else None,
        "notes": first.notes,
    }


def _describe_prompts(plan: Plan) -> dict[str, Any]:
    prompts = plan.prompts
    return {
        "id": prompts.id,
        "count": len(prompts.prompts),
        "of": prompts.of or len(prompts.prompts),
        "selection": prompts.selection,
        "sha256": prompts.sha256,
        "source": prompts.source,
        "license": prompts.license,
    }


def _notes(plan: Plan) -> list[str]:
    """What a reader must know: where models come from, what of them is unconfirmed, what was forced."""
    found = [c.model.notes for c in plan.configurations if c.model.notes]
    found += [f"{c.label}: not confirmed by a primary source: {c.model.unconfirmed}." for c in plan.configurations
              if c.model.unconfirmed]  # fmt: skip
    found += [
        f"{c} was forced against its contract: {'; '.join(c.breaches)}." for c in plan.configurations if c.breaches
    ]
    return list(dict.fromkeys(found))


def _checkpoint(model: ModelSpec) -> dict[str, str]:
    """A model's weights; a sharded UNet's hash is that of its files' hashes."""
    if model.weights is None:
        return {"name": model.name, "kind": model.kind, "file": "", "sha256": "", "repo": "", "commit": ""}
    path = weights_path(model)
    on_hub = isinstance(model.weights, HubWeights)
    return {
        "name": model.name,
        "kind": model.kind,
        "file": model.weights.file if isinstance(model.weights, HubWeights) else path.name,
        "sha256": _combined_hash(weight_files(path)),
        "repo": model.weights.repo if isinstance(model.weights, HubWeights) else "",
        "commit": resolved_commit(path) if on_hub else "",
    }


def _pipeline_hash(pipeline: str) -> str:
    """The hash of all weights of a pipeline."""
    return _combined_hash(pipeline_weights(pipeline, base_folder(pipeline)))


def _combined_hash(files: Sequence[Path]) -> str:
    """The hash of a file, or of several files' hashes."""
    hashes = [check_whole(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _spec_hash(plan: Plan, configurations: Mapping[str, Any]) -> str:
    """Hash of everything that decides the images: the identity of a run. Metrics, timing and batch size are not in."""
    decisive = {
        "configurations": {name: entry["fingerprint"] for name, entry in configurations.items()},
        "prompts": plan.prompts.sha256,
        "replicates": plan.spec.replicates,
        "seed": plan.spec.seed,
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
