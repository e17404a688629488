"""What ``distill`` says before it trains, and of what it was trained on."""

from __future__ import annotations

import pytest
import torch

from distill import cli
from distill.export import _training_data
from hypersd_bench.machine import busy_cores


@pytest.mark.parametrize(
    ("device", "threads", "busy", "said"),
    [
        ("cpu", 2, 1.3, "other programs use 1.3 of"),
        ("cpu", 2, 0.2, ""),
        ("cpu", 1, 1.3, ""),  # one thread waits for nobody
        ("cuda", 2, 1.3, ""),
    ],
)
def test_a_shared_cpu_is_told(
    device: str, threads: int, busy: float, said: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(cli, "busy_cores", lambda: busy)
    cli._warn_of_others(device)
    heard = capsys.readouterr()
    assert heard.out == ""
    assert heard.err.startswith(said)
    assert bool(heard.err) == bool(said)


@pytest.mark.parametrize(
    ("base", "source", "emoji"), [("pocket", "scenes", True), ("pocket", "photos", True), ("sdxl", "photos", False)]
)
def test_a_card_names_the_data_and_the_artists_who_are_owed(base: str, source: str, emoji: bool) -> None:
    said = _training_data({"base": base, "data": {"source": source}})
    assert ("`photos`" in said) == (source == "photos")
    assert ("Twemoji" in said) == emoji


def test_busy_cores_are_cores() -> None:
    assert 0 <= busy_cores(0.05) <= 1024
