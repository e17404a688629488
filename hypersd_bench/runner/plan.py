"""RunSpec to Plan: every name resolved, every local file checked, before anything is downloaded or generated."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hypersd_bench import registry
from hypersd_bench.catalog.guard import as_asked
from hypersd_bench.catalog.local import local_family, parse_contract, teacher
from hypersd_bench.catalog.spec import HubWeights, ModelSpec
from hypersd_bench.contracts import MetricInfo
from hypersd_bench.errors import InputError, unknown_name
from hypersd_bench.pipelines import HUB_BASES, base_folder, is_on_hub
from hypersd_bench.prompts import PromptSet, load_prompts
from hypersd_bench.reference import ReferenceSet, open_reference
from hypersd_bench.runner.spec import Contrast, ModelRef, RunSpec
from hypersd_bench.store import folder_name

MOST_SCENE_WORDS = 1000  # the miniature's vocabulary has some 300 tokens, CLIP's 49,408


@dataclass(frozen=True)
class Configuration:
    """One column of the benchmark: a model, called ``label``, at one step count.

    pipeline: the folder or hub id it runs in. dtype: precision of its UNet and text encoders. breaches: what of its
    contract the spec breaks, by force.
    """

    label: str
    model: ModelSpec
    steps: int
    pipeline: str
    dtype: str = "float32"
    breaches: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.label}@{self.steps}"


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

    @property
    def labels(self) -> list[str]:
        """The models' labels, in the spec's order."""
        return list(dict.fromkeys(c.label for c in self.configurations))


def make_plan(spec: RunSpec, folder: Path = Path(), device: str = "cpu") -> Plan:
    """Resolve a spec for a device; relative paths are taken from ``folder``, where the spec lies."""
    known = catalogue(spec.base)
    spec = spec.model_copy(update={"reference": _reference(spec.reference, folder)})
    pipeline = _pipeline(spec, folder)
    configurations = [
        configuration
        for ref in spec.models
        for configuration in _configurations(ref, spec, known, folder, pipeline, device)
    ]
    labels = list(dict.fromkeys(c.label for c in configurations))
    twice = [name for name, count in Counter(map(str, configurations)).items() if count > 1]
    if twice:
        raise InputError(f"{twice[0]} is named twice; drop one, or in a spec give it another 'name' beside its 'path'")
    _require_folders(labels)
    if spec.baseline and spec.baseline not in labels:
        raise unknown_name("baseline", spec.baseline, labels)
    if not is_on_hub(pipeline):
        base_folder(pipeline)
    prompts_file = folder / spec.prompts_file if spec.prompts_file else None
    prompts = load_prompts(spec.prompts, folder, prompts_file)
    return Plan(
        spec=spec,
        configurations=tuple(configurations),
        prompts=prompts.select(spec.num_prompts, spec.selection, spec.seed),
        metrics=metric_infos(spec.metrics),
        baseline=spec.baseline or labels[0],
        contrasts=_contrasts(spec, configurations),
    )


def catalogue(base: str) -> dict[str, list[ModelSpec]]:
    """The models known for a base, by family: those of the catalogue, and always its own teacher."""
    families: dict[str, list[ModelSpec]] = {}
    for row in registry.rows("family"):
        for model in registry.resolve("family", row)():
            if model.base == base:
                families.setdefault(model.family, []).append(model)
    return families if "teacher" in families else {"teacher": [teacher(base)], **families}


def metric_infos(ids: Iterable[str]) -> tuple[MetricInfo, ...]:
    """What the named metrics say of themselves; raises InputError for an unknown one."""
    return tuple(registry.resolve("metric", id).info for id in ids)


def reference_of(plan: Plan) -> ReferenceSet | None:
    """What a plan's set metrics compare with; None where they have nothing to."""
    scenes = draw_scenes(configuration.pipeline for configuration in plan.configurations)
    return open_reference(plan.spec.reference, scenes)


def draw_scenes(pipelines: Iterable[str]) -> bool:
    """Whether all of these draw the miniature's scenes: their text encoder knows little else than its captions."""
    return all(pipeline == "pocket" or 0 < _vocabulary(pipeline) < MOST_SCENE_WORDS for pipeline in set(pipelines))


def by_pipeline(configurations: Sequence[Configuration]) -> list[Configuration]:
    """Configurations in an order that loads each pipeline once, and seats each checkpoint once."""
    pipelines = list(dict.fromkeys((c.pipeline, c.dtype) for c in configurations))
    seats = list(dict.fromkeys(c.model.name for c in configurations))
    return sorted(configurations, key=lambda c: (pipelines.index((c.pipeline, c.dtype)), seats.index(c.model.name)))


def require_device(plan: Plan, device: str) -> None:
    """Raise InputError where a plan asks for a precision that the device has no arithmetic for."""
    if lacks_arithmetic(plan, device):
        raise InputError(
            "float16 needs a GPU, and this run is on the CPU: run it on a machine with CUDA (see: hypersd-bench "
            "doctor), or say --dtype float32, which is slow for models of SDXL's size"
        )


