"""Prompts in files of the common kinds: text, CSV, TSV, JSON, JSON lines, parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from hypersd_bench.errors import InputError

Row: TypeAlias = tuple[str, str]  # text, category ("" where there is none)
SUFFIXES = (".txt", ".tsv", ".csv", ".json", ".jsonl", ".parquet")
TEXT = ("prompt", "caption", "text")


def read_rows(path: Path) -> list[Row]:
    """Read a prompt file by its suffix, any unknown one as text; InputError names the file and what is wrong in it."""
    readers = {
        ".csv": read_table,
        ".tsv": read_table,
        ".json": read_json,
        ".jsonl": read_json_lines,
        ".parquet": _read_parquet,
    }
    return readers.get(path.suffix.lower(), read_lines)(path)


def read_lines(path: Path) -> list[Row]:
    """One prompt a line, whatever its line ends."""
    return [(line, "") for line in read_text(path).splitlines()]


def read_table(path: Path, text: Sequence[str] = TEXT) -> list[Row]:
    """A CSV or TSV whose first line names its columns; ``text`` names those that may hold the prompt."""
    names, rows = table(path)
    column, category = _column(names, text), _column(names, ("category",))
    if column is None:
        raise _no_column(path, text)
    return [(row[column] or "", (row[category] or "") if category else "") for row in rows]


def read_json(path: Path) -> list[Row]:
    """A JSON list of texts, or of objects with a key ``prompt``, ``caption`` or ``text``."""
    try:
        records = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"prompt file {path}, line {error.lineno}: {error.msg}; it must be a JSON list") from error
    if not isinstance(records, list):
        raise InputError(f"prompt file {path} must be a JSON list, not one {type(records).__name__}")
    return [_record(record, f"prompt file {path}, entry {i}", "category") for i, record in enumerate(records, start=1)]


def read_json_lines(path: Path, category: str = "category") -> list[Row]:
    """One JSON object a line, with a key ``prompt``, ``caption`` or ``text``, or one JSON string a line."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):  # U+2028 may stand in a JSON string
        if not line.strip():
            continue
        where = f"prompt file {path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: {error.msg}; each line must be one JSON object") from error
        rows.append(_record(record, where, category))
    return rows


def table(path: Path) -> tuple[list[str], list[dict[str, str | None]]]:
    """Columns and rows of a CSV or TSV; only a CSV has quoting ("G I G G L E" in PartiPrompts' TSV is all text)."""
    tabs = path.suffix.lower() == ".tsv"
    rows = csv.DictReader(
        io.StringIO(read_text(path)),
        delimiter="\t" if tabs else ",",
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
    )
    try:
        return list(rows.fieldnames or ()), list(rows)
    except csv.Error as error:
        raise InputError(f"prompt file {path}, after line {rows.line_num}: {error}") from error


def read_text(path: Path) -> str:
    """A file's text, UTF-8 with or without a mark; InputError for any other."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"can't read prompt file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"prompt file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if "\0" in text:
        raise InputError(f"prompt file {path} is not a text file")
    return text


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(path).names
        column, category = _column(names, TEXT), _column(names, ("category",))
        if column is None:
            raise _no_column(path, TEXT)
        columns = [column, category] if category else [column]  # never the pictures that may lie beside them
        found = pq.read_table(path, columns=columns).to_pydict()
    except OSError as error:
        raise InputError(f"can't read prompt file {path}: {error.strerror or error}") from error
    except pa.ArrowException as error:
        raise InputError(f"prompt file {path} is not a parquet file ({str(error).splitlines()[0]})") from error
    categories = found[category] if category else [""] * len(found[column])
    return [(str(text or ""), str(kind or "")) for text, kind in zip(found[column], categories, strict=True)]


def _record(record: Any, where: str, category: str) -> Row:
    if isinstance(record, str):
        return record, ""
    column = _column(record, TEXT) if isinstance(record, Mapping) else None
    if column is None or not isinstance(record[column], str):
        raise InputError(f"{where}: no text under 'prompt', 'caption' or 'text'")
    kind = _column(record, (category,))
    return record[column], str(record[kind] or "") if kind else ""


def _column(names: Iterable[str], wanted: Iterable[str]) -> str | None:
    """The name that stands first in ``wanted``, whatever its case."""
    known = {str(name).strip().lower(): name for name in names}
    return next((known[name] for name in wanted if name in known), None)


def _no_column(path: Path, wanted: Sequence[str]) -> InputError:
    return InputError(f"prompt file {path} has no column {' or '.join(map(repr, wanted))}; name one so")
