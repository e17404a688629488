"""Whether a run holds what it says: its files hashed again, its noise seeds derived again, its images scored again.

For a run made elsewhere. Scores are made in a folder of their own, from the run's images and its kept reference, and
compared within what devices differ by; nothing of the run is changed.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hypersd_bench import registry
from hypersd_bench.contracts import Extractor, MetricContext, MetricInfo
from hypersd_bench.errors import InputError
from hypersd_bench.features import Reference, all_references, read_features, read_reference
from hypersd_bench.provenance import PACKAGES, collect, sha256
from hypersd_bench.reference import ReferenceSet, read_picture
from hypersd_bench.runner.canaries import TOLERANCE, alike
from hypersd_bench.runner.maker import find_defect
from hypersd_bench.runner.score import score_run
from hypersd_bench.seeding import image_seed
from hypersd_bench.store import ImageRow, RunStore, SetScoreRow

MEAN_TOLERANCE = 2e-4  # of the largest value, for a configuration's mean: what devices differ by has no direction
DISTANCE_TOLERANCE = 1e-5  # relative; the same features give the same distance but for the order of sums


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as the run says. kind: ``file``, ``defect``, ``seed``, ``score``, ``features``,
    ``reference``, ``set score`` or ``canaries``; name: what of; worst: the largest difference where ``count`` differ.
    """

    kind: str
    name: str
    recorded: str
    found: str
    count: int = 1


@dataclass
class Verification:
    """What was checked: images hashed, values compared by metric, what differs, and what could not be checked and why.

    packages: those whose version is another here, as ``recorded -> here``: where to look first for a cause.
    """

    images: int = 0
    prompts: int = 0
    values: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    unchecked: dict[str, str] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether nothing differs."""
        return not self.findings


@dataclass(frozen=True)
class KeptReference:
    """The reference features that a run keeps; a ReferenceSet that needs no images."""

    run: Path
    id: str
    num_images: int = 0

    def features(self, extractor: Extractor) -> Reference:
        """What the run keeps for an extractor; InputError where that is nothing, or of other weights."""
        found = read_reference(self.run, extractor.id, self.id, extractor.fingerprint)
        if found is None:
            other = read_reference(self.run, extractor.id, self.id)
            why = "was made with other weights or preprocessing" if other else "is not in the run"
            raise InputError(f"the reference's {extractor.id} {why}; give --reference FOLDER of its images")
        return Reference(self.id, found.values)


def verify_run(
    store: RunStore, device: str, num_prompts: int | None = None, reference: ReferenceSet | None = None
) -> Verification:
    """Check a run; ``num_prompts``: score only so many prompts again, drawn at random but each time the same."""
    found = Verification(packages=_other_packages(store.manifest, device))
    sound = _check_files(store, found)
    _check_seeds(store, found)
    ids = sorted({row.prompt_id for row in sound})
    chosen = set(ids if num_prompts is None else random.Random(0).sample(ids, min(num_prompts, len(ids))))
    rows = [row for row in sound if row.prompt_id in chosen]
    infos = _checkable(store, found)
    if rows and infos:
        found.prompts = len(chosen)
        with tempfile.TemporaryDirectory(prefix="hypersd-bench-verify-") as scratch:
            again = _scratch_run(store, Path(scratch) / "run", rows)
            kept = reference or _kept_reference(store)
            failed = score_run(again, [info.id for info in infos], device, kept)
            found.unchecked |= {metric: reason for metric, reason in failed.items() if not _some(again, metric)}
            _compare_canaries(store, again, found)
            for info in infos:
                if info.id not in found.unchecked:
                    compare = _compare_sets if info.kind == "set" else _compare_scores
                    compare(store, again, info, found)
    return found


def _check_files(store: RunStore, found: Verification) -> list[ImageRow]:
    """Hash every image; returns those that are what the ledger says and have no defect."""
    intact = []
    rows = store.images()
    for row in tqdm(rows, desc="hashing", unit="image"):
        path = store.folder / row.file
        got = sha256(path) if path.is_file() else "missing"
        if got == row.sha256:
            intact.append(row)
            if row.defect != "non-finite" and (defect := find_defect(read_picture(path))) != row.defect:
                found.findings.append(Finding("defect", row.file, row.defect or "none", defect or "none"))
        else:
            found.findings.append(Finding("file", row.file, row.sha256[:12], got[:12]))
    found.images = len(rows)
    known = {row.file for row in rows}
    extra = [p for p in sorted((store.folder / "images").rglob("*")) if p.is_file() and not p.name.startswith(".")]
    for path in extra:
        name = path.relative_to(store.folder).as_posix()
        if name not in known:
            found.findings.append(Finding("file", name, "not in the ledger", "a file"))
    return [row for row in intact if not row.defect]


def _check_seeds(store: RunStore, found: Verification) -> None:
    """Derive the noise seeds again: only with them are comparisons paired."""
    seed = int(store.manifest["spec"].get("seed", 0))
    wrong = [row for row in store.images() if row.seed != image_seed(seed, row.prompt_id, row.replicate)]
    if wrong:
        first = wrong[0]
        derived = image_seed(seed, first.prompt_id, first.replicate)
        found.findings.append(Finding("seed", first.file, str(first.seed), str(derived), len(wrong)))


def _checkable(store: RunStore, found: Verification) -> list[MetricInfo]:
    """The run's scored metrics that are installed in the version that scored."""
    versions = {entry["id"]: entry["version"] for entry in store.manifest["metrics"]}
    versions |= store.manifest.get("scored_versions", {})
    infos = []
    for name in store.scored_metrics():
        if name not in registry.rows("metric"):
            found.unchecked[name] = "no such metric is installed here"
            continue
        info: MetricInfo = registry.resolve("metric", name).info
        if versions.get(name, info.version) != info.version:
            found.unchecked[name] = f"scored by its version {versions[name]}; installed is {info.version}"
        elif _some(store, name):
            infos.append(info)
    return infos


