"""Statistics over seeds."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from functools import cache
from typing import Literal

import numpy as np

EXACT = 20  # differences: of more, not all signs are tried
INTERVAL_FROM = 6  # values: of fewer, tables show each and no interval of their mean
BOOTSTRAP_FROM = INTERVAL_FROM
SUBSETS = 14  # differences: of more, not all subsets are looked at


def mean_ci(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean and half-width of its confidence interval, mean(x) +- t * s / sqrt(n).

    s has n - 1 in its denominator and t is the quantile (1 + level) / 2 of Student's distribution
    with n - 1 degrees of freedom: 12.7 for two seeds and 4.3 for three, so intervals of few seeds
    are as wide as they should be. NaN where there is nothing to say: the half-width of one value,
    and both of none.
    """
    n = len(values)
    if n == 0:
        return math.nan, math.nan
    mean = math.fsum(values) / n
    if n == 1:
        return mean, math.nan
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, student_t(level, n - 1) * deviation / math.sqrt(n)


@cache
def student_t(level: float, degrees: int) -> float:
    """t with P(-t < T < t) = level for Student's T.

    P(-t < T < t) = 1 - I_x(degrees/2, 1/2) with x = degrees / (degrees + t^2), where I is the regularised
    incomplete beta function (Abramowitz & Stegun 1964, 26.7.1 and 26.5.27).
    """
    from mpmath import betainc, findroot

    def beyond(x: float) -> float:
        return betainc(degrees / 2, 0.5, 0, x, regularized=True) - (1 - level)

    x = float(findroot(beyond, (0, 1), solver="bisect", tol=1e-15, maxsteps=200))
    return math.sqrt(degrees * (1 - x) / x)


def beyond_rounding(difference: float, size: float) -> float:
    """The difference, or 0 if it is what rounding leaves of the sum of equal numbers. size: of the largest of them."""
    return difference if abs(difference) > 1e-12 * abs(size) else 0.0


def wilson(successes: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a proportion: all q with |p - q| <= z * sqrt(q * (1 - q) / n) (Wilson 1927).

    Unlike p +- z * sqrt(p * (1 - p) / n) it stays in [0, 1] and does not vanish at p = 0 or 1.
    """
    p, shrink = successes / trials, 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / shrink
    half_width = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials)) / shrink
    return centre - half_width, centre + half_width


Direction = Literal["less", "greater", "different"]


def sign_flip_p(differences: Sequence[float], direction: Direction = "different") -> float:
    """p of the sign-flip test that paired differences are symmetric about zero (Fisher 1935).

    The share of the 2^n ways to choose their signs whose |sum| is at least the observed one: exact, and never
    below 2^(1-n). With a direction the alternative is that they lie below zero (`less`) or above it (`greater`), and
    the share that of the sums at least as far on that side, never below 2^-n; it is also valid where they are
    symmetric about a number on the other side. From more than 20 differences, 2^20 ways are drawn and the observed
    one is counted in. NaN of none.
    """
    if not len(differences):
        return math.nan
    total = math.fsum(differences)
    if direction == "different":
        side, observed = np.abs, abs(total)
    else:
        towards = 1.0 if direction == "greater" else -1.0
        side, observed = functools.partial(np.multiply, towards), towards * total
    observed -= 1e-9 * math.fsum(map(abs, differences))  # sums of the same numbers differ in their last bits
    if len(differences) <= EXACT:
        sums = np.zeros(1)
        for value in differences:
            sums = np.concatenate([sums + value, sums - value])
        return float(np.mean(side(sums) >= observed))
    signs = np.random.default_rng(0)
    sums = np.zeros(2**EXACT)
    for value in differences:
        sums += value * signs.choice([-1.0, 1.0], size=sums.shape)
    return float((np.sum(side(sums) >= observed) + 1) / (len(sums) + 1))


def equivalence_p(differences: Sequence[float], margin: float) -> float:
    """p of two one-sided tests that the differences lie within ±margin (TOST, Schuirmann 1987), by sign flips.

    The larger of the p that d + margin lies above zero and the p that d - margin lies below it. Either test is exact
    where the differences are symmetric about the edge that it excludes, so together they err with probability alpha
    at most wherever beyond the margin the truth lies. NaN of none.
    """
    above = sign_flip_p([value + margin for value in differences], "greater")
    return max(above, sign_flip_p([value - margin for value in differences], "less"))


def detectable(n: int, alpha: float, power: float = 0.8, *, margin: bool = False) -> float:
    """The least mean difference, in standard deviations of a seed's, that the one-sided sign-flip test finds.

    That is, whose p is at most alpha with probability `power`, of n independent normal differences; infinite where
    2^-n > alpha. With `margin`, the least margin within which differences of mean zero are shown to lie.

    Let z be the differences less their mean delta. A choice of signs that turns the subset F reaches the observed sum
    where delta <= mean_F(-z), so p <= alpha exactly where delta is above the k-th largest of the 2^n - 1 subset means,
    k = floor(alpha 2^n). The answer is the quantile `power` of that number over draws of z (its Monte-Carlo error is
    about 2 % of itself). Of more than 14 differences, subsets are drawn.
    """
    return _detectable(n, round(alpha, 12), power, margin)


@cache
def _detectable(n: int, alpha: float, power: float, margin: bool) -> float:
    bits = min(n, SUBSETS)
    rank = math.floor(alpha * 2**bits + 1e-9)
    if rank < 1:
        return math.inf
    draws = np.random.default_rng(0).standard_normal((max(1000, 2**22 // 2**bits), n))
    of_subset = np.zeros((2**bits - 1, n))
    if n == bits:
        of_subset[:] = (np.arange(1, 2**n)[:, None] >> np.arange(n)) & 1
    else:
        of_subset[:] = np.random.default_rng(1).integers(2, size=of_subset.shape)
    of_subset /= np.maximum(of_subset.sum(axis=1, keepdims=True), 1)
    found = []
    for part in np.array_split(draws, math.ceil(len(draws) / 64)):
        means = part @ of_subset.T
        place = means.shape[1] - rank
        critical = np.partition(means, place, axis=1)[:, place]
        if margin:
            critical = np.maximum(critical, -np.partition(means, rank - 1, axis=1)[:, rank - 1])
        found.append(critical)
    return round(float(np.quantile(np.concatenate(found), power)), 3)  # kernels differ in the last bits


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being several (Holm 1979): the i-th smallest of m times m - i + 1, made monotone.

    Rejecting what is below alpha then errs anywhere in the family with probability alpha at most. A NaN is no test.
    """
    tests = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    adjusted, least = [math.nan] * len(p_values), 0.0
    for rank, (p, place) in enumerate(tests):
        least = max(least, min(1.0, p * (len(tests) - rank)))
        adjusted[place] = least
    return adjusted


def bootstrap(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979), from 10,000 resamples.

    NaN of fewer than 6 values, where it is much too narrow (of two it is at most the span between them).
    """
    if len(values) < BOOTSTRAP_FROM:
        return math.nan, math.nan
    values = np.asarray(values)
    resamples = np.random.default_rng(0).integers(len(values), size=(10_000, len(values)))
    low, high = np.quantile(values[resamples].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
