"""Registered hypotheses and what the numbers of published studies say of them.

config/hypotheses.yaml says before the runs what is claimed, of which study, by which weighted sum of runs of a seed, in
which direction; `judge` computes the sum per seed, tests it and gives a verdict:

    supported     the one-sided exact sign-flip test in the registered direction has a Holm-adjusted p <= alpha
    equivalent    two one-sided sign-flip tests (TOST) put the difference within ±margin, likewise adjusted
    contradicted  the test in the other direction (of an equivalence: beyond the margin on either side, its p doubled)
                  has one, adjusted among the tests of that kind
    undecided     neither; the least difference that would have been found stands beside it
    undecidable   there is no test: numbers are not there, or too few seeds can be compared; with the reason

Two errors are controlled apart, each at most alpha over all hypotheses of a family (a stage): to support any that is
false, and to contradict any that is true. Holm's correction counts every registered hypothesis of the family from the
start, one without numbers as p = 1, so a verdict of today holds when the others' numbers come.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pandas as pd
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from discobeta.design.arms import BY_NAME
from discobeta.design.config import FIELDS
from discobeta.design.stages import STAGES
from discobeta.design.study_file import an_arm
from discobeta.design.yaml_text import read_yaml
from discobeta.errors import UserError, did_you_mean, shown
from discobeta.report import frontier, published
from discobeta.report.effects import p_value, with_seeds
from discobeta.report.estimates import estimate, interval_header
from discobeta.report.measures import MEASURES
from discobeta.report.published import Published, Source
from discobeta.report.render import NOTHING, Column, Panel, Row, Table, number
from discobeta.report.statistics import (
    INTERVAL_FROM,
    beyond_rounding,
    detectable,
    equivalence_p,
    holm,
    mean_ci,
    sign_flip_p,
)

OTHER_WAY = {"less": "greater", "greater": "less"}
VERDICTS = ("supported", "equivalent", "contradicted", "undecided", "undecidable")

# --- what is registered


class _Mapping(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _keys_are_known(cls, settings: Any) -> Any:
        for key in settings if isinstance(settings, dict) else ():
            if key not in cls.model_fields:
                near = did_you_mean(key, cls.model_fields) or f"; the keys are {', '.join(cls.model_fields)}"
                raise ValueError(f"unknown key {shown(key)}{near}")
        return settings


class Term(_Mapping):
    """One run of a seed, and its weight in the difference."""

    weight: Annotated[float, Field(strict=False, allow_inf_nan=False)]
    arm: Annotated[str, AfterValidator(an_arm)]
    variant: str = ""
    metric: str | None = None  # instead of the hypothesis's

    @property
    def source(self) -> Source:
        return Source(self.arm, self.variant)


class MatchedKL(_Mapping):
    """Compare `value` at equal `over`, along a sweep of `vary`; see `frontier`."""

    value: str
    over: str
    vary: str = "pref_beta"

    @model_validator(mode="after")
    def _a_run_key(self) -> Self:
        if self.vary not in FIELDS:
            raise ValueError(f"vary: {shown(self.vary)} is no key of a run")
        return self


class Hypothesis(_Mapping):
    """A claim about a weighted sum of numbers of the same seed: less than zero, greater, different, or equivalent."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9]*$", max_length=20)]
    stage: Literal[tuple(STAGES)]
    study: str | list[str]  # folder of the numbers, or those of its parts
    text: str
    quantity: str = ""  # what is compared, in words, where the metric's own do not say it
    metric: str | None = None
    matched: MatchedKL | None = None
    contrast: Annotated[list[Term], Field(min_length=2)]
    direction: Literal["less", "greater", "different", "equivalent"]
    margin: Annotated[float, Field(gt=0, allow_inf_nan=False, strict=False)] | None = None
    expected: str = ""  # what is known before, e.g. of tuning seeds

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if not self.studies or any(not name or name.startswith(("/", "..")) for name in self.studies):
            raise ValueError("study should be the name of a folder of the published results, or a list of such")
        if (self.metric is None) == (self.matched is None):
            raise ValueError("say either metric, or matched with value and over")
        if (self.margin is None) != (self.direction != "equivalent"):
            raise ValueError("a margin belongs to direction: equivalent, and to that alone")
        if abs(sum(term.weight for term in self.contrast)) > 1e-9 or all(term.weight == 0 for term in self.contrast):
            raise ValueError("contrast: the weights should add up to 0, and not all be 0")
        cells = [(term.source, term.metric or self.metric) for term in self.contrast]
        if len(set(cells)) < len(cells):
            raise ValueError("contrast: the same run stands there twice")
        for term in self.contrast:
            if (trained := BY_NAME[term.arm].trained_as(self.stage).name) != term.arm:
                raise ValueError(f"contrast: {self.stage} trains no {term.arm}: it is {trained} there")
            if self.matched and term.metric:
                raise ValueError("contrast: metric may not stand here: at matched KL all runs have the same")
        return self

    @property
    def studies(self) -> list[str]:
        return [self.study] if isinstance(self.study, str) else self.study

    @property
    def measured(self) -> str:
        """The metric of the difference."""
        return self.matched.value if self.matched else self.metric

    @property
    def words(self) -> str:
        """What is compared, e.g. `True reward at matched KL`."""
        name = self.measured
        words = MEASURES[name].words if name in MEASURES else name.replace("_", " ")
        return self.quantity or (f"{words} at matched KL" if self.matched else words)

    @property
    def decimals(self) -> int:
        known = MEASURES.get(self.measured) or MEASURES.get(self.measured.rpartition("/")[2])
        return known.decimals if known else 3