def _some(store: RunStore, metric: str) -> bool:
    """Whether a metric has any value."""
    return any(row.value is not None for row in store.scores(metric).values()) or any(
        row.metric == metric and row.value is not None for row in store.set_scores()
    )


def _scratch_run(store: RunStore, folder: Path, rows: Sequence[ImageRow]) -> RunStore:
    """A run of the same images without a score; its image files are the run's own."""
    kept = ("spec", "models", "metrics", "baseline")
    again = RunStore.create(folder, {name: store.manifest[name] for name in kept if name in store.manifest})
    again.record_images([replace(row, file=str((store.folder / row.file).resolve())) for row in rows])
    return again


def _kept_reference(store: RunStore) -> KeptReference | None:
    ids = {row.reference for row in store.set_scores() if row.value is not None}
    return KeptReference(store.folder, ids.pop()) if len(ids) == 1 else None


def _compare_scores(store: RunStore, again: RunStore, info: MetricInfo, found: Verification) -> None:
    recorded, now = _by_key(store, info.id), _by_key(again, info.id)
    keys = sorted(recorded.keys() & now.keys())
    found.values[info.id] = len(keys)
    mine = {row.key for row in again.images()}
    for only, has, lacks in ((now.keys() - recorded.keys(), "no value", "a value"),
                             ((recorded.keys() & mine) - now.keys(), "a value", "no value")):  # fmt: skip
        if only:
            model, steps, prompt, replicate = min(only)
            name = f"{info.id} of {model}@{steps}, {prompt}, {replicate}"
            found.findings.append(Finding("score", name, has, lacks, len(only)))
    if not keys:
        return
    a, b = np.array([recorded[key] for key in keys]), np.array([now[key] for key in keys])
    differs = np.abs(a - b) > TOLERANCE * max(1e-6, float(np.abs(a).max()))
    for cell in dict.fromkeys(key[:2] for key in keys):
        mine_only = np.array([key[:2] == cell for key in keys])
        shift = float(np.abs((b - a)[mine_only].mean()))
        if shift > MEAN_TOLERANCE * max(1e-6, float(np.abs(a).max())) and not differs[mine_only].any():
            name = f"{info.id}, mean of {cell[0]}@{cell[1]}"
            was, is_now = (f"{values[mine_only].mean():.6g}" for values in (a, b))
            found.findings.append(Finding("score", name, was, is_now, int(mine_only.sum())))
    if differs.any():
        worst = int(np.argmax(np.abs(a - b)))
        model, steps, prompt, replicate = keys[worst]
        name = f"{info.id} of {model}@{steps}, {prompt}, {replicate}"
        found.findings.append(Finding("score", name, f"{a[worst]:.6g}", f"{b[worst]:.6g}", int(differs.sum())))


