"""The run directory and its ledger: the only SQL of the core.

    run.json        the resolved spec, its hash, provenance
    images/         one PNG per image, <model>/<steps>/<prompt id>_<replicate>.png
    features/       what metrics' extractors made of the images (``hypersd_bench.features``)
    ledger.sqlite   images, scores, set scores, timings, costs

An image counts when its file is complete and its row is in: files are renamed into place before their rows are
committed, so kill -9 loses at most the batch in flight and nothing is ever doubled.
"""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, astuple, dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Any

from hypersd_bench.contracts import MetricInfo
from hypersd_bench.errors import InputError, first_line

LEDGER_VERSION = 2
_SCHEMA = """
CREATE TABLE image (
    id INTEGER PRIMARY KEY, model TEXT NOT NULL, steps INTEGER NOT NULL, prompt_id TEXT NOT NULL,
    prompt TEXT NOT NULL, replicate INTEGER NOT NULL, seed INTEGER NOT NULL, file TEXT NOT NULL,
    sha256 TEXT NOT NULL, checkpoint TEXT NOT NULL, defect TEXT NOT NULL,
    UNIQUE (model, steps, prompt_id, replicate));
CREATE TABLE score (
    metric TEXT NOT NULL, image_id INTEGER NOT NULL REFERENCES image (id), value REAL, reason TEXT NOT NULL,
    PRIMARY KEY (metric, image_id)) WITHOUT ROWID;
CREATE TABLE set_score (
    metric TEXT NOT NULL, model TEXT NOT NULL, steps INTEGER NOT NULL, value REAL, num_images INTEGER NOT NULL,
    reference TEXT NOT NULL, reason TEXT NOT NULL, PRIMARY KEY (metric, model, steps)) WITHOUT ROWID;
CREATE TABLE timing (
    model TEXT NOT NULL, steps INTEGER NOT NULL, stage TEXT NOT NULL, repeat INTEGER NOT NULL,
    batch_size INTEGER NOT NULL, seconds REAL NOT NULL, device TEXT NOT NULL,
    PRIMARY KEY (model, steps, stage, repeat, batch_size)) WITHOUT ROWID;
"""
_COST = """
CREATE TABLE cost (
    model TEXT NOT NULL, steps INTEGER NOT NULL, name TEXT NOT NULL, batch_size INTEGER NOT NULL,
    value REAL NOT NULL, unit TEXT NOT NULL, device TEXT NOT NULL,
    PRIMARY KEY (model, steps, name, batch_size)) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class ImageRow:
    """One image. defect: empty, or why it can't be trusted (``black``, ``constant``, ``non-finite``)."""

    model: str
    steps: int
    prompt_id: str
    prompt: str
    replicate: int
    seed: int
    file: str  # relative to the run directory
    sha256: str
    checkpoint: str
    defect: str = ""
    id: int | None = None

    @property
    def key(self) -> tuple[str, int, str, int]:
        """What makes an image the same image: (model, steps, prompt id, replicate)."""
        return (self.model, self.steps, self.prompt_id, self.replicate)

    @property
    def key_id(self) -> int:
        """Its id in the ledger, which a row read from there has."""
        assert self.id is not None, "rows read from the ledger have ids"
        return self.id


_IMAGE_COLUMNS = [field.name for field in fields(ImageRow) if field.name != "id"]
_UPSERT_IMAGE = f"""
INSERT INTO image ({", ".join(_IMAGE_COLUMNS)}) VALUES ({", ".join("?" * len(_IMAGE_COLUMNS))})
ON CONFLICT (model, steps, prompt_id, replicate) DO UPDATE
SET sha256 = excluded.sha256, defect = excluded.defect, checkpoint = excluded.checkpoint
"""
_CHANGED = "FROM image WHERE model = ? AND steps = ? AND prompt_id = ? AND replicate = ? AND sha256 <> ?"


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One image's value under a metric; ``value`` is None with a reason when it could not be computed."""

    metric: str
    image_id: int
    value: float | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class SetScoreRow:
    """One set metric's value for a model at a step count; reference names the reference set."""

    metric: str
    model: str
    steps: int
    value: float | None
    num_images: int
    reference: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class TimingRow:
    """One timed repeat of a stage for a batch: ``text``, ``denoise``, ``decode``, ``total``; ``unet`` is one step's."""

    model: str
    steps: int
    stage: str
    repeat: int
    batch_size: int
    seconds: float
    device: str


