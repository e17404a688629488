"""What is asked: pairs of images of one prompt and one noise, chosen before the first vote and written down once.

The design's hash is stored with the votes, so that nobody can change pairs or wording afterwards without being told.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

from hypersd_bench.errors import InputError, unknown_name
from hypersd_bench.store import ImageRow, RunStore, write_json

QUESTION = "Which picture do you prefer?"
INSTRUCTION = "Weigh how well it shows the description and how good it looks. If you can't decide, choose tie."
DEFAULT_PAIRS = 60


@dataclass(frozen=True, slots=True)
class Arm:
    """One of a pair's two images: who made it, in how many steps; file is relative to the run directory."""

    model: str
    steps: int
    file: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Pair:
    """Two images of the same prompt and the same noise; ``a`` is the baseline's."""

    id: str
    prompt_id: str
    prompt: str
    replicate: int
    a: Arm
    b: Arm

    @property
    def methods(self) -> tuple[str, str]:
        """The method pair, within which sides are counterbalanced."""
        return (self.a.model, self.b.model)


@dataclass(frozen=True, slots=True)
class Design:
    """Everything fixed before the first vote. run: the spec hash of the run. requested: the pairs asked for."""

    run: str
    question: str
    instruction: str
    requested: int
    pairs: tuple[Pair, ...]

    @property
    def hash(self) -> str:
        """SHA-256 of the design's canonical JSON, wording included."""
        return sha256(json.dumps(asdict(self), sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def make_design(store: RunStore, num_pairs: int = DEFAULT_PAIRS) -> Design:
    """Pair the run's baseline with every other model at each step count both have; at most ``num_pairs`` pairs.

    The sample is deterministic and balanced: over (method pair, step count) to within one pair while there are enough
    images, then over prompts. Images with a defect are left out.
    """
    if num_pairs < 1:
        raise InputError(f"--pairs {num_pairs}: a study needs at least one pair")
    cells = _candidates(store)
    pairs = _balanced_sample(cells, num_pairs, salt=str(store.manifest["spec_hash"]))
    return Design(str(store.manifest["spec_hash"]), QUESTION, INSTRUCTION, num_pairs, pairs)


def load_design(path: Path) -> Design:
    """Read a design back; raises InputError when the file is broken or was changed after it was written."""
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
        recorded = raw.pop("hash")
        pairs = tuple(Pair(**{**pair, "a": Arm(**pair["a"]), "b": Arm(**pair["b"])}) for pair in raw.pop("pairs"))
        design = Design(pairs=pairs, **raw)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a study design: {error}") from error
    if design.hash != recorded:
        raise InputError(f"{path} was changed after it was written; restore it, or start a new study in another run")
    return design


def write_design(path: Path, design: Design) -> None:
    """Write the design with its hash."""
    write_json(path, {**asdict(design), "hash": design.hash})


def open_design(store: RunStore, num_pairs: int | None = None) -> Design:
    """Read the run's design (``study/design.json``), or make and write it the first time.

    Raises InputError when the design is of another run, or when ``num_pairs`` is not what it was made for.
    """
    path = store.folder / "study" / "design.json"
    if not path.exists():
        write_design(path, make_design(store, DEFAULT_PAIRS if num_pairs is None else num_pairs))
    design = load_design(path)
    if design.run != store.manifest["spec_hash"]:
        raise InputError(f"{path} was made for a run of another spec; move {path.parent} away to start a new study")
    if num_pairs not in (None, design.requested):
        raise InputError(
            f"{path} was made with --pairs {design.requested} and a design stays as it is; "
            f"leave --pairs out, or move {path.parent} away to start a new study"
        )
    return design


_Cell = tuple[str, int]  # (model, steps): the method compared with the baseline, at a step count


def _candidates(store: RunStore) -> dict[_Cell, list[tuple[ImageRow, ImageRow]]]:
    """All possible pairs (baseline's image, other's image) by cell."""
    rows = store.images()
    models = sorted({row.model for row in rows})
    if len(models) < 2:
        raise InputError(f"{store.folder} has images of {len(models)} model(s); a study needs two to compare")
    baseline = str(store.manifest["baseline"])
    if baseline not in models:
        raise unknown_name("baseline", baseline, models, str(store.folder / "run.json"))
    usable = {row.key: row for row in rows if not row.defect}
    cells: dict[_Cell, list[tuple[ImageRow, ImageRow]]] = defaultdict(list)
    for (model, *rest), row in usable.items():
        ours = usable.get((baseline, *rest))  # type: ignore[arg-type]
        if model != baseline and ours is not None:
            cells[model, row.steps].append((ours, row))
    if not cells:
        raise InputError(f"{store.folder}: no model shares a step count and usable images with {baseline!r}")
    return cells


def _balanced_sample(
    cells: Mapping[_Cell, Iterable[tuple[ImageRow, ImageRow]]], num_pairs: int, salt: str
) -> tuple[Pair, ...]:
    """Draw from the least drawn cell the pair with the least drawn prompt, until enough are drawn or none is left."""
    left = {cell: list(candidates) for cell, candidates in cells.items()}
    drawn: Counter[object] = Counter()  # of cells, models, step counts and prompts: their types keep them apart
    pairs: list[Pair] = []
    while len(pairs) < num_pairs and any(left.values()):
        open_cells = [cell for cell, candidates in left.items() if candidates]
        cell = min(open_cells, key=lambda c: (drawn[c], drawn["model", c[0]], drawn["steps", c[1]], _lot(salt, *c)))
        index, (a, b) = min(
            enumerate(left[cell]),
            key=lambda entry: (
                drawn["prompt", entry[1][0].prompt_id],
                _lot(salt, *cell, entry[1][0].prompt_id, entry[1][0].replicate),
            ),
        )
        del left[cell][index]
        drawn.update([cell, ("model", cell[0]), ("steps", cell[1]), ("prompt", a.prompt_id)])
        pairs.append(Pair(f"{len(pairs) + 1:04d}", a.prompt_id, a.prompt, a.replicate, _arm(a), _arm(b)))
    return tuple(pairs)


def _arm(row: ImageRow) -> Arm:
    return Arm(row.model, row.steps, row.file, row.sha256)


def _lot(*parts: object) -> bytes:
    """A deterministic lot for breaking ties."""
    return blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
