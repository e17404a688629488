"""Statistics of a run: prompts are clusters, seeds are replicates, models share their noise.

Levels carry cluster-robust intervals, differences are paired by prompt (Miller, arXiv 2411.00640) and judged by a
cluster bootstrap and a sign-flip test; several comparisons are corrected together. Missing values are the caller's to
leave out: nothing here turns a missing score into a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special  # not scipy.stats: it takes two seconds to import

CONFIDENCE = 0.95
GROUPING_SEED = 0  # of the jackknife's groups: part of the definition, so that everyone gets the same interval
RESAMPLING_SEED = 0  # of the bootstrap's resamples and the test's flips: part of the definition too
NUM_RESAMPLES = 10_000
MIN_CLUSTERS = 10  # fewer: a t interval; bootstrap-t has wild tails there (half again to seven times as wide)
EXACT_FLIPS = 14  # up to so many clusters all 2^P signs are tried
_ENTRIES = 2**20  # of a block of resample weights, (resamples, clusters)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A level with its interval, from ``n`` values in ``num_clusters`` prompts; NaN ends where one prompt is all."""

    value: float
    low: float
    high: float
    n: int
    num_clusters: int


@dataclass(frozen=True, slots=True)
class Difference:
    """A paired difference with its interval and the two-sided p-value of "no difference"; error: its standard error."""

    value: float
    low: float
    high: float
    n: int
    num_clusters: int
    p_value: float
    error: float = np.nan


def clustered_mean(values: ArrayLike, clusters: Sequence[str], confidence: float = CONFIDENCE) -> Estimate:
    """Mean of all values with a cluster-robust t interval on G - 1 degrees of freedom (Miller, eq. 4, times G/(G-1)).

    With one value per cluster this is the ordinary t interval. Raises ValueError for no values or non-finite ones.
    """
    x, group = _checked(values, clusters)
    G, n = int(group.max()) + 1, len(x)
    u = np.bincount(group, weights=x - x.mean())  # u_g: the sum of cluster g's residuals
    half = np.nan if G < 2 else _t(confidence, G - 1) * np.sqrt(G / (G - 1) * np.sum(u**2)) / n
    return Estimate(float(x.mean()), float(x.mean() - half), float(x.mean() + half), n, G)


def paired_difference(
    a: ArrayLike, b: ArrayLike, clusters: Sequence[str], confidence: float = CONFIDENCE
) -> Difference:
    """Mean over prompts of d_p = mean over seeds of (a - b); a[i] and b[i] share prompt and noise.

    Interval and p-value as of ``paired_differences``.
    """
    difference, group = _checked(np.asarray(a, np.float64) - np.asarray(b, np.float64), clusters)
    d = np.bincount(group, weights=difference) / np.bincount(group)
    return paired_differences(d[:, None], [len(difference)], confidence)[0]


def paired_differences(
    d: NDArray[np.float64], n: Sequence[int] | None = None, confidence: float = CONFIDENCE, intervals: bool = True
) -> list[Difference]:
    """Judge many paired differences by the same resamples: d (P, C) has a row for each prompt; NaN is missing.

    The interval is a bootstrap-t over prompts (``bootstrap_t``), p the sign-flip test's (``sign_flip``). One prompt
    gives a NaN interval and p = 1: a difference that can't be shown. n: values behind each column, for the record;
    prompts unless given. intervals: False where nobody reads them, most of the time this takes; they are NaN then.
    Raises ValueError for a column without values, or with infinite ones.
    """
    d = np.asarray(d, np.float64)
    present = ~np.isnan(d)
    num = present.sum(axis=0)
    if d.ndim != 2 or np.isinf(d).any() or not num.all():
        raise ValueError(f"needs finite differences by prompt and at least one in every column, not {d.shape}")
    means, errors = _means_and_errors(d)
    low, high = bootstrap_t(d, confidence) if intervals else np.full((2, d.shape[1]), np.nan)
    p = sign_flip(d)
    columns = np.stack([means, low, high, num if n is None else np.asarray(n), num, p, errors], axis=1).tolist()
    return [
        Difference(value, low, high, int(size), int(prompts), p_value, error)
        for value, low, high, size, prompts, p_value, error in columns
    ]


