"""What a plan's models are made of: what of it is on this disk, and what must come."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hypersd_bench import registry
from hypersd_bench.catalog.local import weight_files
from hypersd_bench.catalog.spec import HubWeights, ModelSpec
from hypersd_bench.contracts import MetricContext, MetricInfo
from hypersd_bench.errors import InputError
from hypersd_bench.hub import check_whole, hub_status, look_up, resolved_commit
from hypersd_bench.pipelines import base_folder, is_on_hub, pipeline_weights, weights_path
from hypersd_bench.reference import NO_REFERENCE, ReferenceSet
from hypersd_bench.runner.plan import Configuration, Plan, reference_of


@dataclass(frozen=True, kw_only=True)
class Need:
    """A pipeline, or a model's weights. name: ``repo@revision``, with ``:file`` after it, or a path.

    size: bytes of it all. lacking: bytes still to come. Both are None where that can't be told, and ``problem`` says
    why. commit: of the hub's repository; empty for what lies elsewhere.
    """

    name: str
    size: int | None
    lacking: int | None
    commit: str = ""
    problem: str = ""

    @property
    def here(self) -> bool:
        """Whether all of it is on this disk."""
        return self.lacking == 0


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What was brought to this disk. files: its weights with the SHA-256 of each, as checked."""

    name: str
    path: Path
    size: int
    commit: str
    files: Mapping[str, str]


def needs_of(plan: Plan, pins: Mapping[str, str]) -> tuple[Need, ...]:
    """Look for everything that the models of a plan are made of; nothing is downloaded.

    pins: the commits that a run has begun with (``runner.weights``).
    """
    parts = {name: (hub, paths) for c in plan.configurations for name, hub, paths in _parts(c)}
    unreachable = _unreachable() if any(hub for hub, _ in parts.values()) else ""
    found = []
    for name, (hub, paths) in parts.items():
        if hub is None:
            found.append(Need(name=name, size=sum(path.stat().st_size for path in paths), lacking=0))
            continue
        revision = pins.get(f"{hub.repo}@{hub.revision}", hub.revision)
        held = look_up(hub.repo, revision, hub.file, hub.is_folder, unreachable)
        found.append(Need(name=name, size=held.size, lacking=held.lacking, commit=held.commit, problem=held.problem))
    return tuple(found)


def _unreachable() -> str:
    """Why the hub can't be asked; empty when it can."""
    status = hub_status()
    return "" if status.answers else f"{status.endpoint} can't be asked ({status.problem}): sizes are not known"


def at_hand(configuration: Configuration, needs: Iterable[Need]) -> Configuration | None:
    """A configuration fixed to the commits that are on this disk; None where something of it is not."""
    by_name = {need.name: need for need in needs}
    model, pipeline = configuration.model, configuration.pipeline
    for name, hub, _ in _parts(configuration):
        need = by_name[name]
        if not need.here:
            return None
        if hub is None:
            continue
        if hub is model.weights:
            model = replace(model, weights=replace(hub, revision=need.commit))
        else:
            pipeline = f"{hub.repo}@{need.commit}"
    return replace(configuration, model=model, pipeline=pipeline)


def fetched(plan: Plan) -> list[Fetched]:
    """Check everything that was brought (``runner.weights.bring``): its length, and the hub's own hash of it."""
    found: dict[str, Fetched] = {}
    for configuration in plan.configurations:
        folder, model = base_folder(configuration.pipeline), configuration.model
        if configuration.pipeline not in found:
            weights = pipeline_weights(configuration.pipeline, folder)
            found[configuration.pipeline] = _checked(configuration.pipeline, folder, weights)
        if model.weights is not None and str(model.weights) not in found:
            path = weights_path(model)
            found[str(model.weights)] = _checked(str(model.weights), path, weight_files(path))
    return list(found.values())


def unscorable(plan: Plan, device: str) -> dict[str, str]:
    """The plan's metrics that can't be computed here, with the reason: each is built, and its weights are brought."""
    found = without_reference(plan.metrics, reference_of(plan))
    context = MetricContext(device)
    for info in plan.metrics:
        try:
            registry.resolve("metric", info.id)(context)
        except InputError as error:
            found[info.id] = str(error)
    return found


def without_reference(infos: Iterable[MetricInfo], reference: ReferenceSet | None) -> dict[str, str]:
    """The set metrics that have nothing to compare with, with the reason."""
    return {} if reference else {info.id: NO_REFERENCE for info in infos if info.kind == "set"}


def pixels_of(pipeline: str) -> int:
    """Width and height of the pictures of a pipeline that is on this disk, from its configuration files."""
    folder = base_folder(pipeline)
    unet, vae = (json.loads((folder / part / "config.json").read_text()) for part in ("unet", "vae"))
    doublings = len(vae["block_out_channels"]) - 1
    return int(unet.get("sample_size") or 64) * int(2**doublings)


def _checked(name: str, path: Path, weights: Sequence[Path]) -> Fetched:
    hashes = {file.name if path == file else str(file.relative_to(path)): check_whole(file) for file in weights}
    size = sum(file.stat().st_size for file in _files(path))
    return Fetched(name=name, path=path, size=size, commit=resolved_commit(path), files=hashes)


def _parts(configuration: Configuration) -> list[tuple[str, HubWeights | None, Sequence[Path]]]:
    """Pipeline and weights: the name of each, and where it is on the hub, or which files here."""
    return [_pipeline(configuration.pipeline), *_weights(configuration.model)]


def _pipeline(pipeline: str) -> tuple[str, HubWeights | None, Sequence[Path]]:
    if not is_on_hub(pipeline):
        return pipeline, None, _files(base_folder(pipeline))
    repo, _, revision = pipeline.partition("@")
    hub = HubWeights(repo, "", revision or "main")
    return str(hub), hub, ()


def _weights(model: ModelSpec) -> list[tuple[str, HubWeights | None, Sequence[Path]]]:
    if model.weights is None:
        return []
    if isinstance(model.weights, HubWeights):
        return [(str(model.weights), model.weights, ())]
    return [(str(model.weights), None, _files(model.weights))]


def _files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
