"""Features that extractors made of a run's images, kept in the run directory; no torch.

    features/<extractor>/<model>@<steps>.npz    features (N, d) float32, sha256 (N,) of the images, fingerprint
    features/<extractor>/reference-<hash>.npz   id, features (M, d) float32 or the statistics, fingerprint

A feature belongs to an image's content, not to its place: it is found again by the image's SHA-256, and only while the
extractor's fingerprint is the same.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hypersd_bench.contracts import ReferenceMoments
from hypersd_bench.errors import InputError, first_line
from hypersd_bench.store import folder_name

Vector = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Reference:
    """What a set metric compares with, by its id (``photographs-5000-1a2b3c4d``): features (M, d), or statistics."""

    id: str
    values: NDArray[np.float32] | ReferenceMoments


def features_folder(run: Path, extractor: str) -> Path:
    """Where a run keeps what an extractor made."""
    return run / "features" / extractor.replace("/", "_")


def read_features(run: Path, extractor: str, model: str, steps: int, fingerprint: str = "") -> dict[str, Vector]:
    """Features (d,) by image SHA-256; none where there is no file, or where it is of another fingerprint."""
    saved = _load(_features_file(run, extractor, model, steps), ("features", "sha256"))
    if saved is None or fingerprint not in ("", str(saved["fingerprint"])):
        return {}
    return dict(zip(saved["sha256"].tolist(), saved["features"], strict=True))


def write_features(
    run: Path, extractor: str, model: str, steps: int, fingerprint: str, features: Mapping[str, Vector]
) -> None:
    """Write features (d,) by image SHA-256, whole or not at all."""
    values = np.stack(list(features.values())).astype(np.float32, copy=False)
    save_arrays(
        _features_file(run, extractor, model, steps),
        features=values, sha256=np.array(list(features)), fingerprint=np.array(fingerprint),
    )  # fmt: skip


def read_reference(run: Path, extractor: str, reference_id: str, fingerprint: str = "") -> Reference | None:
    """A reference that an extractor's set scores are of; None where it, or one of that fingerprint, is not kept."""
    return load_reference(_reference_file(run, extractor, reference_id), fingerprint)


def all_references(run: Path, extractor: str) -> list[Reference]:
    """All references that a run keeps of an extractor."""
    paths = sorted(features_folder(run, extractor).glob("reference-*.npz"))
    return [found for found in map(load_reference, paths) if found is not None]


def write_reference(run: Path, extractor: str, fingerprint: str, reference: Reference) -> None:
    """Keep a reference's features beside those of the images, so that a run can be judged without the reference."""
    save_reference(_reference_file(run, extractor, reference.id), fingerprint, reference)


def load_reference(path: Path, fingerprint: str = "") -> Reference | None:
    """Read a kept reference; None where there is none, or one of another fingerprint."""
    saved = _load(path, ("id",))
    if saved is None or fingerprint not in ("", str(saved["fingerprint"])):
        return None
    if "features" in saved:
        return Reference(str(saved["id"]), saved["features"])
    if not {"n", "mean", "covariance"} <= saved.keys():
        raise _broken(path, "it holds neither features nor statistics")
    return Reference(str(saved["id"]), ReferenceMoments(int(saved["n"]), saved["mean"], saved["covariance"]))


def save_reference(path: Path, fingerprint: str, reference: Reference) -> None:
    """Write a reference, whole or not at all."""
    values = reference.values
    arrays: dict[str, Any] = (
        {"n": values.n, "mean": values.mean, "covariance": values.covariance}
        if isinstance(values, ReferenceMoments)
        else {"features": values}
    )
    save_arrays(path, id=np.array(reference.id), fingerprint=np.array(fingerprint), **arrays)


def forget_features(run: Path, extractor: str) -> None:
    """Remove all that is kept of an extractor."""
    shutil.rmtree(features_folder(run, extractor), ignore_errors=True)


def save_arrays(path: Path, **arrays: Any) -> None:
    """Write a .npz whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"can't write {path}: {error.strerror}") from error


def _features_file(run: Path, extractor: str, model: str, steps: int) -> Path:
    return features_folder(run, extractor) / f"{folder_name(model)}@{steps}.npz"


def _reference_file(run: Path, extractor: str, reference_id: str) -> Path:
    name = hashlib.sha256(reference_id.encode()).hexdigest()[:16]
    return features_folder(run, extractor) / f"reference-{name}.npz"


def _load(path: Path, needed: tuple[str, ...]) -> dict[str, NDArray[Any]] | None:
    """A .npz's arrays, those needed and ``fingerprint`` among them; None where there is none. No pickle is read."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as opened:  # numpy leaves a broken zip open
            saved = {name: opened[name] for name in opened.files}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError, KeyError, EOFError, zipfile.BadZipFile,
            NotImplementedError) as error:  # fmt: skip
        raise _broken(path, first_line(error)) from error
    absent = [name for name in (*needed, "fingerprint") if name not in saved]
    if absent:
        raise _broken(path, f"it holds no {', '.join(absent)}")
    if "sha256" in needed and (saved["features"].ndim != 2 or len(saved["features"]) != len(saved["sha256"])):
        raise _broken(path, f"features {saved['features'].shape} for {len(saved['sha256'])} images")
    return saved


def _broken(path: Path, why: str) -> InputError:
    return InputError(f"{path} is broken ({why}); delete it, and score the run again")