def lacks_arithmetic(plan: Plan, device: str) -> bool:
    """Whether a plan asks for a precision that the device can't compute in at a usable speed."""
    return device.startswith("cpu") and any(c.dtype == "float16" for c in plan.configurations)


def _dtype(dtype: str | None, base: str, device: str) -> str:
    """The precision to compute in: what is asked for, else what is usual on the device."""
    return dtype or ("float32" if device.startswith("cpu") or base == "pocket" else "float16")


def _reference(reference: Path | None, folder: Path) -> Path | None:
    """The reference as an absolute path; raises InputError unless it is one."""
    if reference is None:
        return None
    found = (folder / reference.expanduser()).resolve()
    open_reference(found, scenes=False)
    return found


def _vocabulary(pipeline: str) -> int:
    """How many tokens the text encoder of a pipeline on this disk knows; 0 where that can't be told."""
    try:
        config = (Path(pipeline).expanduser() / "text_encoder" / "config.json").read_text(encoding="utf-8")
        return int(json.loads(config)["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _pipeline(spec: RunSpec, folder: Path) -> str:
    """Where the base's own pipeline is: relative folders are taken from the spec's."""
    if spec.pipeline and not is_on_hub(spec.pipeline):
        return str((folder / spec.pipeline).expanduser())
    return spec.pipeline or HUB_BASES.get(spec.base, spec.base)


def _configurations(
    ref: ModelRef, spec: RunSpec, known: dict[str, list[ModelSpec]], folder: Path, pipeline: str, device: str
) -> list[Configuration]:
    """A model of the spec at each of its step counts."""
    candidates = _candidates(ref, spec.base, known, folder)
    changes = _changes(ref, known, folder)
    found = []
    for steps in ref.steps or spec.steps:
        picked = _pick(ref.name, candidates, steps, spec.force)
        model, breaches = as_asked(picked, steps, changes, spec.force)
        runs_in = model.pipeline or pipeline
        if ref.revision and isinstance(model.weights, HubWeights):
            model = replace(model, weights=replace(model.weights, revision=ref.revision))
        elif ref.revision and model.kind == "base" and is_on_hub(runs_in):
            runs_in = f"{HUB_BASES.get(runs_in, runs_in).partition('@')[0]}@{ref.revision}"
        elif ref.revision:
            raise InputError(f"model {ref.name!r}: revision is for weights of the hub, and these are on this disk")
        dtype = _dtype(ref.dtype or spec.dtype, spec.base, device)
        found.append(Configuration(ref.name, model, steps, runs_in, dtype, breaches))
    return found


def _candidates(ref: ModelRef, base: str, known: dict[str, list[ModelSpec]], folder: Path) -> list[ModelSpec]:
    """The checkpoints that a model of the spec may be: those of a path, of a family, or one by its own name."""
    by_name = {model.name: model for models in known.values() for model in models}
    if ref.path is not None:
        path = (folder / ref.path).expanduser()
        if not path.exists():
            raise InputError(f"model {ref.name!r}: no file or folder {path}")
        contract = parse_contract(ref.contract, by_name, folder) if ref.contract else None
        return local_family(path, ref.name, base, contract, by_name.values())
    if ref.name in known:
        return known[ref.name]
    if ref.name in by_name:
        return [by_name[ref.name]]
    raise unknown_name("model", ref.name, [*known, *by_name], f"the catalogue of base {base!r}")


def _changes(ref: ModelRef, known: dict[str, list[ModelSpec]], folder: Path) -> dict[str, Any]:
    """What a spec changes of a model's own contract."""
    changes: dict[str, Any] = {}
    if ref.contract:
        by_name = {model.name: model for models in known.values() for model in models}
        contract = parse_contract(ref.contract, by_name, folder)
        changes = {name: getattr(contract, name) for name in asdict(contract)}
    return changes | ref.sampler.model_dump(exclude_none=True)


def _require_folders(labels: Sequence[str]) -> None:
    """Raise InputError for names that can't name a folder, or that would share one: images lie there."""
    known: dict[str, str] = {}
    for label in labels:
        if label.strip(". ") == "" or not label.isprintable() or "\\" in label:
            raise InputError(
                f"a model can't be called {label!r}: its images' folder is named after it; give another name"
            )
        other = known.setdefault(folder_name(label).casefold(), label)
        if other != label:
            raise InputError(f"{other} and {label} would share a folder of images; give one of them another name")


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


def _pick(name: str, candidates: list[ModelSpec], steps: int, force: bool) -> ModelSpec:
    """The checkpoint made for a step count; of several, the one made for it most exactly."""
    fitting = [model for model in candidates if steps in model.contract.timesteps]
    if fitting:
        return min(fitting, key=lambda model: len(model.contract.timesteps))
    if force:  # the one made for the nearest step count
        return min(candidates, key=lambda model: min(abs(steps - count) for count in model.contract.timesteps))
    timesteps = {count: ts for model in candidates for count, ts in model.contract.timesteps.items()}
    replace(candidates[0].contract, timesteps=timesteps).require_steps(steps, name)
    raise AssertionError("require_steps refuses a step count that no checkpoint has")
