"""Bringing a plan's weights to this disk, and pinning what was a branch to the commit that it was at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hypersd_bench.catalog.local import as_its_card_says, weight_files
from hypersd_bench.catalog.spec import HubWeights
from hypersd_bench.hub import resolved_commit
from hypersd_bench.pipelines import base_folder, is_on_hub, pipeline_weights, weights_path
from hypersd_bench.runner.plan import Configuration, Plan


def bring(plan: Plan, pins: Mapping[str, str] | None = None) -> tuple[Plan, dict[str, str]]:
    """Download what is not here yet; returns the plan at fixed commits, and the pins, ``repo@revision`` to commit.

    pins: those of an earlier start, so that a run goes on with the weights that it began with.
    """
    found = dict(pins or {})
    return replace(plan, configurations=tuple(_bring(c, found) for c in plan.configurations)), found


def _bring(configuration: Configuration, pins: dict[str, str]) -> Configuration:
    model, pipeline = configuration.model, configuration.pipeline
    if is_on_hub(pipeline):
        repo, _, revision = pipeline.partition("@")
        name = f"{repo}@{revision or 'main'}"
        commit = pins.get(name) or resolved_commit(base_folder(pipeline))
        pins[name] = commit
        pipeline = f"{repo}@{commit}"
    base_folder(pipeline)
    if isinstance(model.weights, HubWeights):
        name = f"{model.weights.repo}@{model.weights.revision}"
        commit = pins.get(name) or resolved_commit(weights_path(model))
        pins[name] = commit
        model = replace(model, weights=replace(model.weights, revision=commit))
    if model.weights is not None:
        model = as_its_card_says(model, weights_path(model))
    return replace(configuration, model=model, pipeline=pipeline)


def local_weights(plan: Plan) -> list[str]:
    """The weight files that a plan gives by path, of models and pipelines, apart from the miniature's."""
    files: list[Path] = []
    for configuration in plan.configurations:
        if isinstance(configuration.model.weights, Path):
            files += weight_files(configuration.model.weights)
        if configuration.pipeline != "pocket" and not is_on_hub(configuration.pipeline):
            files += pipeline_weights(configuration.pipeline, base_folder(configuration.pipeline))
    return sorted({str(file) for file in files})
