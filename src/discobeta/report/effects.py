"""What the two ideas do: differences between arms of the same seed, and what seeds say of them.

The arms without idle heads are a 2x2 factorial design: Disco used or not, dynamic beta (LeDPO) used or not. With
the mean y of a metric in them, written y_00 (baseline), y_10 (Disco), y_01 (LeDPO) and y_11 (both):

    Disco          ((y_10 - y_00) + (y_11 - y_01)) / 2
    LeDPO          ((y_01 - y_00) + (y_11 - y_10)) / 2
    interaction    (y_11 - y_01) - (y_10 - y_00)

Each is computed per seed, from runs that share data, initialisation and order, and then summarised over seeds.
A reward model has no reference, so in rm there are two arms and one effect, y_1 - y_0.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from discobeta.design.arms import CORNERS, IDEAS, Arm, Idea
from discobeta.design.stages import STAGES
from discobeta.design.study import Study
from discobeta.report.collect import collect, of_grid, provenance, provenance_line
from discobeta.report.estimates import estimate, interval_header
from discobeta.report.measures import MEASURES, METRICS, TESTED, one_line
from discobeta.report.render import NOTHING, Column, Panel, Row, Table, number, seeds_column
from discobeta.report.results import Results, enumerate_seeds
from discobeta.report.statistics import INTERVAL_FROM, bootstrap, holm, mean_ci, sign_flip_p


def factorial(ideas: tuple[Idea, ...] = IDEAS) -> dict[str, dict[Arm, float]]:
    """Effect -> the weight of each arm: of the main effects and the interactions of a 2^k design.

    The effect of a set T of ideas weighs an arm by the product over T of +1 (used) or -1 (not), over 2^(k - |T|): the
    mean over what the other ideas may be.
    """
    effects = {}
    for size in range(1, len(ideas) + 1):
        for part in itertools.combinations(ideas, size):
            signs = {arm: math.prod(1 if idea.key in arm.used else -1 for idea in part) for arm in CORNERS}
            weights = {arm: sign / 2 ** (len(ideas) - size) for arm, sign in signs.items()}
            effects[" × ".join(idea.label for idea in part)] = weights
    return effects


def comparisons() -> dict[str, dict[Arm, float]]:
    """Difference -> the weight of each arm: every arm against those that use a part of what it uses."""
    order = sorted(CORNERS, key=lambda arm: (len(arm.used), arm.label))
    return {
        f"{short_label(arm)} − {short_label(other)}": {arm: 1, other: -1}
        for arm in order
        for other in order
        if other.used < arm.used
    }


def short_label(arm: Arm) -> str:
    everything = "both" if len(IDEAS) == 2 else "all"
    return everything if len(arm.used) == len(IDEAS) else arm.label


JUDGED_BY_THE_ARM = ("reward_gain",)
"""Metrics whose unit is that of the arm's reward model: compared where the arms have the same kind of it only."""


@dataclass(frozen=True)
class Contrast:
    """A weighted sum of arms, as it is in one stage."""

    name: str
    weights: dict[Arm, float]

    def one_judge(self, stage: str) -> bool:
        """Whether all of its arms are given the same kind of reward model."""
        judge = STAGES[stage].judge
        return judge is None or len({arm.trained_as(judge.stage).used for arm in self.weights}) == 1


def contrasts(named: dict[str, dict[Arm, float]], study: Study, stage: str) -> list[Contrast]:
    """Those that the arms of the study allow; arms that are one run in `stage` count as one."""
    found: dict[frozenset, Contrast] = {}
    for name, weights in named.items():
        merged: Counter = Counter()
        for arm, weight in weights.items():
            merged[arm.trained_as(stage)] += weight
        merged = Counter({arm: weight for arm, weight in merged.items() if weight})
        if merged and set(merged) <= set(study.arms_of(stage)):
            found.setdefault(frozenset(merged.items()), Contrast(name, merged))
    return list(found.values())


