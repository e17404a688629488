"""A few fixed images with known scores, scored before every scoring run: a metric that drifted stops it.

What a metric that comes with this program gives is in ``known.json``. For one whose weights are downloaded nothing is
published, so its values are recorded in this machine's cache the first time, and in every run it scores: they hold it
to what it was, and tell ``verify`` on another machine whether both score alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hypersd_bench.cache import own_cache
from hypersd_bench.contracts import MetricInfo
from hypersd_bench.errors import CheckFailed, InputError
from hypersd_bench.provenance import collect
from hypersd_bench.reference import Picture, read_picture, stack
from hypersd_bench.store import RunStore, write_json

FOLDER = Path(__file__).parents[1] / "canaries"
KNOWN = FOLDER / "known.json"
Extracted = dict[tuple[str, int, str], NDArray[np.float32]]
PROMPTS = {  # of each image; the miniature's judges read nothing but such captions
    "scene": "a fox left of a pizza on a green background",
    "noise": "a rocket on a pink background",
    "gradient": "a cactus on a blue background",
    "rings": "a house on a gray background",
}
RINGS = (448, 640)  # height and width of the one that is computed: finer than a network's input, which aliasing shows
TOLERANCE = 2e-3  # of the metric's largest canary value; devices differ by some 1e-5, another resize filter by 1e-2
_CAUSES = ("pillow", "torch", "torchvision", "open_clip_torch", "transformers", "timm", "torchmetrics",
           "torch-fidelity", "numpy", "tokenizers")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Canary:
    """What a metric gave for the fixed images, and the packages that it was made with."""

    values: tuple[float, ...]
    packages: Mapping[str, str]


def check_canaries(store: RunStore, metrics: Sequence[Any], device: str) -> None:
    """Score the canaries with each metric and keep the values in the run's manifest.

    Raises CheckFailed for the first metric that differs from what is known of it.
    """
    packages = collect(device).packages
    found: dict[str, Any] = {}
    extracted: Extracted = {}
    for metric in metrics:
        values = canary_values(metric, extracted)
        if values is None:
            continue
        known = _known(metric)
        if known is None:
            _record(metric, Canary(values, packages))
        elif not alike(values, known.values):
            raise CheckFailed(_drift(metric.info, values, known, packages))
        found[metric.info.id] = {"values": list(values), "fingerprint": _fingerprint(metric)}
    if found and store.manifest.get("canaries", {}) != (kept := store.manifest.get("canaries", {}) | found):
        store.manifest["canaries"] = kept
        write_json(store.folder / "run.json", store.manifest)


def canary_values(metric: Any, extracted: Extracted) -> tuple[float, ...] | None:
    """What a metric gives for the canaries that its protocol allows; None where it allows none.

    extracted: the canaries' features by extractor, size and name; what lacks is added.
    """
    values: list[float] = []
    for name in PROMPTS:
        with suppress(InputError):  # another size than its protocol allows, or a prompt of no set of its own
            values += _values_of(metric, name, extracted).tolist()
    return tuple(values) or None


def _values_of(metric: Any, name: str, extracted: Extracted) -> NDArray[np.float64]:
    size, prompt = metric.info.min_size, PROMPTS[name]
    image = stack([enlarged(name, size)])
    if metric.info.features:
        key = metric.extractor.id, size, name
        if key not in extracted:
            extracted[key] = metric.extractor(image)
        features = extracted[key]
        if metric.info.kind == "set":
            return np.array([features.mean(), features.std()], np.float64)
        scored: NDArray[np.float64] = metric.score_features(features, [prompt])
    elif metric.info.kind == "prompt":
        scored = metric.score_group(stack([enlarged(name, size), enlarged(name, size)[:, ::-1]]), prompt)
    elif metric.info.kind == "pair":
        scored = metric.score_pairs(image, image.flip(-1))
    else:
        scored = metric.score(image, [prompt])
    return scored


def alike(found: Sequence[float], known: Sequence[float]) -> bool:
    """Whether canaries score as they are known to, within what devices and library builds differ by."""
    scale = max(1e-6, *(abs(value) for value in known))
    return len(found) == len(known) and bool(np.allclose(found, known, rtol=0, atol=TOLERANCE * scale))


def likely_cause(found: Sequence[float], known: Canary, packages: Mapping[str, str]) -> str:
    """What may be behind a drift, told from the values and from the packages that changed."""
    a, b = np.array(found), np.array(known.values)
    if not np.isfinite(a).all():
        return "its weights are broken; delete them, to be downloaded again"
    if len(a) == len(b):
        ratio = float(a @ b / (b @ b)) if b.any() else 0.0
        if abs(ratio - 1) > 0.05 and np.allclose(a, ratio * b, rtol=0, atol=TOLERANCE * np.abs(a).max()):
            return f"the scale changed: all values are {ratio:.3g} times what they were"
        if np.ptp(b) > 0 and np.ptp(a) < 0.1 * np.ptp(b):
            return "images no longer reach the network whole, as when uint8 is taken for floats in [0, 1]"
        if sorted(a.round(3)) == sorted(b.round(3)):
            return "images and prompts are paired in another order"
    changed = [
        f"{name} {known.packages.get(name, 'absent')} -> {packages.get(name, 'absent')}"
        for name in _CAUSES
        if known.packages.get(name) != packages.get(name)
    ]
    if changed:
        return f"packages changed since ({', '.join(changed)}): their resize, activation or tokenizer may have"
    return "other weights, preprocessing or activation under the same name"


def enlarged(name: str, least: int) -> Picture:
    """A canary image, each pixel repeated until its short side has ``least`` pixels."""
    picture = _picture(name)
    times = -(-least // min(picture.shape[:2]))
    return picture.repeat(times, 0).repeat(times, 1)


def recorded(metrics: Sequence[Any], packages: Mapping[str, str]) -> dict[str, Any]:
    """What ``known.json`` holds of metrics, to be written anew when a metric that is shipped changes its version."""
    extracted: Extracted = {}
    found = {_key(metric): canary_values(metric, extracted) for metric in metrics}
    versions = {name: packages[name] for name in _CAUSES if name in packages}
    return {key: {"values": values, "packages": versions} for key, values in found.items() if values}


@cache
def _picture(name: str) -> NDArray[np.uint8]:
    return read_picture(FOLDER / f"{name}.png") if name != "rings" else _rings()


def _rings() -> NDArray[np.uint8]:
    """A zone plate in whole numbers, alike on every machine: rings that grow finer outwards."""
    y, x = np.mgrid[: RINGS[0], : RINGS[1]]
    return np.stack([((x * x + y * y) >> shift) & 255 for shift in (3, 5, 7)], axis=-1).astype(np.uint8)


def _known(metric: Any) -> Canary | None:
    """What is known of a metric: shipped, or recorded on this machine."""
    entry = _shipped(metric.info) or _entries(_cache_file()).get(_key(metric))
    return Canary(tuple(entry["values"]), entry["packages"]) if entry else None


def _shipped(info: MetricInfo) -> dict[str, Any] | None:
    """What is shipped of a metric, whatever its weights are here: other ones are what it is there to find."""
    mine = f"{info.id}|{info.version}|"
    return next((entry for key, entry in _entries(KNOWN).items() if key.startswith(mine)), None)


def _record(metric: Any, canary: Canary) -> None:
    """Remember a metric's values; a cache that can't be written holds it to nothing the next time."""
    versions = {name: canary.packages[name] for name in _CAUSES if name in canary.packages}
    entries = _entries(_cache_file()) | {_key(metric): {"values": list(canary.values), "packages": versions}}
    with suppress(InputError):
        write_json(_cache_file(), entries)


def _entries(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _key(metric: Any) -> str:
    return "|".join((metric.info.id, metric.info.version, _fingerprint(metric)))


def _fingerprint(metric: Any) -> str:
    extractor = getattr(metric, "extractor", None)
    return str(extractor.fingerprint) if extractor else ""


def _cache_file() -> Path:
    return own_cache() / "canaries.json"


def _drift(info: MetricInfo, found: Sequence[float], known: Canary, packages: Mapping[str, str]) -> str:
    worst = int(np.argmax(np.abs(np.array(found) - np.array(known.values)))) if len(found) == len(known.values) else 0
    where = KNOWN.name if _shipped(info) else str(_cache_file())
    return (
        f"{info.id} does not score the fixed images as it did: {found[worst]:.5g} where it gave "
        f"{known.values[worst]:.5g}; likely: {likely_cause(found, known, packages)}. Nothing was scored; a change that "
        f"is wanted needs another version of the metric, or its entry in {where} removed"
    )
