"""Reward against KL: the points that a sweep gives, and what arms differ by at matched KL.

A policy buys true reward with KL to the reference, and arms at one coefficient buy different amounts, so rewards at a
fixed coefficient are not comparable. For every arm and seed the runs of a sweep over the coefficient (`pref_beta`) are
points (KL, value). Between neighbouring points in the order of their KL the value f(KL) is interpolated linearly, and
arms with weights w_a are compared where all of them have been measured:

    sum_a w_a f_a,  averaged over [max_a min KL_a, min_a max KL_a]

the integral over this common range divided by its length. Nothing is extrapolated: a seed whose arms have no range in
common says nothing, and is named with the reason. Points whose policy has collapsed (well-formed share below .9) are
dropped and named; where points on both sides of a dropped one remain, the line goes from one to the other.

Points are joined in the order of their KL and not of their coefficient: what is compared is what a policy achieves at
a KL, whatever made it go there. Where a smaller coefficient has not given a larger KL, the arm and seed are named;
points of equal KL count as their mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from discobeta.design.variants import text_of
from discobeta.report.published import SWEPT, Published, Source, along, control_of, swept
from discobeta.report.statistics import beyond_rounding

REWARD, KL = "true_reward", ("kl_rao_blackwell", "kl_per_sequence")
"""What is compared at matched KL, and over which KL: the first that is there."""

LEAST_WELL_FORMED = 0.9
WELL_FORMED = "well_formed"


@dataclass(frozen=True)
class Point:
    """One run of a sweep, measured."""

    kl: float  # nats per response
    value: float
    label: str  # the swept settings, e.g. `pref_beta=0.3`
    setting: float  # the swept coefficient
    well_formed: float | None = None  # None where nobody knows

    @property
    def has_collapsed(self) -> bool:
        return self.well_formed is not None and self.well_formed < LEAST_WELL_FORMED


@dataclass
class Matched:
    """What arms differ by at matched KL, by seed.

    differences: of the seeds that have a common range, and `ranges` that range. undecidable: the others, with why.
    """

    differences: dict[int, float] = field(default_factory=dict)
    ranges: dict[int, tuple[float, float]] = field(default_factory=dict)
    undecidable: dict[int, str] = field(default_factory=dict)


def points(
    study: Published, stage: str, source: Source, *, value: str, kl: str, key: str = SWEPT
) -> dict[int, list[Point]]:
    """Seed -> the points of an arm or control over a sweep of `key`, in the order of their KL; collapsed ones too."""
    found: dict[int, list[Point]] = {}
    for run, setting in along(study, stage, key=key).get(source, {}).items():
        kls, values, formed = (study.values(stage, run, metric) for metric in (kl, value, WELL_FORMED))
        for seed in sorted(kls.keys() & values.keys()):
            point = Point(kls[seed], values[seed], _label(key, setting), setting, formed.get(seed))
            found.setdefault(seed, []).append(point)
    return {seed: sorted(of_seed, key=lambda point: (point.kl, point.label)) for seed, of_seed in found.items()}


def _label(key: str, setting: float) -> str:
    return f"{key}={text_of(setting)}"


def asked(study: Published, stage: str, source: Source, key: str) -> set[str]:
    """The labels of the points that the study's config asks for of an arm or a control."""
    sweep, control = (study.settings.get("sweep") or {}).get(stage) or {}, control_of(source.variant)
    if control:
        is_swept = ((study.settings.get("controls") or {}).get(control) or {}).get("swept", False)
    else:
        is_swept = source.arm in (sweep.get("arms") or [source.arm])
    return {_label(key, float(value)) for value in sweep.get(key) or [] if is_swept}


def kl_of(study: Published, stage: str) -> str:
    there = study.metrics(stage)
    return next((name for name in KL if name in there), KL[-1])


def has_frontier(study: Published, stage: str) -> bool:
    return {REWARD, kl_of(study, stage)} <= study.metrics(stage) and bool(swept(study, stage))


def frontiers(study: Published, stage: str) -> dict[Source, dict[int, list[Point]]]:
    """Of every arm and control that has been swept."""
    kl = kl_of(study, stage)
    return {source: points(study, stage, source, value=REWARD, kl=kl) for source in swept(study, stage)}


