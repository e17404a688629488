"""Reads runs, training folders and a study into what a report shows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hypersd_bench.errors import InputError
from hypersd_bench.runner.doubtful import doubtful_images
from hypersd_bench.store import RunStore
from metrics.comparison import Comparison, Pair, View, comparisons, contrasts, corrected
from reports.data import Contrast, Model, ReportData, Run
from reports.measurements import (
    read_accords,
    read_cells,
    read_cheapest,
    read_fronts,
    read_latencies,
    read_memories,
    to_differences,
)
from reports.models import read_models
from reports.pictures import choose_noises, choose_prompts
from reports.strings import Said, listed, say
from reports.study import StudyData, read_study
from reports.training import Curve, Made, is_training, made_in_folder, read_curves, read_log

DUPLICATE = "the same as another"


def open_report(
    folders: Sequence[Path],
    study: Path | None = None,
    metrics: Collection[str] = (),
    steps: Collection[int] = (),
    within: float | None = None,
) -> tuple[list[Path], ReportData]:
    """Read the runs and training folders named on a command line; also the runs' folders, in the report's order.

    Raises InputError where a folder is neither, where runs don't pair, and where a study is of none of them.
    """
    training = [folder for folder in folders if is_training(folder)]
    runs = [folder for folder in folders if folder not in training]
    stores = [RunStore.open(run) for run in runs]
    if not stores:
        if study:
            raise InputError("--study is of a run; give that run too")
        return [], training_report(training)
    found = read_study(study) if study else None
    return runs, read_report(View(stores, metrics, steps), found, training, within)


def read_report(
    of: RunStore | View, study: StudyData | None = None, training: Sequence[Path] = (), within: float | None = None
) -> ReportData:
    """Read all a report shows of runs side by side, of training folders, and of a study of one run's images.

    within: what "nearly the best" means, in the unit of the metric that decides; 1 % of the best unless given. Raises
    InputError when the study is of another run.
    """
    view = of if isinstance(of, View) else View([of])
    for store in view.stores:
        if not any(view.origin(cell)[0] is store for cell in view.cells):
            raise InputError(f"{store.folder} holds no images yet; give its spec to hypersd-bench run first")
    runs = tuple(_run(view, i) for i in range(len(view.stores)))
    if study is not None and study.run not in [run.spec_hash for run in runs]:
        raise InputError(f"the study shows images of the run {study.run[:12]}, and {view.name} is "
                         f"{', '.join(run.spec_hash[:12] for run in runs)}: a report never mixes them")  # fmt: skip
    models = read_models(view)
    compared_with = cache(lambda model: tuple(comparisons(view, model)))  # set metrics make this the slow part
    cells = read_cells(view, models, compared_with)
    grid, grid_notes = choose_prompts(view)
    scored = {cell.metric for cell in cells}
    images = [row for rows in view.images.values() for row in rows]
    baseline = view.baseline if any(model.name == view.baseline for model in models) else ""
    manifests = [store.manifest for store in view.stores]
    known = {(store.folder / str(entry.get("training"))).resolve() for _, store, entry in view.models}
    beside = _named([f for f in training if f.resolve() not in known], [model.name for model in models])
    return ReportData(
        title=str(listed(dict.fromkeys(run.title for run in runs))),
        runs=runs,
        baseline=baseline,
        num_prompts=len({row.prompt_id for row in images}),
        num_replicates=len({row.replicate for row in images}),
        models=models,
        steps=tuple(sorted({row.steps for row in images})),
        metrics=tuple(info for info in view.infos if info.id in scored),
        cells=cells,
        differences=to_differences(compared_with(baseline)) if baseline else (),
        contrasts=_contrasts(view),
        latencies=read_latencies(view),
        memories=read_memories(view),
        fronts=read_fronts(view),
        cheapest=read_cheapest(view, models, within),
        accords=read_accords(view),
        grid=grid,
        diversity=choose_noises(view),
        curves=(*_curves(view, models), *(curve for folder, name in beside for curve in read_log(folder, name))),
        made=(*_made(view, models), *(one for folder, name in beside for one in made_in_folder(folder, name))),
        notes=(
            *dict.fromkeys(note for manifest in manifests for note in manifest.get("notes", ())),
            *(note for store in view.stores for note in _doubtful(store, view)),
            *dict.fromkeys(note for manifest in manifests for note in _truncated(manifest)),
            *grid_notes,
        ),
        study=study,
    )


def training_report(training: Sequence[Path]) -> ReportData:
    """What a report shows of training folders alone: curves, and how the weights were made."""
    named = _named(training, ())
    return ReportData(
        title=str(listed(name for _, name in named)),
        runs=(), baseline="", num_prompts=0, num_replicates=0, models=(), steps=(), metrics=(), cells=(),
        differences=(), contrasts=(), latencies=(), memories=(), fronts=(), cheapest=None, accords=(), grid=(),
        diversity=(), notes=(),
        curves=tuple(curve for folder, name in named for curve in read_log(folder, name)),
        made=tuple(one for folder, name in named for one in made_in_folder(folder, name)),
    )  # fmt: skip


def _named(training: Sequence[Path], taken: Collection[str]) -> list[tuple[Path, str]]:
    """Each training folder with its name, or with its path where another folder or a model has the name."""
    names = [folder.resolve().name for folder in training]
    counts = Counter([*names, *taken])
    return [(f, name if counts[name] == 1 else str(f)) for f, name in zip(training, names, strict=True)]


def _run(view: View, i: int) -> Run:
    store = view.stores[i]
    manifest = store.manifest
    mine = [cell for cell in view.cells if view.origin(cell)[0] is store]
    return Run(
        name=view.run_names[i],
        title=str(manifest["spec"].get("name") or store.folder.resolve().name),
        base=str(manifest["spec"].get("base", "")),
        spec=manifest["spec"],
        spec_hash=manifest["spec_hash"],
        provenance=manifest["provenance"],
        prompts=manifest.get("prompts", {}),
        num_images=sum(len(view.images[cell]) for cell in mine),
        num_expected=_num_expected(manifest, view.only_steps),
    )


def _num_expected(manifest: Mapping[str, Any], only_steps: Collection[int]) -> int:
    """How many images the spec asks for, at the step counts that are looked at."""
    per_configuration: int = manifest.get("prompts", {}).get("count", 0) * manifest["spec"].get("replicates", 1)
    counts = [steps for entry in manifest["models"] for steps in entry.get("steps", ())]
    return per_configuration * len([steps for steps in counts if not only_steps or steps in only_steps])


def _curves(view: View, models: Sequence[Model]) -> list[Curve]:
    known = {model.name for model in models}
    return [
        curve
        for name, store, entry in view.models
        if name in known
        for curve in read_curves(store.folder, {**entry, "name": name})
    ]


def _made(view: View, models: Sequence[Model]) -> list[Made]:
    """The weights files of the models; a base itself has none."""
    entries = [entry for _, _, entry in view.models]
    checkpoints = [checkpoint for entry in entries for checkpoint in entry.get("checkpoints", {}).values()]
    cards = {checkpoint["sha256"]: checkpoint.get("card", {}) for checkpoint in checkpoints}
    return [
        Made(model.label, checkpoint.file, checkpoint.sha256, checkpoint.steps, cards[checkpoint.sha256])
        for model in models
        for checkpoint in model.checkpoints
        if checkpoint.file
    ]


def _contrasts(view: View) -> tuple[Contrast, ...]:
    """The contrasts of all runs' specs, corrected together."""
    entries = spec_contrasts(view)
    found = contrasts(view, contrast_pairs(entries))
    return fill_contrasts(entries, corrected(found, {info.id: info for info in view.infos}))