class Registered(_Mapping):
    """All that is registered, and how it is judged."""

    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    power: Annotated[float, Field(gt=0.5, lt=1)] = 0.8
    least_seeds: Annotated[int, Field(ge=2)] = 6
    hypotheses: Annotated[list[Hypothesis], Field(min_length=1)]

    @model_validator(mode="after")
    def _different(self) -> Self:
        ids = [hypothesis.id for hypothesis in self.hypotheses]
        for name in ids:
            if ids.count(name) > 1:
                raise ValueError(f"hypotheses: {name} stands there twice")
        return self


def read(path: Path) -> Registered:
    """The hypotheses of a file. Raises UserError that names the hypothesis and the key."""
    settings = read_yaml(path)
    try:
        return Registered.model_validate(settings)
    except ValidationError as error:
        raise UserError(f"{path}{_first_fault(error, settings)}") from None


def _first_fault(error: ValidationError, settings: Any) -> str:
    fault = error.errors(include_url=False)[0]
    place, value = "", settings
    for part in fault["loc"]:
        inside = value[part] if isinstance(value, list | dict) and _is_in(part, value) else None
        if isinstance(part, int):
            known = inside.get("id") if isinstance(inside, dict) else None
            place += f": {known}" if isinstance(known, str) else f"[{part + 1}]"
        elif isinstance(value, dict):
            place += f": {part}"
        value = inside
    if fault["type"] == "missing":
        return f"{place} is missing"
    if fault["type"] == "value_error":
        return f"{place}: {fault['ctx']['error']}"
    words = fault["msg"][0].lower() + fault["msg"][1:]
    return f"{place}: {shown(fault['input'])}: {words}"


def _is_in(part: int | str, value: list | dict) -> bool:
    return part < len(value) if isinstance(value, list) and isinstance(part, int) else part in value