def effects_frame(study: Study, metrics: pd.DataFrame, named: dict[str, dict[Arm, float]]) -> pd.DataFrame:
    """One row per stage, metric and contrast, of the grid's own runs. `metrics` is `collect`'s."""
    metrics = of_grid(metrics)
    rows = [
        {"stage": stage, "metric": metric, "contrast": contrast.name, **_summary(study, values, contrast)}
        for stage in study.stages
        for metric in STAGES[stage].compared
        if len(values := metrics[(metrics.stage == stage) & (metrics.metric == metric)])
        for contrast in contrasts(named, study, stage)
        if metric not in JUDGED_BY_THE_ARM or contrast.one_judge(stage)
    ]
    columns = ["stage", "metric", "contrast", "difference", "ci95", "bootstrap_low", "bootstrap_high"]
    columns += ["n_seeds", "n_expected", "missing_seeds", "seeds", "differences"]
    return pd.DataFrame(rows, columns=columns)


def with_seeds(frame: pd.DataFrame, seeds: Sequence[int], values: Iterable[Mapping[int, float]]) -> pd.DataFrame:
    """The frame with a column `seed-N` for each seed; values: seed -> difference, of each row."""
    rows = list(values)
    return frame.assign(**{f"seed-{seed}": [of.get(seed, math.nan) for of in rows] for seed in seeds})


def _summary(study: Study, values: pd.DataFrame, contrast: Contrast) -> dict[str, Any]:
    there = per_seed(values, contrast)
    mean, half_width = mean_ci(there.tolist())
    low, high = bootstrap(there.tolist())
    missing = [seed for seed in study.seeds if seed not in there.index]
    return {
        "difference": mean,
        "ci95": half_width,
        "bootstrap_low": low,
        "bootstrap_high": high,
        "n_seeds": len(there),
        "n_expected": len(study.seeds),
        "missing_seeds": " ".join(map(str, missing)),
        "seeds": there.index.tolist(),
        "differences": there.tolist(),
    }


def per_seed(values: pd.DataFrame, contrast: Contrast) -> pd.Series:
    """Seed -> the contrast of one metric, for the seeds that have all of its arms."""
    by_arm = values.pivot(index="seed", columns="arm", values="value")
    weights = pd.Series({arm.name: float(weight) for arm, weight in contrast.weights.items()})
    by_arm = by_arm.reindex(columns=weights.index).dropna()
    difference = by_arm.mul(weights).sum(axis=1)
    rounding = 1e-12 * by_arm.abs().max(axis=1)  # what is left of the sum of equal numbers is no difference
    return difference.where(difference.abs() > rounding, 0.0)


def tested_effects(study: Study, metrics: pd.DataFrame) -> pd.DataFrame:
    """`effects_frame` of the factorial effects, with p of the sign-flip test and Holm's over the tests of a stage.

    NaN stands beside what is not tested.
    """
    frame = effects_frame(study, metrics, factorial())
    tested = frame.metric.isin(TESTED)
    frame["p"] = [sign_flip_p(of) if test else math.nan for of, test in zip(frame.differences, tested, strict=True)]
    frame["p_holm"] = frame.groupby("stage").p.transform(lambda p: holm(p.tolist())) if len(frame) else []
    return frame


def effects_table(results: Results) -> Table:
    """The factorial effects, tested by sign flips; Holm's correction is over the tests of a stage."""
    frame = tested_effects(results.study, collect(results))
    n = int(frame.n_seeds.max()) if len(frame) else 0
    least = f"; of {n} seed{'s' * (n > 1)} it cannot be below {p_value(2.0 ** (1 - n))}" if n else ""
    columns = [
        *_columns(results, "Effect"),
        Column("p", lambda row: p_value(row["p"])),
        Column("p\n(Holm)", lambda row: p_value(row["p_holm"])),
    ]
    caption = "What the two ideas do: main effects and interaction of the 2×2 design, paired over seeds."
    notes = [
        "Disco and LeDPO: the mean difference that the idea makes, with and without the other. "
        "Disco × LeDPO: what Disco changes with LeDPO minus what it changes without; zero if the two add up. In rm "
        "there is Disco alone.",
        f"p: two-sided sign-flip test of the differences per seed{least}. Tested is what the hypotheses are about, NLL "
        "and true reward, and – stands beside what is not; Holm's correction is over the tests of a stage.",
    ]
    return _table(results, frame, caption, columns, notes, "Effects of the two ideas")