def bootstrap_means(values: NDArray[np.float64], num: int = NUM_RESAMPLES) -> NDArray[np.float64]:
    """Means of values (P, C), NaN where missing, over ``num`` resamples of the P prompts: (num, C).

    All columns are resampled alike, so that their differences are paired. NaN where a resample has none of a column's.
    """
    return _bootstrap(np.asarray(values, np.float64), num)[0]


def bootstrap_t(
    values: NDArray[np.float64], confidence: float = CONFIDENCE
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ends of the studentised bootstrap interval of each column's mean, (C,) each (Efron and Tibshirani 1993, 12.5).

    values: (P, C), a row for each prompt, NaN where missing. Each resample is divided by its own standard error, so
    that skewed differences are covered from both sides. With fewer than 10 prompts, or where a resample has no spread
    (most differences equal), the t interval stands in; NaN for one prompt.
    """
    values = np.asarray(values, np.float64)
    num = (~np.isnan(values)).sum(axis=0)
    means, errors = _means_and_errors(values)
    t = _t(confidence, np.maximum(num - 1, 1))
    low, high = means - t * errors, means + t * errors
    able = np.flatnonzero((num >= MIN_CLUSTERS) & (errors > 0))
    if len(able):
        resampled, spread = _bootstrap(values[:, able], NUM_RESAMPLES)
        steady = np.flatnonzero((spread > 1e-9 * errors[able]).all(axis=0))  # NaN is not
        columns = able[steady]
        studentised = (resampled[:, steady] - means[columns]) / spread[:, steady]
        below, above = np.quantile(studentised, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
        low[columns] = means[columns] - above * errors[columns]
        high[columns] = means[columns] - below * errors[columns]
    return low, high


def sign_flip(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Two-sided p-value of each column's mean under random signs of its values, (C,); values (P, C), NaN missing.

    Where models are alike, a prompt's difference is as likely to be negative (Fisher 1935, section 21). Up to 14
    prompts all signs are tried. Beyond, 10,000 random ones, p = (1 + count) / (1 + 10,000) (Phipson and Smyth 2010),
    or Hoeffding's bound 2 exp(-z^2 / 2), z = |sum d| / sqrt(sum d^2), where that is smaller: random signs alone could
    never show a difference among hundreds.
    """
    d = np.asarray(values, np.float64)
    num, d = (~np.isnan(d)).sum(axis=0), np.nan_to_num(d, nan=0.0)
    p = np.empty(d.shape[1])
    few = num <= EXACT_FLIPS
    for c in np.flatnonzero(few):
        signs = _all_signs(int(num[c]))
        kept = d[~np.isnan(values[:, c]), c]
        p[c] = np.mean(_as_extreme(signs, kept[:, None]))
    if not few.all():
        many = d[:, ~few]
        blocks = [_as_extreme(signs, many).sum(axis=0) for signs in _random_signs(len(d), NUM_RESAMPLES)]
        drawn = (1 + np.sum(blocks, axis=0)) / (1 + NUM_RESAMPLES)
        squares = np.sum(many**2, axis=0)
        z = np.abs(many.sum(axis=0)) / np.sqrt(np.where(squares > 0, squares, 1.0))
        p[~few] = np.minimum(drawn, 2 * np.exp(-(z**2) / 2))
    return p


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979)."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(p) for p in adjusted]


def wilson(successes: float, n: int, confidence: float = CONFIDENCE) -> Estimate:
    """Wilson's score interval for a rate of independent trials; half successes (ties) are allowed."""
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"a rate needs 0 <= successes <= n and n >= 1, not {successes} of {n}")
    return Estimate(successes / n, *_wilson_interval(successes / n, n, confidence), n, n)


