"""What a run says of itself while it trains: figures, pictures and alarms, to files, trackers and the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from distill.checkpoint import keep_log_until
from distill.health import Watch, describe, read_rows, summary
from distill.scoreboard import Scoreboard, means
from distill.stages import Stage

TRACKER_FOLDER = "tensorboard"


class Journal:
    """Writes ``train.jsonl``, ``scoreboard.jsonl`` and the trackers; only the main process's reaches a file."""

    def __init__(self, folder: Path, accelerator: Accelerator, scoreboard: Scoreboard) -> None:
        self.scoreboard = scoreboard
        self._folder, self._accelerator, self._main = folder, accelerator, accelerator.is_main_process
        self._log = folder / "train.jsonl"
        self._watch = Watch()

    def open(self, images: int) -> None:
        """Go on after ``images`` images seen: what was written after them will be written again."""
        if self._main:
            for log in (self._log, self._folder / "scoreboard.jsonl"):
                keep_log_until(log, images)
        self._accelerator.wait_for_everyone()
        for row in read_rows(self._folder) if images else []:  # what rang before must not ring again
            self._watch.see(row)
        self._accelerator.init_trackers(TRACKER_FOLDER, init_kwargs={"tensorboard": {"purge_step": images + 1}})

    def write(self, row: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        """Write a row of the log, whose ``figures`` also go to the trackers, and tell the alarms it rings."""
        if self._main:
            with self._log.open("a") as file:
                file.write(json.dumps(dict(row)) + "\n")
            self._tell_alarms(row)
        self._accelerator.log(
            {f"{row['stage']}/{name}": value for name, value in figures.items()}, step=row["images_seen"]
        )

    def look(self, stage: Stage, images: int) -> None:
        """Sample the student as it is, and see what the alarms make of it."""
        if not self._main:
            return
        rows = self.scoreboard.look(stage, images)
        self._accelerator.log(means(rows), step=images)
        for tracker in self._accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}  # the others know only this one
            tracker.log_images({f"{stage.name}/samples": self.scoreboard.grid}, step=images, **layout)
        for row in rows:
            self._tell_alarms(row)

    def close(self) -> list[str]:
        """Tell what can only be told at the end; returns the run's health in lines."""
        self._tell(self._watch.close())
        return summary(read_rows(self._folder))

    def _tell_alarms(self, row: Mapping[str, Any]) -> None:
        self._tell(self._watch.see(row))

    def _tell(self, alarms: list[Any]) -> None:
        for alarm in alarms:
            tqdm.write(f"alarm: {describe(alarm)}", file=sys.stderr)  # stdout is for --json
