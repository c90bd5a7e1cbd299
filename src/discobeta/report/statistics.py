"""Statistics over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache


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


def wilson(successes: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a proportion: all q with |p - q| <= z * sqrt(q * (1 - q) / n) (Wilson 1927).

    Unlike p +- z * sqrt(p * (1 - p) / n) it stays in [0, 1] and does not vanish at p = 0 or 1.
    """
    p, shrink = successes / trials, 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / shrink
    half_width = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials)) / shrink
    return centre - half_width, centre + half_width