def clustered_rate(values: ArrayLike, clusters: Sequence[str], confidence: float = CONFIDENCE) -> Estimate:
    """Mean of values in [0, 1] with Wilson's interval at the effective number of independent values.

    n_eff = p (1 - p) / se^2 with the cluster-robust se (Korn and Graubard 1998), at least one value a cluster. Unlike
    the t interval it stays inside [0, 1], and 64 of 64 right is not taken for certainty.
    """
    mean = clustered_mean(values, clusters, confidence)
    p, G = mean.value, mean.num_clusters
    se = (mean.high - mean.value) / _t(confidence, G - 1) if G > 1 else 0.0
    n_eff = float(np.clip(p * (1 - p) / se**2, G, mean.n)) if se > 0 else float(G)
    low, high = _wilson_interval(p, n_eff, confidence)
    return Estimate(p, low, high, mean.n, G)


@dataclass(frozen=True, slots=True, eq=False)
class Replicates:
    """A set metric's value on n images of ``num_clusters`` prompts, and with each group of prompts left out, (g,).

    Configurations of the same images subtract: 40 of them cost 40 times g evaluations, whatever pairs are compared.
    """

    value: float
    left_out: NDArray[np.float64]
    n: int
    num_clusters: int

    def __sub__(self, other: Replicates) -> Replicates:
        """Replicates of the difference; both must be of the same prompts and seeds."""
        if (self.n, self.num_clusters) != (other.n, other.num_clusters):
            raise ValueError(f"replicates of {self.n} and of {other.n} images are not paired")
        return Replicates(self.value - other.value, self.left_out - other.left_out, self.n, self.num_clusters)

    @property
    def error(self) -> float:
        """Jackknife standard error; NaN for fewer than two groups, or where one left too few images."""
        g = len(self.left_out)
        if g < 2:
            return np.nan
        return float(np.sqrt((g - 1) / g * np.sum((self.left_out - self.left_out.mean()) ** 2)))

    def estimate(self, confidence: float = CONFIDENCE) -> Estimate:
        """The level with its t interval on g - 1 degrees of freedom."""
        half = _t(confidence, max(1, len(self.left_out) - 1)) * self.error
        return Estimate(self.value, self.value - half, self.value + half, self.n, self.num_clusters)

    def difference(self, confidence: float = CONFIDENCE) -> Difference:
        """Judge a difference by a t test on the same error."""
        return _difference(
            self.value, self.error, max(1, len(self.left_out) - 1), self.n, self.num_clusters, confidence
        )


def jackknife(
    statistic: Callable[[NDArray[np.intp]], float], clusters: Sequence[str], num_groups: int = 20
) -> Replicates:
    """Replicates of a set metric by the delete-a-group jackknife over groups of prompts.

    ``statistic`` takes indices into the images. Not the bootstrap: a resample repeats images, which shrinks its
    covariance and moves a Fréchet distance by more than its spread; the jackknife only ever leaves images out, the
    same number each time, so the bias of small samples is (nearly) the same in all replicates and drops out of
    their spread. It errs on the wide side (Efron and Stein 1981), the more so with few images for the dimensions.
    Half samples without replacement cover as well but are no narrower. An interval is about the distance at this number
    of images, not about its limit. Groups depend on the sorted prompts alone.
    """
    subsets = jackknife_subsets(clusters, num_groups)
    left_out = np.array([statistic(indices) for indices in subsets], np.float64)
    return Replicates(float(statistic(np.arange(len(clusters)))), left_out, len(clusters), len(set(clusters)))


def jackknife_subsets(clusters: Sequence[str], num_groups: int = 20) -> list[NDArray[np.intp]]:
    """Indices of the images that stay when each group of prompts is left out; none for a single prompt."""
    cluster = np.unique(np.asarray(clusters), return_inverse=True)[1]
    num_clusters = int(cluster.max()) + 1
    g = min(num_groups, num_clusters)
    group = (np.random.default_rng(GROUPING_SEED).permutation(num_clusters) % g)[cluster]
    return [np.flatnonzero(group != j) for j in range(g)] if g > 1 else []


