"""A small run directory with made-up images and scores, for tests of what reads a run."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from hypersd_bench.contracts import MetricInfo
from hypersd_bench.features import Reference, write_features, write_reference
from hypersd_bench.provenance import collect
from hypersd_bench.sampling import ddim_trailing
from hypersd_bench.seeding import image_seed
from hypersd_bench.store import ImageRow, RunStore, ScoreRow, SetScoreRow, TimingRow, write_bytes

CLIP = MetricInfo("clip-score/pocket", "CLIP score", "higher", "cosine x100", "image")
AESTHETIC = MetricInfo("aesthetic/pocket", "Aesthetic", "higher", "rating", "image", note="a proxy")
FID = MetricInfo("fid/lite0", "FID (lite0)", "lower", "distance", "set", features="lite0/128", statistic="frechet")
REFERENCE = "made-up reference"
MODELS = ("hyper-sd", "lightning", "lcm", "tcd")


def make_run(
    folder: Path,
    models: tuple[str, ...] = MODELS,
    steps: tuple[int, ...] = (1, 2, 4, 8),
    num_prompts: int = 6,
    replicates: int = 2,
    pictures: Sequence[Path] = (),
    clip: MetricInfo = CLIP,
) -> RunStore:
    """Build a run whose CLIP score rises with steps and is best for the first model; features are 16-d.

    pictures: files that the images are hard links to, in turn, which makes a large run in a minute. clip: the first
    metric.
    """
    rng = np.random.default_rng(0)
    contract = ddim_trailing(steps)
    manifest = {
        "spec": {"base": "pocket", "steps": list(steps), "replicates": replicates, "seed": 0},
        "spec_hash": "0" * 64,
        "provenance": collect().to_json(),
        "models": [
            {"name": name, "label": name, "family": name, "steps": list(steps), "checkpoint": f"{name}.safetensors",
             "contracts": {str(count): asdict(contract) for count in steps}, "license": "Apache-2.0", "trained_on": [],
             "weights_sha256": "0" * 64,
             "training": None}
            for name in models
        ],
        "prompts": {"id": "pocket/held-out", "count": num_prompts, "sha256": "0" * 64},
        "metrics": [asdict(clip), asdict(AESTHETIC), asdict(FID)],
        "baseline": models[0],
        "notes": [],
    }  # fmt: skip
    store = RunStore.create(folder, manifest)
    rows = []
    for m, model in enumerate(models):
        for count in steps:
            for p in range(num_prompts):
                for r in range(replicates):
                    file = f"images/{model}/{count}/p{p:04d}_{r}.png"
                    seed = image_seed(0, f"p{p:04d}", r)
                    if pictures:
                        digest = _linked(folder / file, pictures[p % len(pictures)])
                    else:
                        digest = _drawn(folder / file, m, p, count)
                    prompt = f"a fox left of a pizza on a blue background, number {p}"
                    rows.append(ImageRow(model, count, f"p{p:04d}", prompt, r, seed, file, digest, f"{model}.st"))
    store.record_images(rows)
    quality = {name: len(models) - m for m, name in enumerate(models)}
    scores = []
    for row in store.images():
        assert row.id is not None
        level = 20 + quality[row.model] + np.log2(row.steps)
        scores.append(ScoreRow(clip.id, row.id, float(level + rng.normal(0, 0.5))))
        scores.append(ScoreRow(AESTHETIC.id, row.id, float(5 + 0.1 * level + rng.normal(0, 0.2))))
    store.record_scores(scores)
    for m, model in enumerate(models):
        for count in steps:
            features = rng.normal(0.1 * m, 1, (num_prompts * replicates, 16)).astype(np.float32)
            images = [row.sha256 for row in rows if (row.model, row.steps) == (model, count)]
            write_features(folder, FID.features, model, count, "", dict(zip(images, features, strict=True)))
            store.record_set_scores([SetScoreRow(FID.id, model, count, 10.0 + m + 8 / count, len(features), REFERENCE)])
            store.record_timings(
                [TimingRow(model, count, stage, i, 1, 0.01 * count + 0.001 * i, "cpu")
                 for stage in ("denoise", "total") for i in range(3)]
            )  # fmt: skip
    reference = Reference(REFERENCE, rng.normal(0, 1, (64, 16)).astype(np.float32))
    write_reference(folder, FID.features, "", reference)
    return store


def _drawn(file: Path, m: int, p: int, steps: int) -> str:
    """Write a picture of one colour; returns its hash."""
    pixels = np.full((64, 64, 3), (40 * m + 20, 25 * p % 255, 30 * steps % 255), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    write_bytes(file, buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def _linked(file: Path, picture: Path) -> str:
    """Link a picture; returns a hash of its own, as another picture would have."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.hardlink_to(picture)
    return hashlib.sha256(str(file).encode()).hexdigest()