def spec_contrasts(view: View) -> list[Contrast]:
    """The contrasts that the runs' specs ask for, not yet filled, with the models as the view calls them."""
    names = {(store, str(entry["name"])): name for name, store, entry in view.models}
    return [
        Contrast(entry["name"], names[store, entry["model"]], names[store, entry["against"]], tuple(entry["steps"]), ())
        for store in view.stores
        for entry in store.manifest.get("contrasts", ())
        if (store, entry["model"]) in names and (store, entry["against"]) in names
    ]


def contrast_pairs(entries: Iterable[Contrast]) -> list[Pair]:
    """(model, against, steps) of all; a pair in two contrasts is tested once."""
    return list(dict.fromkeys((entry.model, entry.against, steps) for entry in entries for steps in entry.steps))


def fill_contrasts(entries: Iterable[Contrast], judged: Iterable[Comparison]) -> tuple[Contrast, ...]:
    """The contrasts with their differences."""
    differences = to_differences(judged)
    return tuple(
        Contrast(
            entry.name,
            entry.model,
            entry.against,
            entry.steps,
            tuple(
                d
                for d in differences
                if (d.model, d.baseline) == (entry.model, entry.against) and d.steps in entry.steps
            ),
        )
        for entry in entries
    )


def _doubtful(store: RunStore, view: View) -> list[Said]:
    """Count the images that can't be trusted, by model and by what is wrong with them."""
    mine = [cell for cell in view.cells if view.origin(cell)[0] is store]
    labels = {view.origin(cell)[1]: cell[0] for cell in mine}
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for found in doubtful_images(row for cell in mine for row in view.images[cell]):
        for defect, count in found.defects.items():
            counts[found.model, defect] += count
        counts[found.model, DUPLICATE] += found.duplicates
    return [
        say(
            f"note.{'doubles' if what == DUPLICATE else 'defects'}{'' if count == 1 else '_many'}",
            model=labels[model],
            n=count,
            what=what,
        )
        for (model, what), count in sorted(counts.items())
        if count
    ]


def _truncated(manifest: Mapping[str, Any]) -> list[Said]:
    """Say how many prompts the text encoder does not read to their end."""
    cut = manifest.get("prompts", {}).get("truncated", {})
    if not cut.get("count"):
        return []
    return [say("note.truncated", n=cut["count"], of=manifest["prompts"]["count"], limit=cut["limit"])]