@dataclass(frozen=True, slots=True)
class CostRow:
    """What a configuration costs beside time per batch: memory, cold start, images per second.

    name: ``load``, ``seat`` and ``first-image`` (s; together a cold start), ``peak-memory`` (bytes: what the device's
    tensors took at most, on a CPU the process), ``peak-reserved`` (bytes), ``images-per-second``.
    """

    model: str
    steps: int
    name: str
    batch_size: int
    value: float
    unit: str
    device: str


class RunStore:
    """A run directory, opened for reading and writing."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest

    @staticmethod
    def refuse(folder: Path) -> None:
        """Raise InputError where ``create`` would: somebody else's files are in the folder, or it can't be written.

        Nothing is left behind.
        """
        with _starting(folder):
            if folder.exists() and not (folder.is_dir() and _only_a_start(folder)):
                raise InputError(f"{folder} is not an empty folder, and holds no run; choose another --out")
            near = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
            tempfile.TemporaryFile(dir=near).close()  # more than permissions: there are read-only disks, and /proc

    @classmethod
    def create(cls, folder: Path, manifest: dict[str, Any]) -> RunStore:
        """Start a run directory; raises InputError for a folder with anything in it but a start that was cut off."""
        cls.refuse(folder)
        with _starting(folder):
            (folder / "images").mkdir(parents=True, exist_ok=True)
            for left in folder.glob("ledger.sqlite*"):
                left.unlink()
            with closing(sqlite3.connect(folder / "ledger.sqlite")) as db, db:
                db.execute("PRAGMA journal_mode=WAL")
                db.executescript(f"{_SCHEMA} {_COST} PRAGMA user_version={LEDGER_VERSION};")
        write_json(folder / "run.json", manifest)  # last: a folder with run.json is a whole run directory
        return cls(folder, manifest)

    @classmethod
    def begun(cls, folder: Path) -> RunStore | None:
        """Open the run that a folder holds; None where it holds none."""
        with _starting(folder):
            holds_one = (folder / "run.json").exists()
        return cls.open(folder) if holds_one else None

    @classmethod
    def open(cls, folder: Path) -> RunStore:
        """Open an existing run directory; raises InputError when it is none."""
        try:
            manifest = json.loads((folder / "run.json").read_text())
        except FileNotFoundError:
            raise InputError(f"{folder} is not a run directory: it has no run.json") from None
        except (OSError, ValueError) as error:
            raise InputError(f"can't read {folder / 'run.json'}: {error}") from error
        if lacking := _lacking(manifest):
            raise InputError(f"{folder / 'run.json'} is no run's: {lacking}; put back the one that came with the run")
        if not (folder / "ledger.sqlite").exists():
            raise InputError(f"{folder} is not a whole run directory: ledger.sqlite is missing")
        store = cls(folder, manifest)
        with store._database() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 1:  # had no costs
                db.executescript(f"BEGIN; {_COST} PRAGMA user_version={LEDGER_VERSION}; COMMIT;")
                version = LEDGER_VERSION
        if version != LEDGER_VERSION:
            raise InputError(f"{folder / 'ledger.sqlite'} has version {version}; this program reads {LEDGER_VERSION}")
        return store

    def record_images(self, rows: Sequence[ImageRow]) -> None:
        """Enter images whose files are complete.

        One that was made again keeps its id; where its file is another one now, its scores and its set's are removed.
        """
        changed = [(*row.key, row.sha256) for row in rows]
        with self._database() as db:
            db.executemany(f"DELETE FROM set_score WHERE (model, steps) IN (SELECT model, steps {_CHANGED})", changed)
            db.executemany(f"DELETE FROM score WHERE image_id IN (SELECT id {_CHANGED})", changed)
            db.executemany(_UPSERT_IMAGE, [astuple(row)[:-1] for row in rows])

    def record_scores(self, rows: Sequence[ScoreRow]) -> None:
        """Enter or replace per-image scores."""
        self._insert("score", "INSERT OR REPLACE", rows)

    def record_set_scores(self, rows: Sequence[SetScoreRow]) -> None:
        """Enter or replace set scores."""
        self._insert("set_score", "INSERT OR REPLACE", rows)

    def record_timings(self, rows: Sequence[TimingRow]) -> None:
        """Enter or replace timings."""
        self._insert("timing", "INSERT OR REPLACE", rows)

    def record_costs(self, rows: Sequence[CostRow]) -> None:
        """Enter or replace costs."""
        self._insert("cost", "INSERT OR REPLACE", rows)

    def forget_timings(self, model: str, steps: int) -> None:
        """Remove a configuration's timings and costs, to measure it anew."""
        with self._database() as db:
            for table in ("timing", "cost"):
                db.execute(f"DELETE FROM {table} WHERE model = ? AND steps = ?", (model, steps))

    def forget_scores(self, metric: str) -> None:
        """Remove a metric's values, to score all images anew."""
        with self._database() as db:
            for table in ("score", "set_score"):
                db.execute(f"DELETE FROM {table} WHERE metric = ?", (metric,))

    def images(self) -> list[ImageRow]:
        """All images, ordered by model, steps, prompt id and replicate: every model's images line up."""
        return list(self._select(ImageRow, "image", "ORDER BY model, steps, prompt_id, replicate"))

    def scores(self, metric: str) -> dict[int, ScoreRow]:
        """A metric's scores by image id."""
        rows = self._finite(self._select(ScoreRow, "score", "WHERE metric = ?", metric), "value")
        return {row.image_id: row for row in rows}

    def scored_metrics(self) -> list[str]:
        """Ids of all metrics with any score, per image or per set."""
        with self._database() as db:
            return [row[0] for row in db.execute("SELECT metric FROM score UNION SELECT metric FROM set_score")]

    def set_scores(self) -> list[SetScoreRow]:
        """All set scores."""
        return self._finite(self._select(SetScoreRow, "set_score"), "value")

    def timings(self) -> list[TimingRow]:
        """All timings."""
        return self._finite(self._select(TimingRow, "timing"), "seconds")

    def costs(self) -> list[CostRow]:
        """All costs."""
        return self._finite(self._select(CostRow, "cost"), "value")

    def _insert(self, table: str, verb: str, rows: Sequence[Any]) -> None:
        if not rows:
            return
        names = [f.name for f in fields(rows[0])]
        sql = f"{verb} INTO {table} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"
        with self._database() as db:
            db.executemany(sql, [astuple(row) for row in rows])

    def _select(self, row_type: type[Any], table: str, clause: str = "", *parameters: object) -> Iterable[Any]:
        names = [f.name for f in fields(row_type)]
        sql = f"SELECT {', '.join(names)} FROM {table} {clause}"
        with self._database() as db:
            return [row_type(*row) for row in db.execute(sql, parameters)]

    def _finite(self, rows: Iterable[Any], name: str) -> list[Any]:
        """The rows, all of whose numbers of this name are finite, or missing; raises InputError where one is not."""
        known = list(rows)
        for row in known:
            value = getattr(row, name)
            if value is not None and not (isinstance(value, float | int) and isfinite(value)):
                raise InputError(f"{self.folder / 'ledger.sqlite'}: {row!r:.200} has no finite {name}; the ledger was "
                                 "damaged: bring it again, or score and time the run anew")  # fmt: skip
        return known

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.folder / "ledger.sqlite", timeout=30)) as db, db:
                yield db
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise InputError(f"{self.folder / 'ledger.sqlite'}: {first_line(error)}") from error