def digest(path: Path) -> str:
    """The first 12 digits of the file's sha256: which text was registered."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


# --- the difference of every seed


@dataclass
class Differences:
    """The contrast of every seed that has one.

    fault: why there is none at all. missing: seeds of the study whose numbers are not all there, with what is not.
    undecidable: seeds that cannot be compared, with why. remarks: what else is to be known, e.g. dropped runs.
    """

    values: dict[int, float] = field(default_factory=dict)
    fault: str = ""
    missing: dict[int, str] = field(default_factory=dict)
    undecidable: dict[int, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def differences(hypothesis: Hypothesis, study: Published) -> Differences:
    """The weighted sum of every seed, of one metric or at matched KL."""
    weights = {(term.source, term.metric or hypothesis.metric): term.weight for term in hypothesis.contrast}
    if hypothesis.matched:
        return _at_matched_kl(hypothesis, study)
    found = {cell: study.values(hypothesis.stage, *cell) for cell in weights}
    result = Differences()
    if absent := [_cell_text(*cell) for cell, values in found.items() if not values]:
        result.fault = f"{study.name} has no {', no '.join(absent)}"
        return result
    for seed in sorted({*study.seeds, *(seed for values in found.values() for seed in values)}):
        if absent := [_cell_text(*cell) for cell, values in found.items() if seed not in values]:
            result.missing[seed] = f"no {', no '.join(absent)}"
            continue
        terms = [weight * found[cell][seed] for cell, weight in weights.items()]
        result.values[seed] = beyond_rounding(math.fsum(terms), max(map(abs, terms)))
    return result


def _cell_text(source: Source, metric: str) -> str:
    return f"{metric} of {source.text}"


def _at_matched_kl(hypothesis: Hypothesis, study: Published) -> Differences:
    asked = hypothesis.matched
    weights = {term.source: term.weight for term in hypothesis.contrast}
    found = {
        source: frontier.points(study, hypothesis.stage, source, value=asked.value, kl=asked.over, key=asked.vary)
        for source in weights
    }
    result = Differences()
    if absent := [source.text for source, points in found.items() if not points]:
        result.fault = f"{study.name} has no {asked.value} over {asked.over} of {', '.join(absent)}"
        return result
    compared = frontier.matched(weights, found)
    result.values, result.undecidable = compared.differences, compared.undecidable
    # a run that has not been made is no collapse: every seed should have the points that the study asks for
    is_judged = frontier.WELL_FORMED in study.metrics(hypothesis.stage)
    for source, points in found.items():
        labels = {point.label for of_seed in points.values() for point in of_seed}
        labels |= frontier.asked(study, hypothesis.stage, source, asked.vary)
        for seed in study.seeds:
            there = {point.label: point for point in points.get(seed, [])}
            if lacking := sorted(labels - set(there)):
                result.missing.setdefault(seed, f"no {source.text}, {', '.join(lacking)}")
            if unknown := sorted(label for label in there if is_judged and there[label].well_formed is None):
                result.missing.setdefault(seed, f"no {frontier.WELL_FORMED} of {source.text}, {', '.join(unknown)}")
    dropped, unordered = frontier.remarks(found)
    if dropped:
        result.remarks.append(f"dropped, of fewer than 90 % well-formed responses (their share): {dropped}")
    if unordered:
        result.remarks.append(f"KL does not fall along {asked.vary}: {unordered}")
    return result


# --- the verdict


@dataclass
class Verdict:
    """What the numbers say of one hypothesis. NaN where there is nothing to say."""

    hypothesis: Hypothesis
    found: Differences
    difference: float  # mean over seeds
    ci95: float  # half-width of its interval (Student)
    sd: float  # of the seeds' differences
    p: float  # in the registered direction
    p_against: float  # in the other
    p_holm: float = math.nan
    against_holm: float = math.nan
    detectable: float = math.nan  # least true difference (of an equivalence: least margin) that would be found
    verdict: str = "undecidable"
    why: str = ""

    @property
    def n(self) -> int:
        return len(self.found.values)

    def row(self, alpha: float) -> dict[str, Any]:
        asked = self.hypothesis
        return {
            "id": asked.id,
            "stage": asked.stage,
            "study": " + ".join(asked.studies),
            "text": asked.text,
            "quantity": asked.words,
            "contrast": contrast_text(asked),
            "direction": asked.direction,
            "margin": math.nan if asked.margin is None else asked.margin,
            "n_seeds": self.n,
            "difference": self.difference,
            "ci95": self.ci95,
            "sd": self.sd,
            "p": self.p,
            "p_holm": self.p_holm,
            "p_against": self.p_against,
            "p_against_holm": self.against_holm,
            "detectable": self.detectable,
            "alpha": alpha,
            "verdict": self.verdict,
            "why": self.why,
            "remarks": ". ".join(self.found.remarks),
        }


def contrast_text(hypothesis: Hypothesis) -> str:
    """E.g. `disco-used_beta-absent − baseline, probit`."""
    texts = []
    for term in hypothesis.contrast:
        size = "" if abs(term.weight) == 1 else f"{abs(term.weight):g} "
        metric = f" ({term.metric})" if term.metric else ""
        texts.append(f"{'−' if term.weight < 0 else '+'} {size}{term.source.text}{metric}")
    return " ".join(texts).removeprefix("+ ")


def from_folder(folder: Path) -> Callable[[Hypothesis], Published | str]:
    """What finds the study of a hypothesis among the published ones, or says why not."""
    published.check_is_above(folder)

    def find(hypothesis: Hypothesis) -> Published | str:
        if absent := published.missing(folder, hypothesis.studies):
            return f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not there"
        return published.read(folder, tuple(hypothesis.studies))

    return find


def judge(registered: Registered, find: Callable[[Hypothesis], Published | str]) -> list[Verdict]:
    """The verdict of every hypothesis, in the order of the file."""
    verdicts = []
    for hypothesis in registered.hypotheses:
        study = find(hypothesis)
        found = Differences(fault=study) if isinstance(study, str) else differences(hypothesis, study)
        verdicts.append(_tested(hypothesis, found, registered))
    for stage in STAGES:
        family = [verdict for verdict in verdicts if verdict.hypothesis.stage == stage]
        for name, adjusted in (("p", "p_holm"), ("p_against", "against_holm")):
            for verdict, p in zip(family, _holm(getattr(verdict, name) for verdict in family), strict=True):
                setattr(verdict, adjusted, p)
        for verdict in family:
            _decide(verdict, len(family), registered)
    return verdicts


def _holm(p_values) -> list[float]:
    """Holm's p of the tests that there are; those that there are not have their place among them, as p = 1."""
    p_values = list(p_values)
    adjusted = holm([1.0 if math.isnan(p) else p for p in p_values])
    return [math.nan if math.isnan(p) else of_all for p, of_all in zip(p_values, adjusted, strict=True)]