def matched(weights: Mapping[Source, float], found: Mapping[Source, Mapping[int, Sequence[Point]]]) -> Matched:
    """sum_a w_a f_a at matched KL, by seed.

    weights: of two sources or more. found: of each, `points` by seed. A seed is in one of `differences` and
    `undecidable` if any source has points of it.
    """
    result = Matched()
    for seed in sorted({seed for of_source in found.values() for seed in of_source}):
        lines, lacking = {}, []
        for source in weights:
            there = found.get(source, {}).get(seed, [])
            kept = [point for point in there if not point.has_collapsed]
            lines[source] = line(kept)
            if len(lines[source][0]) < 2:
                alike = ", all of one KL" if len(kept) > 1 else ""
                lacking.append(f"{source.text} has {len(kept)} of {len(there)} points left{alike}")
        low = max((kl[0] for kl, _ in lines.values() if len(kl)), default=np.nan)
        high = min((kl[-1] for kl, _ in lines.values() if len(kl)), default=np.nan)
        if lacking:
            result.undecidable[seed] = "; ".join(lacking)
        elif not low < high:
            result.undecidable[seed] = f"no common range of KL (one begins at {low:.3g}, another ends at {high:.3g})"
        else:
            result.ranges[seed] = float(low), float(high)
            total = mean_over(low, high, [(weight, *lines[source]) for source, weight in weights.items()])
            largest = max(float(np.abs(value).max()) for _, value in lines.values())
            result.differences[seed] = beyond_rounding(total, largest)
    return result


def reasons(undecidable: Mapping[int, str]) -> str:
    """Of each seed that cannot be compared, why."""
    return "; ".join(f"seed {seed}: {why}" for seed, why in undecidable.items())


def mean_over(low: float, high: float, lines: Sequence[tuple[float, np.ndarray, np.ndarray]]) -> float:
    """Integral of sum_a w_a f_a over [low, high] divided by its length, of piecewise linear f_a.

    lines: (w_a, KL, value) each, KL strictly rising. The sum is linear between the knots of all, so the trapezoidal
    rule on them is exact.
    """
    knots = np.unique(np.concatenate([[low, high], *(kl[(kl > low) & (kl < high)] for _, kl, _ in lines)]))
    total = sum(weight * np.interp(knots, kl, value) for weight, kl, value in lines)
    return float(np.sum((total[1:] + total[:-1]) / 2 * np.diff(knots)) / (high - low))


def line(kept: Sequence[Point]) -> tuple[np.ndarray, np.ndarray]:
    """KL, strictly rising, and the mean value at each."""
    kls = np.array([point.kl for point in kept], float)
    values = np.array([point.value for point in kept], float)
    knots, place, counts = np.unique(kls, return_inverse=True, return_counts=True)
    return knots, np.bincount(place, weights=values, minlength=len(knots)) / counts


def remarks(found: Mapping[Source, Mapping[int, Sequence[Point]]]) -> tuple[str, str]:
    """Which runs have collapsed, and which lines do not go further as the coefficient falls; empty where none."""
    dropped: dict[str, list[str]] = {}
    unordered: dict[str, list[str]] = {}
    for source, by_seed in found.items():
        for seed, there in by_seed.items():
            for point in there:
                if point.has_collapsed:
                    share = f"{seed} ({point.well_formed:.3f})"
                    dropped.setdefault(f"{source.text}, {point.label}", []).append(share)
            if _is_unordered([point for point in there if not point.has_collapsed]):
                unordered.setdefault(source.text, []).append(str(seed))
    texts = (
        "; ".join(f"{name}: seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}" for name, seeds in of.items())
        for of in (dropped, unordered)
    )
    return next(texts), next(texts)


def _is_unordered(kept: Sequence[Point]) -> bool:
    """Whether the KL, which rises along `kept`, does not fall where the coefficient rises."""
    settings = [point.setting for point in kept]
    return any(later > earlier for earlier, later in zip(settings, settings[1:], strict=False))