def minimum_detectable_difference(
    sd: float, n: int, power: float = 0.8, alpha: float = 0.05, comparisons: int = 1
) -> float:
    """The smallest true difference a two-sided paired test shows with ``power``; sd is that of the n differences.

    comparisons: how many are corrected together; alpha / comparisons stands in for Holm's steps, on the safe side.
    """
    return _detection(power, alpha, comparisons) * sd / float(np.sqrt(n))


def prompts_needed(effect: float, sd: float, power: float = 0.8, alpha: float = 0.05, comparisons: int = 1) -> int:
    """How many prompts show a true difference of ``effect`` with ``power``; sd is that of the prompts' differences.

    ``comparisons`` as of ``minimum_detectable_difference``; ``VarianceSplit.sd`` gives sd for a number of seeds.
    """
    if effect == 0:
        raise ValueError("no number of prompts shows a difference of zero")
    return max(2, int(np.ceil((_detection(power, alpha, comparisons) * sd / effect) ** 2)))


@dataclass(frozen=True, slots=True)
class Payoff:
    """Variance of a mean: now, with twice the prompts, with twice the seeds, and with one seed but as many images."""

    now: float
    twice_the_prompts: float
    twice_the_seeds: float
    one_seed: float


@dataclass(frozen=True, slots=True)
class VarianceSplit:
    """Variance between prompts and within them (between seeds), of values or of paired differences.

    Both NaN where no prompt has two seeds: then nothing tells them apart. ``between`` is cut off at zero.
    """

    between: float
    within: float
    num_clusters: int
    n: int

    def variance_of_mean(self, prompts: float, seeds: float) -> float:
        """Variance of the mean over this many prompts, each with this many seeds: between / P + within / (P S)."""
        return (self.between + self.within / seeds) / prompts

    def sd(self, seeds: int) -> float:
        """Standard deviation of a prompt's mean over this many seeds: what the power of n prompts depends on."""
        return float(np.sqrt(self.between + self.within / seeds))

    def payoff(self, prompts: float, seeds: float) -> Payoff:
        """What more prompts or more seeds would buy; at an equal number of images, prompts never buy less.

        seeds: of a prompt, their mean number where it is not the same for all.
        """
        return Payoff(
            self.variance_of_mean(prompts, seeds),
            self.variance_of_mean(2 * prompts, seeds),
            self.variance_of_mean(prompts, 2 * seeds),
            self.variance_of_mean(prompts * seeds, 1),
        )


def variance_split(values: ArrayLike, clusters: Sequence[str]) -> VarianceSplit:
    """Split the variance of values by one-way random effects (analysis of variance, unbalanced: Searle 1992, 3.6).

    Raises ValueError for no values or non-finite ones.
    """
    x, group = _checked(values, clusters)
    sizes = np.bincount(group)
    P, n = len(sizes), len(x)
    if P < 2 or n == P:
        return VarianceSplit(np.nan, np.nan, P, n)
    means = np.bincount(group, weights=x) / sizes
    within = float(np.sum((x - means[group]) ** 2)) / (n - P)
    among = float(np.sum(sizes * (means - x.mean()) ** 2)) / (P - 1)
    usual_size = (n - float(np.sum(sizes**2)) / n) / (P - 1)
    return VarianceSplit(max(0.0, (among - within) / usual_size), within, P, n)


def _checked(values: ArrayLike, clusters: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or len(x) != len(clusters) or not len(x):
        raise ValueError(f"needs as many values as clusters and at least one, not {x.shape} and {len(clusters)}")
    if not np.isfinite(x).all():
        raise ValueError("non-finite values: leave missing scores out and count them")
    return x, np.unique(np.asarray(clusters), return_inverse=True)[1]


def _wilson_interval(p: float, n: float, confidence: float) -> tuple[float, float]:
    """Wilson 1927, eq. for the limits; exactly 0 and 1 at the ends, where rounding would leave 1e-17."""
    z = float(special.ndtri((1 + confidence) / 2))
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * float(np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)))
    return centre - half if p > 0 else 0.0, centre + half if p < 1 else 1.0


def _t(confidence: float, degrees: Any) -> Any:
    """Two-sided quantile of Student's t; degrees of freedom may be an array."""
    return special.stdtrit(degrees, (1 + confidence) / 2)