def _tested(hypothesis: Hypothesis, found: Differences, registered: Registered) -> Verdict:
    values = list(found.values.values())
    mean, half_width = mean_ci(values)
    n = len(values)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)) if n > 1 else math.nan
    verdict = Verdict(hypothesis, found, mean, half_width, sd, math.nan, math.nan, why=_why_not(found, n, registered))
    if not verdict.why:
        verdict.p, verdict.p_against = tests(values, hypothesis.direction, hypothesis.margin)
    return verdict


def _why_not(found: Differences, n: int, registered: Registered) -> str:
    """Why there is no test; empty if there is one."""
    if found.fault:
        return found.fault
    if found.missing:
        first, of_first = next(iter(found.missing.items()))
        more = f", and {len(found.missing) - 1} seeds more" if len(found.missing) > 1 else ""
        return f"not complete: seed {first} ({of_first}){more}"
    more = f" ({frontier.reasons(found.undecidable)})" if found.undecidable else ""
    if n < registered.least_seeds:
        return f"{n} seeds can be compared, fewer than {registered.least_seeds}{more}"
    if 2.0**-n > registered.alpha:
        return f"{n} seeds can be compared, whose p is never below {2.0**-n:.2g}{more}"
    return ""


def tests(values: list[float], direction: str, margin: float | None = None) -> tuple[float, float]:
    """p in the registered direction, and against it (NaN where a hypothesis has no other direction)."""
    if direction == "equivalent":
        above = sign_flip_p([value - margin for value in values], "greater")
        below = sign_flip_p([value + margin for value in values], "less")
        return equivalence_p(values, margin), min(1.0, 2 * min(above, below))
    if direction == "different":
        return sign_flip_p(values), math.nan
    return sign_flip_p(values, direction), sign_flip_p(values, OTHER_WAY[direction])


def _decide(verdict: Verdict, tests_in_family: int, registered: Registered) -> None:
    asked, alpha = verdict.hypothesis, registered.alpha
    if verdict.why:
        return
    if not math.isnan(verdict.sd):
        share = alpha / tests_in_family / (2 if asked.direction == "different" else 1)
        units = detectable(verdict.n, share, registered.power, margin=asked.direction == "equivalent")
        verdict.detectable = units * verdict.sd if math.isfinite(units) else math.inf
    if verdict.p_holm <= alpha:
        verdict.verdict = "equivalent" if asked.direction == "equivalent" else "supported"
    elif verdict.against_holm <= alpha:
        verdict.verdict = "contradicted"
    else:
        verdict.verdict = "undecided"
    if verdict.found.undecidable:
        verdict.found.remarks.insert(0, f"not compared: {frontier.reasons(verdict.found.undecidable)}")


