"""The question of a study and its answer: the arms without idle heads side by side, and what the tests say, in words.

Words follow the numbers and decide nothing: an effect is called decided only where the sign-flip test, corrected for
all tests of its stage, is below 5 %; whatever else the seeds say is told as it is, how many and by how much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pandas as pd

from discobeta.design.arms import CORNERS, Arm
from discobeta.design.stages import STAGES
from discobeta.report.collect import collect, of_grid
from discobeta.report.compare import EQUAL
from discobeta.report.effects import factorial, p_value, tested_effects
from discobeta.report.measures import METRICS, TESTED, Metric
from discobeta.report.neutrality import neutrality_frame
from discobeta.report.render import number
from discobeta.report.results import Results

LEVEL = 0.05
"""Of the tests, corrected for being several."""

STANDS_FOR = {"excess_kl": "nll", "true_reward": "reward_gain"}
"""What is known of the truth alone -> what is shown in its place where that is not known."""

AT_WHICH = "kl_per_sequence"
"""What has to be said beside any other number of a policy."""


@dataclass(frozen=True)
class Cell:
    """One metric of one arm in one stage.

    instead: what is said where the arm has no run of its own here: `same run as baseline`.
    """

    values: dict[int, float] = field(default_factory=dict)  # seed -> value
    baseline: dict[int, float] = field(default_factory=dict)
    expected: int = 0
    instead: str = ""

    @property
    def mean(self) -> float:
        return math.fsum(self.values.values()) / len(self.values) if self.values else math.nan

    @property
    def differences(self) -> list[float]:
        """To the baseline of the same seed."""
        return [value - self.baseline[seed] for seed, value in self.values.items() if seed in self.baseline]


@dataclass(frozen=True)
class Headline:
    """columns: (stage, metric), in the order of the stages; rows: an arm and its cells, in the order of the columns."""

    columns: list[tuple[str, Metric]]
    rows: list[tuple[Arm, list[Cell]]]


def headline(results: Results) -> Headline:
    """The arms without idle heads by the metrics that say most of a stage; of a stage that has been measured."""
    numbers = of_grid(collect(results))
    columns = [
        (stage, METRICS[name])
        for stage in results.study.stages
        for name in _most_telling(stage, set(numbers.metric[numbers.stage == stage]))
    ]
    by_place = {
        key: dict(zip(part.seed, part.value, strict=True))
        for key, part in numbers.groupby(["stage", "metric", "arm"], sort=False)
    }
    rows = [
        (arm, [_cell(results, by_place, stage, metric.name, arm) for stage, metric in columns])
        for arm in CORNERS
        if arm in results.study.arms
    ]
    return Headline(columns, rows)


def _most_telling(stage: str, measured: set[str]) -> list[str]:
    """What arms are compared by in a stage; nothing for which something better known stands."""
    compared = STAGES[stage].compared
    replaced = {STANDS_FOR[name] for name in compared if name in STANDS_FOR and name in measured}
    return [name for name in compared if name in measured and name not in replaced]


def _cell(results: Results, by_place: dict, stage: str, metric: str, arm: Arm) -> Cell:
    trained = arm.trained_as(stage)
    if trained != arm:
        return Cell(instead=f"same run as {trained.label}")
    values = by_place.get((stage, metric, arm.name), {})
    baseline = {} if arm == Arm() else by_place.get((stage, metric, Arm().name), {})
    return Cell(values, baseline, len(results.study.seeds))


# --- what the tests say


@dataclass(frozen=True)
class Finding:
    """What an effect does to one metric of a stage, and what the seeds say of that.

    p, p_holm: NaN of what is not tested. tests: how many the stage has.
    """

    stage: str
    effect: str
    metric: Metric
    differences: list[float]  # one per seed
    expected: int
    p: float = math.nan
    p_holm: float = math.nan
    tests: int = 0

    @property
    def mean(self) -> float:
        return math.fsum(self.differences) / len(self.differences) if self.differences else math.nan

    @property
    def is_tested(self) -> bool:
        return not math.isnan(self.p)

    @property
    def verdict(self) -> str:
        """better, worse, undecided; of what is not tested, or says nothing yet, the empty text."""
        if not self.is_tested or len(self.differences) < 2 or not any(self.differences):
            return ""
        if self.p_holm > LEVEL:
            return "undecided"
        return "better" if (self.mean > 0) == (self.metric.better == "↑") else "worse"

    @property
    def words(self) -> str:
        """E.g. `NLL lower by 0.0213, in 6 of 6 seeds (p = 0.031)`, or `true reward undecided: …`."""
        name, n = self.metric.words, len(self.differences)
        if name[1].islower():
            name = name[0].lower() + name[1:]
        if n == 0:
            return f"{name} not known yet: no seed has all of its runs"
        if not any(self.differences):
            return f"{name} {self._equal}{self._absent}"
        direction = "lower" if self.mean < 0 else "higher"
        agreeing = sum((value < 0) == (self.mean < 0) for value in self.differences if value)
        than = " than what the two do alone adds up to," if " × " in self.effect else ""
        said = f"{direction}{than} by {number(abs(self.mean), self.metric.decimals)}"
        said += f", in {agreeing} of {n} seeds" if n > 1 else " in the one seed that is there"
        if self.verdict != "undecided":
            return f"{name} {said}{self._absent}{self._p if self.verdict else ''}"
        return f"{name} undecided: {said}{self._absent}{self._p}"

    @property
    def _equal(self) -> str:
        same = "exactly what the two do alone adds up to" if " × " in self.effect else "the same"
        return f"{same} in {'all ' if len(self.differences) > 1 else ''}{_seeds(len(self.differences))}"

    @property
    def _absent(self) -> str:
        absent = self.expected - len(self.differences)
        return f", {_seeds(absent)} missing" if absent else ""

    @property
    def _p(self) -> str:
        n, least = len(self.differences), 2.0 ** (1 - len(self.differences))
        if least > LEVEL:
            return f" (p = {p_value(self.p)}; of {n} seeds it cannot be below {p_value(least)})"
        corrected = f"; {p_value(self.p_holm)} corrected for the {self.tests} tests of the stage"
        return f" (p = {p_value(self.p)}{corrected if self.tests > 1 else ''})"


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def findings(results: Results) -> list[Finding]:
    """By effect, stage and metric: what is tested, and of what is not, what must be said beside it."""
    frame = tested_effects(results.study, collect(results))
    tests = frame.groupby("stage").p.count()
    found = [
        Finding(
            row["stage"], row["contrast"], METRICS[row["metric"]], row["differences"], row["n_expected"],
            row["p"], row["p_holm"], int(tests[row["stage"]]),
        )
        for row in frame.to_dict("records")
        if row["metric"] in (*TESTED, *STANDS_FOR, AT_WHICH)
    ]  # fmt: skip
    order = list(factorial())
    return sorted(found, key=lambda finding: (order.index(finding.effect), results.study.stages.index(finding.stage)))


# --- what they cost, and whether idle heads change nothing


def cost_ratios(results: Results) -> dict[str, list[tuple[Arm, float, int]]]:
    """Stage -> (arm, seconds of training over the baseline's, of how many seeds), over the seeds that both have."""
    numbers = of_grid(collect(results))
    seconds = numbers[numbers.metric == "cost/seconds"]
    found: dict[str, list[tuple[Arm, float, int]]] = {}
    for stage in results.study.stages:
        by_arm = seconds[seconds.stage == stage].pivot(index="seed", columns="arm", values="value")
        for arm in CORNERS[1:]:
            if not {arm.name, Arm().name} <= set(by_arm.columns):
                continue
            both = by_arm[[arm.name, Arm().name]].dropna()
            total: pd.Series = both.sum()
            if len(both) and total[Arm().name] > 0:
                found.setdefault(stage, []).append((arm, total[arm.name] / total[Arm().name], len(both)))
    return found


def neutrality(results: Results) -> tuple[int, int, int]:
    """How many runs or proofs with an idle head equal their twin byte for byte, how many differ, of how many."""
    frame = neutrality_frame(results)
    return int((frame.result == EQUAL).sum()), int((frame.result == "differs").sum()), len(frame)
