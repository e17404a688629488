"""Agreement against evalica, published values, and counting by hand."""

from __future__ import annotations

import evalica
import numpy as np
import pandas as pd
import pytest

from metrics.rater_agreement import krippendorff_alpha, leave_one_out_agreement, percent_agreement, retest


def _long(table: np.ndarray) -> tuple[list[str], list[str], list[str]]:
    labels, items, raters = [], [], []
    for r, row in enumerate(table):
        for i, label in enumerate(row):
            if not np.isnan(label):
                labels.append(str(int(label)))
                items.append(str(i))
                raters.append(str(r))
    return labels, items, raters


@pytest.mark.parametrize("seed", range(5))
def test_alpha_is_evalica_s(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 4, (6, 40)).astype(float)
    table[rng.random(table.shape) < 0.35] = np.nan
    table[:, :15] = table[0, :15]  # some agreement
    theirs = evalica.alpha(pd.DataFrame(table), distance="nominal")
    assert krippendorff_alpha(*_long(table)).value == pytest.approx(theirs.alpha, abs=1e-12)


def test_alpha_of_krippendorff_s_own_example() -> None:
    """Krippendorff 2011, section C: four observers, twelve units, nominal alpha 0.743."""
    n = np.nan
    table = np.array([
        [1, 2, 3, 3, 2, 1, 4, 1, 2, n, n, n],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, n, 3],
        [n, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, n],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, n],
    ])  # fmt: skip
    assert krippendorff_alpha(*_long(table)).value == pytest.approx(0.743, abs=5e-4)


def test_agreement_by_hand() -> None:
    labels, items, raters = ["a", "a", "b", "b", "b", "a"], ["1", "1", "1", "2", "2", "3"], list("xyzxyx")
    found = percent_agreement(labels, items, raters)
    assert found.value == pytest.approx(2 / 4)  # of item 1's three pairs one agrees, of item 2's one pair one
    assert (found.n, found.num_clusters) == (5, 2)


def test_intervals_widen_where_prompts_share_their_answers() -> None:
    rng = np.random.default_rng(0)
    labels, items, raters, prompts = [], [], [], []
    for prompt in range(12):
        clear = rng.random() < 0.5
        for pair in range(8):
            for rater in range(4):
                labels.append("a" if clear else rng.choice(["a", "b"]))
                items.append(f"{prompt}-{pair}")
                raters.append(str(rater))
                prompts.append(str(prompt))
    by_item, by_prompt = percent_agreement(labels, items, raters), percent_agreement(labels, items, raters, prompts)
    assert by_item.value == by_prompt.value
    assert by_prompt.high - by_prompt.low > 1.5 * (by_item.high - by_item.low)
    assert by_prompt.low < by_prompt.value < by_prompt.high


def test_the_bootstrap_covers() -> None:
    covered = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        same = rng.random((60, 2)) < 0.7  # two raters; the same label where a coin says so
        labels = [label for i, _ in enumerate(same) for label in ("a", "a" if same[i, 0] else "b")]
        items = [str(i) for i in range(60) for _ in range(2)]
        found = percent_agreement(labels, items, ["x", "y"] * 60, num_resamples=400)
        covered += found.low <= 0.7 <= found.high
    assert 88 <= covered <= 100


def test_nothing_to_agree_on_is_not_defined() -> None:
    assert np.isnan(krippendorff_alpha([], [], []).value)
    assert np.isnan(krippendorff_alpha(["a", "b"], ["1", "2"], ["x", "x"]).value)
    assert np.isnan(krippendorff_alpha(["a"] * 4, ["1", "1", "2", "2"], list("xyxy")).value)  # one label only
    assert np.isnan(retest([], [], []).value)


def test_a_rater_gives_an_item_one_label() -> None:
    with pytest.raises(ValueError, match="two labels"):
        krippendorff_alpha(["a", "b"], ["1", "1"], ["x", "x"])


def test_retest_by_hand() -> None:
    found = retest(["a", "b", "tie", "a"], ["a", "a", "tie", "a"], ["x", "x", "y", "y"])
    assert (found.value, found.n, found.num_clusters) == (0.75, 4, 2)
    assert found.low <= 0.75 <= found.high


def test_leave_one_out_by_hand() -> None:
    scores = [1, 1, 0, 1, 0.5, 0, 1]
    items, raters = ["1", "1", "1", "2", "2", "3", "3"], list("xyzxyxy")
    found = leave_one_out_agreement(scores, items, raters)
    # item 1: for x the others are split; for y too; z is against both. item 2: the others tie. item 3: x against y
    assert found["z"] == (0.0, 1)
    assert found["x"] == (0.0, 1)
    assert found["y"] == (0.0, 1)