# --- the table


def verdicts_table(registered: Registered, verdicts: list[Verdict], made_by: dict[str, str]) -> Table:
    """A row per hypothesis. made_by: the digest of the file of hypotheses, and what else made the numbers."""
    alpha, power = registered.alpha, registered.power
    rows = [verdict.row(alpha) for verdict in verdicts]
    seeds = sorted({seed for verdict in verdicts for seed in verdict.found.values})
    frame = with_seeds(pd.DataFrame(rows), seeds, (verdict.found.values for verdict in verdicts))
    more = ({"decimals": of.hypothesis.decimals, "values": of.found.values} for of in verdicts)
    printed = pd.DataFrame([row | of for row, of in zip(rows, more, strict=True)])
    least = min((len(of.found.values) for of in verdicts if of.found.values), default=INTERVAL_FROM)
    registered_columns = [
        Column("", lambda row: row["id"], is_number=False),
        Column("Stage", lambda row: row["stage"], is_number=False),
        Column("Hypothesis", lambda row: row["text"], is_number=False, widest=0.45),
        Column("Registered", _registered, is_number=False),
        Column("Verdict", lambda row: row["verdict"], is_number=False),
    ]
    number_columns = [
        Column("", lambda row: row["id"], is_number=False),
        Column("Quantity", lambda row: row["quantity"], is_number=False, widest=0.18),
        Column("Seeds", lambda row: str(row["n_seeds"] or NOTHING)),
        Column(interval_header(range(least), "Difference"), _estimate),
        Column("Detectable", lambda row: _detectable(row)),
        Column("p", lambda row: p_value(row["p"])),
        Column("p\n(Holm)", lambda row: p_value(row["p_holm"])),
        Column("p against\n(Holm)", lambda row: p_value(row["p_against_holm"])),
    ]
    notes = [
        "p: exact one-sided sign-flip test of the differences per seed in the registered direction; of an equivalence "
        "the larger of the two that exclude what is beyond ±margin (TOST). p against: in the other direction. Holm's "
        "correction is over the hypotheses of a stage, all that are registered; both kinds of error are at most "
        f"{alpha:g} in each.",
        f"Detectable: the least true difference that this number of seeds finds with probability {power:g} at "
        f"{alpha:g} divided by the number of hypotheses of the stage, given the standard deviation of the differences "
        "that were seen; of an equivalence the least margin that is shown where the truth is zero.",
        *(f"{row['id']}: undecidable: {row['why']}." for row in frame.to_dict("records") if row["why"]),
        *(f"{row['id']}: {row['remarks']}." for row in frame.to_dict("records") if row["remarks"]),
        f"Hypotheses {made_by['hypotheses']}.",
    ]
    panels = [
        Panel("What was registered, and the verdict.", registered_columns, keys=len(registered_columns)),
        Panel("The numbers behind the verdicts.", number_columns, "numbers", keys=2),
    ]
    return Table(frame, panels, notes, made_by, ["stage"], printed, "Registered hypotheses and their verdicts")


def _estimate(row: Row) -> str:
    return estimate(row["values"], list(row["values"]), row["decimals"])


def _registered(row: Row) -> str:
    words = {"less": "< 0", "greater": "> 0", "different": "not 0"}
    return words.get(row["direction"]) or f"within ±{row['margin']:g}"


def _detectable(row: Row) -> str:
    return "none" if math.isinf(row["detectable"]) else number(row["detectable"], row["decimals"])


def json_rows(registered: Registered, verdicts: list[Verdict]) -> list[dict[str, Any]]:
    """The rows, with null for what is no number."""
    rows = []
    for verdict in verdicts:
        row = verdict.row(registered.alpha) | {"differences": {str(k): v for k, v in verdict.found.values.items()}}
        rows.append({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()})
    return rows