def _detection(power: float, alpha: float, comparisons: int) -> float:
    """Standard errors that a true difference must have."""
    return float(special.ndtri(1 - alpha / (2 * comparisons)) + special.ndtri(power))


def _means_and_errors(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard error of each column, (C,) each; the error of one value is NaN."""
    present = ~np.isnan(values)
    num = present.sum(axis=0)
    means = np.where(present, values, 0.0).sum(axis=0) / num
    squares = np.where(present, values - means, 0.0) ** 2
    freedom = np.where(num > 1, num - 1, np.nan)
    return means, np.sqrt(squares.sum(axis=0) / freedom / num)


def _bootstrap(values: NDArray[np.float64], num: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard error of each column in each resample of the rows, (num, C) each.

    A resample is a row of counts, so that all are products of one matrix with the values, their squares and, where some
    are missing, their presence.
    """
    P, C = values.shape
    present = ~np.isnan(values)
    centre = np.where(present, values, 0.0).sum(axis=0) / np.maximum(present.sum(axis=0), 1)
    centred = np.where(present, values - centre, 0.0)
    columns = [centred, centred**2] if present.all() else [centred, centred**2, present.astype(np.float64)]
    factors = np.concatenate(columns, axis=1)
    sums = np.concatenate([weights @ factors for weights in _resamples(P, num)])
    n = sums[:, 2 * C :] if sums.shape[1] > 2 * C else np.float64(P)
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample of one value, or of none, has no error
        means = sums[:, :C] / n
        variances = (sums[:, C : 2 * C] / n - means**2).clip(min=0) / (n - 1)
        return means + centre, np.sqrt(variances)


def _resamples(P: int, num: int) -> Iterator[NDArray[np.float64]]:
    """How often each of P prompts is drawn in each of ``num`` resamples: blocks of rows, each of sum P."""
    rng = np.random.default_rng(RESAMPLING_SEED)
    for size in _block_sizes(P, num):
        drawn = rng.integers(0, P, (size, P)) + P * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * P).reshape(size, P).astype(np.float64)


def _random_signs(P: int, num: int) -> Iterator[NDArray[np.float64]]:
    """Rows of P signs, -1 or 1, in blocks; ``num`` rows in all."""
    rng = np.random.default_rng(RESAMPLING_SEED)
    for size in _block_sizes(P, num):
        bits = np.unpackbits(rng.integers(0, 256, (size, -(-P // 8)), np.uint8), axis=1, count=P)
        yield 2.0 * bits.astype(np.float64) - 1.0


def _all_signs(P: int) -> NDArray[np.float64]:
    """All rows of P signs whose first is 1, (2^(P-1), P): the others are their mirror images."""
    codes = np.arange(2 ** (P - 1))[:, None]
    return 1.0 - 2.0 * ((codes >> np.arange(P)) & 1)[:, ::-1].astype(np.float64)


def _as_extreme(signs: NDArray[np.float64], d: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether the sums under these signs, (B, C), are as far from zero as the sums of d (P, C); rounding is a tie."""
    as_far: NDArray[np.bool_] = np.abs(signs @ d) >= np.abs(d.sum(axis=0)) - 1e-9 * np.abs(d).sum(axis=0)
    return as_far


def _block_sizes(P: int, num: int) -> Iterator[int]:
    size = max(1, _ENTRIES // P)
    for start in range(0, num, size):
        yield min(size, num - start)


def _difference(value: float, error: float, degrees: int, n: int, num_clusters: int, confidence: float) -> Difference:
    if np.isnan(error):
        return Difference(value, np.nan, np.nan, n, num_clusters, 1.0)
    half = _t(confidence, degrees) * error
    if error == 0:  # every prompt differs by the same amount
        return Difference(value, value, value, n, num_clusters, 1.0 if value == 0 else 0.0, 0.0)
    p_value = float(2 * special.stdtr(degrees, -abs(value) / error))
    return Difference(value, value - half, value + half, n, num_clusters, p_value, error)