def comparisons_table(results: Results) -> Table:
    """One arm against another; sums of the factorial effects, so with intervals and without tests of their own."""
    frame = effects_frame(results.study, collect(results), comparisons())
    caption = "One arm against another, paired over seeds."
    notes = [
        "These are sums of the effects in the table of effects and therefore not tested once more; of twenty 95 % "
        "intervals one excludes zero by chance."
    ]
    if "reward_gain" in set(frame.metric):
        notes.append("Reward gains are compared where both arms have the same kind of reward model, with Disco or not.")
    return _table(results, frame, caption, _columns(results, "Difference"), notes, "One arm against another")


def _columns(results: Results, header: str) -> list[Column]:
    seeds = results.study.seeds
    return [
        Column("Stage", lambda row: row["stage"], is_number=False),
        Column("Metric", lambda row: one_line(METRICS[row["metric"]].header), is_number=False),
        Column(header, lambda row: row["contrast"], is_number=False),
        seeds_column(),
        Column(interval_header(seeds), lambda row: difference(row, seeds)),
        Column("Bootstrap\n95 % CI", _interval),
    ]


def difference(row: Row, seeds: Sequence[int]) -> str:
    """Of a row of `effects_frame`; how many seeds it has stands beside it."""
    values = dict(zip(row["seeds"], row["differences"], strict=True))
    return estimate(values, seeds if len(seeds) < INTERVAL_FROM else list(values), MEASURES[row["metric"]].decimals)


def _table(
    results: Results, frame: pd.DataFrame, caption: str, columns: list[Column], notes: list[str], title: str
) -> Table:
    seeds = results.study.seeds
    if frame.empty:
        notes = ["No two arms of this study differ in what they use and have been measured."]
    else:
        shown = (
            "the mean of fewer than six is shown with each of them"
            if len(seeds) < INTERVAL_FROM
            else "± is the half-width of Student's interval of their mean"
        )
        notes = [
            *notes,
            f"Differences per seed are between runs that share data, initialisation and order; {shown}. A KL that "
            "differs means that other metrics of the policies are not compared at equal KL.",
        ]
    lacking = frame[frame.missing_seeds != ""].groupby("stage", sort=False).missing_seeds.agg(" ".join)
    if len(lacking):
        notes.append(
            f"Missing: {_missing(lacking)}. A seed counts where all arms of a difference are there. "
            f"Not there: {_reasons(results, lacking.index)}."
        )
    by_seed = (dict(zip(*of, strict=True)) for of in zip(frame.seeds, frame.differences, strict=True))
    kept = with_seeds(frame.drop(columns=["seeds", "differences"]), seeds, by_seed)
    notes, made_by = [*notes, provenance_line(results)], provenance(results)
    return Table(kept, [Panel(caption, columns, keys=4)], notes, made_by, ["stage", "metric"], frame, title)


def _missing(lacking: pd.Series) -> str:
    return "; ".join(
        f"{stage}: {enumerate_seeds(sorted(set(map(int, texts.split()))))}" for stage, texts in lacking.items()
    )


def _reasons(results: Results, stages: pd.Index) -> str:
    runs = [run for run in results.study.grid_runs() if run.arm in CORNERS and not run.proof]
    said = {stage: results.describe_missing(run for run in runs if run.stage == stage) for stage in stages}
    return "; ".join(f"{stage}, {text or 'a metric of some runs'}" for stage, text in said.items())


def _interval(row: Row) -> str:
    if math.isnan(row["bootstrap_low"]):
        return NOTHING
    decimals = METRICS[row["metric"]].decimals
    return f"{number(row['bootstrap_low'], decimals)} to {number(row['bootstrap_high'], decimals)}"


def p_value(p: float) -> str:
    """Two digits that count, at least three decimals."""
    if math.isnan(p):
        return NOTHING
    return f"{p:.3f}" if p >= 0.01 else f"{p:.2g}"