def _by_key(store: RunStore, metric: str) -> dict[tuple[str, int, str, int], float]:
    scores = store.scores(metric)
    rows = ((row.key, scores.get(row.key_id)) for row in store.images())
    return {key: score.value for key, score in rows if score is not None and score.value is not None}


def _compare_sets(store: RunStore, again: RunStore, info: MetricInfo, found: Verification) -> None:
    """Compare kept features with those extracted again, and the recorded value with that of the kept features."""
    metric = registry.resolve("metric", info.id)(MetricContext())
    for row in store.set_scores():
        if row.metric != info.id or row.value is None:
            continue
        name = f"{info.id} of {row.model}@{row.steps}"
        reference = _checked_reference(store, again, info, row, name, found)
        kept = read_features(store.folder, info.features, row.model, row.steps)
        _compare_features(kept, read_features(again.folder, info.features, row.model, row.steps), name, found)
        value = _value(metric, kept, reference, store, row)
        if value is None:
            found.unchecked[name] = "the run does not keep the features of all its images and of its reference"
            continue
        found.values[info.id] = found.values.get(info.id, 0) + 1
        if abs(value - row.value) > DISTANCE_TOLERANCE * max(1.0, abs(row.value)):
            found.findings.append(Finding("set score", name, f"{row.value:.6g}", f"{value:.6g}"))


def _checked_reference(
    store: RunStore, again: RunStore, info: MetricInfo, row: SetScoreRow, name: str, found: Verification
) -> Reference | None:
    """The reference that a value is of: extracted again where its images were given, else the run's own copy."""
    kept = read_reference(store.folder, info.features, row.reference)
    given = next(iter(all_references(again.folder, info.features)), None)
    if given is None:
        return kept
    if given.id.rpartition("-")[2] != row.reference.rpartition("-")[2]:  # of its content; a folder may be renamed
        found.findings.append(Finding("reference", name, row.reference, given.id))
        return kept
    if kept is not None and isinstance(kept.values, np.ndarray) and isinstance(given.values, np.ndarray):
        same = kept.values.shape == given.values.shape
        if not same or not np.allclose(kept.values, given.values, rtol=0, atol=TOLERANCE * np.abs(given.values).max()):
            found.findings.append(Finding("reference", name, "the kept features", "others, of the same images"))
    return Reference(row.reference, given.values)


def _compare_features(kept: Mapping[str, Any], now: Mapping[str, Any], name: str, found: Verification) -> None:
    shared = [digest for digest in now if digest in kept]
    if not shared:
        return
    a, b = (np.stack([features[digest] for digest in shared]).astype(np.float64) for features in (kept, now))
    relative = np.linalg.norm(a - b, axis=1) / np.linalg.norm(a, axis=1).clip(min=1e-12)
    if (relative > TOLERANCE).any():
        count = int((relative > TOLERANCE).sum())
        found.findings.append(Finding("features", name, "kept", f"off by up to {relative.max():.2g}", count))


def _value(
    metric: Any, kept: Mapping[str, Any], reference: Reference | None, store: RunStore, row: SetScoreRow
) -> float | None:
    """A set's value from kept features; None where not all are kept, or the reference is another one."""
    rows = [r for r in store.images() if (r.model, r.steps) == (row.model, row.steps) and not r.defect]
    if reference is None or reference.id != row.reference or any(r.sha256 not in kept for r in rows):
        return None
    if len(rows) != row.num_images:
        return None
    return float(metric.distance(np.stack([kept[r.sha256] for r in rows]), reference.values))


def _compare_canaries(store: RunStore, again: RunStore, found: Verification) -> None:
    now = again.manifest.get("canaries", {})
    for name, recorded in store.manifest.get("canaries", {}).items():
        if name in now and not alike(now[name]["values"], recorded["values"]):
            a, b = (", ".join(f"{value:.5g}" for value in entry["values"]) for entry in (recorded, now[name]))
            found.findings.append(Finding("canaries", name, a, b))


def _other_packages(manifest: Mapping[str, Any], device: str) -> dict[str, str]:
    recorded, here = manifest.get("provenance", {}).get("packages", {}), collect(device).packages
    return {
        name: f"{recorded.get(name, 'absent')} -> {here.get(name, 'absent')}"
        for name in dict.fromkeys((*PACKAGES, *recorded))
        if recorded.get(name) != here.get(name)
    }
