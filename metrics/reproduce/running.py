"""Running what a preset names: as far as its weights can be had, one model at a time."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hypersd_bench.errors import InputError, first_line, unknown_name
from hypersd_bench.runner.spec import ModelRef, RunSpec
from metrics.reproduce.preset import CONTRACTS, Preset, Row, run_name
from metrics.reproduce.table import Outcome

if TYPE_CHECKING:
    from hypersd_bench.runner.plan import Configuration, Plan

CONTRACT_SUFFIXES = (".yaml", ".yml", ".json")


def chosen_models(preset: Preset, asked: Collection[str] | None) -> list[str]:
    """The preset's models that are asked for, all by default; InputError names the nearest for an unknown one."""
    for name in asked or ():
        if name not in preset.labels:
            raise unknown_name("model", name, preset.labels, f"preset {preset.id}")
    return [label for label in preset.labels if not asked or label in asked]


def run_spec(
    preset: Preset,
    models: Collection[str],
    num_prompts: int | None = None,
    reference: Path | None = None,
    prompts: Path | None = None,
    prompts_file: Path | None = None,
    pipeline: str | None = None,
) -> RunSpec:
    """The preset's spec for these models, as far as any of their numbers can be compared, and what is said otherwise.

    prompts: a file in place of its prompt set. prompts_file: the prompt set's own file, instead of a download.
    pipeline: a folder or hub id that stands in for the base's own. Raises InputError where nothing of them can be
    compared.
    """
    spec = preset.spec
    refs = _only(spec, [row.label for row in preset.rows if row.model in models and _has_a_comparable(preset, row)])
    if not refs:
        raise InputError(f"preset {preset.id} has no number of {', '.join(models)} that could be compared")
    changes = {
        "name": run_name(preset),
        "models": tuple(_with_contract(ref) for ref in refs),
        "baseline": spec.baseline if spec.baseline in [ref.name for ref in refs] else None,
        "num_prompts": num_prompts or spec.num_prompts,
        "reference": _with_features(reference, preset.protocol.reference_features) or spec.reference,
        "prompts": str(prompts) if prompts else spec.prompts,
        "prompts_file": prompts_file or spec.prompts_file,
        "pipeline": pipeline or spec.pipeline,
    }
    return spec.model_copy(update=changes)


def run_folder(preset: Preset, out: Path | None) -> Path:
    """Where a preset's run lies."""
    return out or Path("runs") / run_name(preset)


def run_preset(preset: Preset, spec: RunSpec, folder: Path, device: str) -> Outcome:
    """Generate and score what can be had of a preset's run; a run that is there goes on.

    Raises InputError for input that is wrong, not for weights or prompts that are not here: the outcome says those.
    """
    from hypersd_bench.runner.benchmark import run_benchmark
    from hypersd_bench.runner.plan import make_plan
    from hypersd_bench.store import RunStore

    begun = RunStore.begun(folder)
    if begun is None:
        RunStore.refuse(folder)
    try:
        plan = make_plan(spec, Path(), device)
    except InputError as error:
        if not _is_about_prompts(spec, error):
            raise
        remedy = preset.protocol.prompts_file
        return Outcome(begun, blocked=f"{first_line(error)}; {remedy}" if remedy else first_line(error))
    kept, absent = _at_hand(plan, begun.manifest.get("pins") if begun else None)
    if not kept:
        return Outcome(begun, absent)
    reduced = make_plan(_of(spec, kept), Path(), device)
    store, not_scored = run_benchmark(reduced, folder, device)
    return Outcome(store, absent, not_scored)


def _with_contract(ref: ModelRef) -> ModelRef:
    """A model whose contract is one of ours: its path, wherever the program is started."""
    if ref.contract and ref.contract.endswith(CONTRACT_SUFFIXES):
        return ref.model_copy(update={"contract": str(CONTRACTS / ref.contract)})
    return ref


def _with_features(reference: Path | None, features: str) -> Path | None:
    """A file of statistics that does not say what they are of, with what the source's are of."""
    if reference is None or not features or reference.suffix != ".npz":
        return reference
    return Path(f"{reference}={features}")


def _is_about_prompts(spec: RunSpec, error: InputError) -> bool:
    """Whether a plan failed for its prompts alone: without them they would have to be there."""
    from hypersd_bench.prompts import load_prompts

    try:
        load_prompts(spec.prompts, Path(), spec.prompts_file)
    except InputError as own:
        return str(own) == str(error)
    return False


def _at_hand(plan: Plan, pins: Mapping[str, str] | None) -> tuple[list[Configuration], dict[str, str]]:
    """The configurations whose pipeline and weights are here or could be downloaded, and why the others' could not.

    A pipeline that can't be had is asked for once.
    """
    lost: dict[str, str] = {}
    kept, absent = [], {}
    for configuration in plan.configurations:
        bare = replace(configuration, model=replace(configuration.model, weights=None))
        if configuration.pipeline not in lost:
            lost[configuration.pipeline] = _why_absent(plan, bare, pins)
        why = lost[configuration.pipeline] or _why_absent(plan, configuration, pins)
        if why:
            absent[str(configuration)] = why
        else:
            kept.append(configuration)
    return kept, absent


def _why_absent(plan: Plan, configuration: Configuration, pins: Mapping[str, str] | None) -> str:
    """Why a configuration can't be brought to this disk; empty where it is there now."""
    from hypersd_bench.runner.weights import bring

    try:
        bring(replace(plan, configurations=(configuration,)), pins)
    except InputError as error:
        return first_line(error)
    return ""


def _of(spec: RunSpec, kept: Collection[Configuration]) -> RunSpec:
    """The spec with those configurations alone."""
    models = _only(spec, [str(configuration) for configuration in kept])
    baseline = spec.baseline if spec.baseline in [ref.name for ref in models] else None
    return spec.model_copy(update={"models": models, "baseline": baseline})


def _only(spec: RunSpec, labels: Collection[str]) -> tuple[ModelRef, ...]:
    """A spec's models with the step counts that are among ``model@steps``."""
    steps_of = {ref: tuple(n for n in ref.steps or spec.steps if f"{ref.name}@{n}" in labels) for ref in spec.models}
    return tuple(ref.model_copy(update={"steps": steps}) for ref, steps in steps_of.items() if steps)


def _has_a_comparable(preset: Preset, row: Row) -> bool:
    return any(preset.columns[name].metric for name in row.values)