_SHAPE: dict[str, type] = {"spec": dict, "spec_hash": str, "provenance": dict, "models": list, "metrics": list}


def _lacking(manifest: Any) -> str:
    """What a manifest lacks that everything relies on; empty when it has all."""
    if not isinstance(manifest, dict):
        return "it is no JSON object"
    for key, kind in _SHAPE.items():
        if not isinstance(manifest.get(key), kind):
            return f"{key} is missing, or of another kind"
    if not all(isinstance(model, dict) and isinstance(model.get("name"), str) for model in manifest["models"]):
        return "a model has no name"
    try:
        infos = [MetricInfo(**metric) for metric in manifest["metrics"]]
    except TypeError as error:
        return f"a metric is not one: {first_line(error)}"
    counts = ("min_images", "min_size")
    for info in infos:
        for name, value in asdict(info).items():
            if not isinstance(value, int if name in counts else str):
                return f"a metric's {name} is {value!r:.40}"
    for key in ("extractors", "scored_versions"):
        known = manifest.get(key, {})
        if not (isinstance(known, dict) and all(isinstance(value, str) for value in known.values())):
            return f"{key} are of another kind"
    return ""


@contextmanager
def _starting(folder: Path) -> Iterator[None]:
    """What keeps a run from being started in a folder, as InputError."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"can't start a run in {folder}: {reason}; choose another --out") from error


def _only_a_start(folder: Path) -> bool:
    """Whether a folder holds nothing but what a start leaves that was killed before ``run.json`` was there."""
    mine = ("images", "ledger.sqlite", ".run.json.")
    images = folder / "images"
    return all(path.name.startswith(mine) for path in folder.iterdir()) and not (
        images.is_dir() and any(images.iterdir())
    )


def folder_name(label: str) -> str:
    """What the folder of a model's images is called; a plan refuses labels that would share one."""
    return label.replace("/", "_")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: to a neighbour first, then renamed into place."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise InputError(f"can't write {path}: {error.strerror}") from error
