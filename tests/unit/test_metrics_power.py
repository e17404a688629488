"""What a run can show, from what a pilot or an assumption says of the spread."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from hypersd_bench.cli.main import main
from hypersd_bench.contracts import MetricInfo
from hypersd_bench.store import ImageRow, RunStore, ScoreRow
from metrics.power import power_of

CLIP = MetricInfo("clip-score/vit-b-32", "CLIP", "higher", "cosine x100", "image")
RATING = MetricInfo("aesthetic/laion-v2", "Aesthetic", "higher", "rating", "image")
FID = MetricInfo("fid/clean", "FID", "lower", "distance", "set")


def pilot(folder: Path, prompts: int, seeds: int, sd_prompt: float, sd_seed: float) -> RunStore:
    """Two models whose difference varies by so much between prompts, and so much between the seeds of one."""
    rng = np.random.default_rng(1)
    manifest = {"baseline": "a", "metrics": [asdict(RATING)], "models": [{"name": name} for name in "ab"]}
    store = RunStore.create(folder, manifest)
    rows = [
        ImageRow(model, 4, f"p{p:03d}", f"prompt {p}", r, 0, f"{model}{p}_{r}.png", f"{model}{p}_{r}", "")
        for model in "ab" for p in range(prompts) for r in range(seeds)
    ]  # fmt: skip
    store.record_images(rows)
    of_prompt = rng.normal(0, sd_prompt, prompts)
    values = {("a", p, r): rng.normal() for p in range(prompts) for r in range(seeds)}
    values |= {
        ("b", p, r): values["a", p, r] + 0.3 + of_prompt[p] + rng.normal(0, sd_seed)
        for p in range(prompts) for r in range(seeds)
    }  # fmt: skip
    store.record_scores(
        [ScoreRow(RATING.id, row.key_id, values[row.model, int(row.prompt_id[1:]), row.replicate])
         for row in store.images()]
    )  # fmt: skip
    return store


def test_the_assumption_for_clip_score_gives_the_published_table() -> None:
    """Prompts for 80 % power at 5 %, sd 3.2, correlation .7: 4,822 for .1 and 193 for .5."""
    needed = [power_of([CLIP], 1000, 1, 1, {CLIP.id: effect}, None)[0].prompts_needed for effect in (0.1, 0.5)]
    assert needed == [pytest.approx(4822, abs=1), pytest.approx(193, abs=1)]
    (one,) = power_of([CLIP], 1000, 1, 1, {}, None)
    assert one.detectable == pytest.approx(0.22, abs=0.005)
    assert one.source.startswith("assumed")
    assert one.twice_the_prompts == pytest.approx((one.detectable or 0) / 2**0.5)


def test_a_pilot_tells_whether_prompts_or_seeds_pay(tmp_path: Path) -> None:
    (one,) = power_of([RATING], 500, 2, 1, {}, pilot(tmp_path / "run", 400, 4, 0.2, 2.0))
    assert one.sd == pytest.approx(np.sqrt(0.04 + 4 / 2), rel=0.1)
    assert one.detectable is not None
    assert one.twice_the_seeds == pytest.approx(one.detectable * np.sqrt((0.04 + 1) / (0.04 + 2)), rel=0.1)
    z = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
    assert one.detectable == pytest.approx(z * (one.sd or 0) / np.sqrt(500))


def test_what_nothing_tells_is_unknown(tmp_path: Path) -> None:
    rating, fid = power_of([RATING, FID], 500, 2, 4, {}, None)
    assert rating.detectable is fid.detectable is None
    assert "--like RUN" in rating.source
    assert "whole set" in fid.source
    one_seed = power_of([RATING], 500, 1, 4, {RATING.id: 0.1}, pilot(tmp_path / "run", 100, 1, 0.2, 0.5))[0]
    assert one_seed.sd == pytest.approx(np.sqrt(0.04 + 0.25), rel=0.2)
    assert one_seed.twice_the_seeds is None
    assert one_seed.prompts_needed is not None


def test_more_comparisons_need_more_prompts() -> None:
    few, many = (power_of([CLIP], 1000, 1, m, {CLIP.id: 0.1}, None)[0].prompts_needed or 0 for m in (1, 100))
    assert 1.5 < many / few < 3


def test_plan_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = ["plan", "--models", "teacher,lcm", "--steps", "4", "--num-prompts", "10", "--no-probe", "--metrics",
            "clip-score/pocket,fid/lite0", "--out", str(tmp_path / "run"), "--no-timing"]  # fmt: skip
    assert main([*spec, "--effect", "clip-score/pocket=0.5", "--json"]) == 0
    clip, fid = json.loads(capsys.readouterr().out)["power"]
    assert (clip["comparisons"], clip["effect"], fid["detectable"]) == (2, 0.5, None)
    assert clip["prompts_needed"] > 193
    assert main([*spec, "--effect", "0.5"]) == 0
    assert f"a difference of 0.5 needs {clip['prompts_needed']} prompts x 1" in capsys.readouterr().out
    assert main([*spec, "--effect", "clip-score/poket=0.5"]) == 2
    assert "did you mean 'clip-score/pocket'" in capsys.readouterr().err
    for nothing in ("-1", "0", "1e-300", "nan"):
        assert main([*spec, "--effect", nothing]) == 2
        assert "give a difference above 0" in capsys.readouterr().err
