"""The models of a report as their runs' manifests describe them, and how each is drawn: everywhere alike."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Set
from typing import Any

from metrics.comparison import View
from reports.data import Checkpoint, Model, Published

# Okabe & Ito (2008), "Color universal design": told apart with every common colour vision deficiency. Their black is
# left out, because it vanishes on a dark page, and their yellow comes last, because it is faint on a white one.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross")
REFERENCE_COLOUR = "#8a8a8a"


def read_models(view: View) -> tuple[Model, ...]:
    """The models that have images, in the manifests' order, with the steps they have images of."""
    steps: dict[str, set[int]] = defaultdict(set)
    for name, count in view.cells:
        steps[name].add(count)
    entries = {name: entry for name, _, entry in view.models if name in steps}
    origins = {name: view.stores.index(store) for name, store, _ in view.models}
    labels = _labels(entries)
    references = _references(entries, steps)
    models: list[Model] = []
    num_competing = 0
    for name, entry in entries.items():
        is_reference = name in references
        models.append(
            Model(
                name=name,
                label=labels[name],
                family=entry.get("family", ""),
                steps=tuple(sorted(steps[name])),
                trained_on=tuple(entry.get("trained_on", ())),
                license=entry.get("license") or "",
                checkpoints=_checkpoints(entry.get("checkpoints", {})),
                sampler=_samplers(entry),
                published=tuple(Published(**row) for row in entry.get("published", ()) if row["steps"] in steps[name]),
                run=origins[name],
                is_reference=is_reference,
                colour=REFERENCE_COLOUR if is_reference else COLOURS[num_competing % len(COLOURS)],
                shape=SHAPES[0] if is_reference else SHAPES[num_competing % len(SHAPES)],
            )
        )
        num_competing += not is_reference
    return tuple(models)


def _labels(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What readers see, each of its own: a label that two have is followed by the name."""
    wanted = {name: str(entry.get("label") or name) for name, entry in entries.items()}
    wanted = {name: name if label == entries[name]["name"] else label for name, label in wanted.items()}
    counts = Counter(wanted.values())
    return {name: label if counts[label] == 1 else f"{label} ({name})" for name, label in wanted.items()}


def _references(entries: Mapping[str, Mapping[str, Any]], steps: Mapping[str, Set[int]]) -> set[str]:
    """Name those who compete with nobody: without a step count in common, or, where nobody has one, the teachers."""
    names = set(entries)
    alone = {name for name in names if not any(steps[name] & steps[other] for other in names - {name})}
    teachers = {name for name, entry in entries.items() if entry.get("family") == "teacher"}
    references = alone if alone < names else teachers
    return references if references < names else set()


def _checkpoints(by_steps: Mapping[str, Mapping[str, str]]) -> tuple[Checkpoint, ...]:
    """Gather the manifest's checkpoints by file."""
    steps: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for count, checkpoint in by_steps.items():
        steps[checkpoint["file"], checkpoint["sha256"], checkpoint.get("kind", "")].append(int(count))
    found = [Checkpoint(*known, tuple(sorted(counts))) for known, counts in steps.items()]
    return tuple(sorted(found, key=lambda checkpoint: checkpoint.steps))


def _samplers(entry: Mapping[str, Any]) -> str:
    """Say a model's contracts in a few words; where they differ, with their step counts."""
    contracts = entry.get("contracts") or {"": entry.get("contract") or {}}  # runs of old have one for all
    steps: dict[str, list[str]] = defaultdict(list)
    for count, contract in contracts.items():
        steps[_sampler(contract)].append(count)
    if len(steps) == 1:
        return next(iter(steps))
    return "; ".join(f"{sampler} (steps: {', '.join(counts)})" for sampler, counts in steps.items())


def _sampler(contract: Mapping[str, Any]) -> str:
    """Say a contract in a few words: scheduler, guidance, eta."""
    words = [str(contract.get("scheduler", "")).removesuffix("Scheduler")]
    if (contract.get("guidance_scale") or 0) > 1:
        words.append(f"guidance {contract['guidance_scale']:g}")
    if contract.get("eta"):
        words.append(f"eta {contract['eta']:g}")
    return ", ".join(words)
