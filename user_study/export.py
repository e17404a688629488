"""Votes with what they are about, for analysis elsewhere: anonymised rows and a codebook that explains them."""

from __future__ import annotations

import csv
import hmac
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypersd_bench.errors import InputError
from hypersd_bench.store import write_bytes
from user_study.design import Design
from user_study.records import VoteRow

FORMATS = ("csv", "jsonl", "parquet")
COLUMNS = {
    "rater": "pseudonym of the rater, the same in all rows of this study and of no other",
    "kind": "main: counts; practice: with feedback; gold: the right answer is a; repeat: a main pair again, swapped",
    "comparison": "the pair type, a@steps:b@steps",
    "pair": "the pair's id in the design",
    "prompt_id": "the prompt's id in the run",
    "prompt": "the prompt, as shown",
    "replicate": "which of the prompt's noises both images were made from",
    "model_a": "who made image a",
    "steps_a": "in how many steps",
    "model_b": "who made image b",
    "steps_b": "in how many steps",
    "side_a": "left or right: where image a was shown",
    "criterion": "what was asked",
    "choice": "left, right, tie or both-bad, as given",
    "preferred": "a, b, tie or both-bad, whatever the sides were",
    "position": "items that the rater was given before this one",
    "propensity": "probability with which the adaptive policy drew the comparison; 1 if nothing was drawn",
    "surplus": "given after the pair's quota was filled, because the rater came back late",
    "response_ms": "milliseconds from both images being decoded and shown to the vote",
    "hidden_ms": "of these, milliseconds in which the page was not visible",
    "language": "the page's language at the vote",
    "input": "key, pointer or touch",
    "viewport": "the page's width and height in CSS pixels",
    "pixel_ratio": "device pixels per CSS pixel",
    "assigned_at": "when the pair was handed out, UTC, to the minute",
    "voted_at": "when the vote was stored, UTC, to the minute",
    "design": "SHA-256 of the design the vote was given on",
}
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def export_rows(design: Design, votes: Sequence[VoteRow], key: bytes) -> list[dict[str, Any]]:
    """One row for each vote and criterion, COLUMNS as keys, ordered by rater and position.

    Raters are named by HMAC-SHA256 under the study's key; times are cut to the minute: neither leads back to a person
    or a link.
    """
    rows = []
    for vote in votes:
        for criterion in vote.choices:
            rows.append(_row(design, vote, criterion, key))
    return sorted(rows, key=lambda row: (row["rater"], row["position"]))


def write_export(path: Path, rows: Sequence[dict[str, Any]], form: str) -> None:
    """Write the rows and, beside them, the codebook; raises InputError when the path exists or can't be written."""
    if path.exists():
        raise InputError(f"{path} exists; name another file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path.with_name(f"{path.stem}.codebook.md"), codebook().encode())
        write_bytes(path, encode_export(rows, form))
    except OSError as error:
        raise InputError(f"can't write {path}: {error.strerror or error}") from error


def encode_export(rows: Sequence[dict[str, Any]], form: str) -> bytes:
    """The rows as the bytes of a CSV, JSONL or parquet file."""
    return {"csv": _csv, "jsonl": _jsonl, "parquet": _parquet}[form](rows)


def codebook() -> str:
    """What each column means, as Markdown."""
    lines = ["# Codebook", "", "One row for each vote and criterion.", "", "| column | meaning |", "| --- | --- |"]
    lines += [f"| {name} | {meaning} |" for name, meaning in COLUMNS.items()]
    lines += [
        "",
        "Times are cut to the minute so that they can't be matched with server logs; `position` gives the order.",
        "In CSV, text that a spreadsheet would take for a formula has an apostrophe before it.",
        "",
    ]
    return "\n".join(lines)


def pseudonym(key: bytes, rater: str) -> str:
    """What a rater is called outside the study's database: 12 hexadecimal digits."""
    return hmac.digest(key, f"rater:{rater}".encode(), "sha256").hex()[:12]


def _row(design: Design, vote: VoteRow, criterion: str, key: bytes) -> dict[str, Any]:
    pair = design.pair(vote.pair_id)
    a, b = pair.a.configuration, pair.b.configuration
    values = (
        pseudonym(key, vote.rater), vote.kind, pair.comparison, pair.id, pair.prompt_id, pair.prompt, pair.replicate,
        a.model, a.steps, b.model, b.steps, vote.a_side, criterion, vote.choices[criterion], vote.preferred(criterion),
        vote.position, vote.propensity, vote.surplus, vote.response_ms, vote.hidden_ms, vote.language, vote.input,
        vote.viewport, vote.pixel_ratio, _minute(vote.assigned_at), _minute(vote.voted_at), vote.design_hash,
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def _minute(stamp: str) -> str:
    return stamp[:16] + "Z"


def _csv(rows: Sequence[dict[str, Any]]) -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(COLUMNS))
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _inert(value) for name, value in row.items()})
    return buffer.getvalue().encode()


def _inert(value: Any) -> Any:
    """Text that no spreadsheet runs as a formula (OWASP's advice on CSV injection)."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _jsonl(rows: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"replicate": pa.int64(), "steps_a": pa.int64(), "steps_b": pa.int64(), "position": pa.int64(),
             "propensity": pa.float64(), "surplus": pa.bool_(), "response_ms": pa.int64(), "hidden_ms": pa.int64(),
             "pixel_ratio": pa.float64()}  # fmt: skip
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), sink)
    return bytes(sink.getvalue().to_pybytes())
