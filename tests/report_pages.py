"""Reports of runs as the command line writes them, for tests of the page."""

from __future__ import annotations

from pathlib import Path

from reports import page
from reports.read import open_report


def write_report(run: Path, out: Path, study: Path | None = None) -> Path:
    """Write a report folder; returns its page."""
    folders, data = open_report([run], study)
    return page.write_report(data, folders, out)


def write_single_file(run: Path, file: Path, study: Path | None = None) -> Path:
    """Write a report as one file."""
    folders, data = open_report([run], study)
    return page.write_single_file(data, folders, file)
