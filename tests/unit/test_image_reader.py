"""How a run's rows are cut into batches for metrics that want a prompt's images together."""

from __future__ import annotations

from hypersd_bench.runner.image_reader import BATCH_SIZE, whole_prompts
from hypersd_bench.store import ImageRow


def test_batches_hold_whole_prompts_and_are_no_larger_than_they_must() -> None:
    rows = [
        ImageRow(model, 4, f"p{p}", "a fox", r, 0, f"{model}/{p}_{r}.png", "0" * 64, "x")
        for model in ("a", "b") for p in range(50) for r in range(3)
    ]  # fmt: skip
    batches = list(whole_prompts(rows))
    assert [row for batch in batches for row in batch] == rows
    assert max(map(len, batches)) < BATCH_SIZE + 3
    places = {(row.model, row.prompt_id): i for i, batch in enumerate(batches) for row in batch}
    assert all(places[row.model, row.prompt_id] == i for i, batch in enumerate(batches) for row in batch)
