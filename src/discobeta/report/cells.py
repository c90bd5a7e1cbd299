"""The table of a stage: all 16 cells of its grid, whatever became of them.

No value is set in bold. Seeds are shared across arms, so arms differ by less than the intervals of
their means suggest, and by chance more often than a bold best value suggests: whether two arms
differ is a question for paired differences, which the tables of effects and comparisons hold.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from discobeta.design.arms import FLAGS, Cell, grid
from discobeta.design.stages import STAGES
from discobeta.design.study import Run, Study
from discobeta.report.collect import collect, of_grid, provenance, provenance_line
from discobeta.report.compare import EQUAL
from discobeta.report.measures import LANDMARKS, METRICS, PANELS, Metric
from discobeta.report.neutrality import neutrality_frame
from discobeta.report.render import NOTHING, Column, Panel, Row, Table, count, number, yes_no
from discobeta.report.results import Results, overlap_note
from discobeta.report.statistics import mean_ci

CAPTIONS = {
    "predictions": "how well held-out preferences are predicted",
    "heads": "what the heads that are used have learned",
    "votes": "how the run agrees with several people who judged the same held-out pairs",
    "policy": "what the policy does when it answers held-out prompts itself",
    "ranking": "how well it tells the reference's own responses to a held-out prompt apart",
    "calibration": "on the calibration pairs, and of held-out pairs what post-hoc fits on them make of the baseline",
}
JUDGES = (
    "The reward gain is the mean score of the policy's responses minus that of the reference's, in standard deviations "
    "of the latter. The arm's own reward model is the judge, and the arms with and without a used Disco Head have two "
    "different ones: compare gains within one of the two groups, and across them the true reward, where it is known."
)
SHARED_SEEDS = (
    "Seeds are shared across arms (data, initialisation, order): compare arms by their paired differences (tables "
    "effects and comparisons), not by whether two intervals overlap. No value is marked as best."
)
MEASURED = [*METRICS, *LANDMARKS]


def stage_table(results: Results, stage: str) -> Table:
    """All 16 cells; those that are not run say why, those that are show mean +- CI over seeds."""
    study = results.study
    runs = results.whole_runs(stage)
    metrics, proofs = (frame[frame.stage == stage] for frame in (of_grid(collect(results)), neutrality_frame(results)))
    frame = pd.DataFrame([_cell_row(results, cell, runs, metrics, proofs) for cell in grid((stage,))])
    measured = set(metrics.metric)
    frame = frame.drop(columns=[c for m in MEASURED if m not in measured for c in (m, f"{m}_ci95", f"{m}_n")])
    which = [Column(flag, lambda row, flag=flag: yes_no(row[flag]), is_number=False) for flag in FLAGS] + [
        Column("Status", lambda row: row["status"].replace("same-as", "same as"), is_number=False),
        Column("Arm", lambda row: row["arm"] or NOTHING, is_number=False),
        Column("Seeds", lambda row: count(row["n_seeds"], row["n_expected"])),
    ]
    panels = panels_of(stage, which, frame, measured, f"{STAGES[stage].title} ({stage})")
    notes = [SHARED_SEEDS]
    if overlap := overlap_note(results, stage):
        notes.append(overlap)
    if "reward_gain" in measured:
        notes.append(JUDGES)
    if landmarks := _landmarks(metrics):
        notes.append(f"The same in every arm: {landmarks}.")
    if study.idle_arms == "prove":
        notes.append(
            f"A proved arm was trained for its {study.proof_text(stage)} only and equalled the arm without the idle "
            "head byte for byte, so the row shows that arm's numbers."
        )
    for kind, title in (("same-as", "Same as"), ("refused", "Refused")):
        if reasons := "; ".join(dict.fromkeys(frame.reason[frame.status == kind])):
            notes.append(f"{title}: {reasons}.")
    if missing := results.describe_missing(run for run in study.grid_runs() if run.stage == stage):
        notes.append(f"Missing: {missing}. A mean over fewer seeds than the study has says so.")
    return Table(frame, panels, [*notes, provenance_line(results)], provenance(results), group=list(FLAGS[:2]))


def _cell_row(
    results: Results, cell: Cell, runs: list[Run], metrics: pd.DataFrame, proofs: pd.DataFrame
) -> dict[str, Any]:
    status, shown = cell.status, cell.arm
    if cell.arm is not None:
        of_arm = proofs[proofs.arm == cell.arm]
        if len(of_arm) and all(of_arm.proof):
            proved, shown = _proved(results.study, of_arm)
            status = proved if cell.status == "run" else status
        elif not any(run.arm.name == cell.arm for run in runs):
            status = "not in this study"
    runs = [run for run in runs if run.arm.name == shown]
    missing = [run.seed for run in runs if results.absence(run)]
    if status == "run" and len(missing) == len(runs):
        status = "missing"
    row = {**cell.flags, "status": status, "arm": cell.arm or "", "shown": shown or "", "reason": cell.reason}
    row |= {"n_seeds": len(runs) - len(missing), "n_expected": len(runs), "missing_seeds": " ".join(map(str, missing))}
    return row | estimates(metrics[metrics.arm == shown])


def estimates(metrics: pd.DataFrame) -> dict[str, Any]:
    """Of everything that tables show: mean over the rows, which are seeds, half-width of its interval, their number."""
    row: dict[str, Any] = {}
    for name in MEASURED:
        values = metrics.value[metrics.metric == name].tolist()
        row[name], row[f"{name}_ci95"] = mean_ci(values)
        row[f"{name}_n"] = len(values)
    return row


def panels_of(stage: str, which: list[Column], frame: pd.DataFrame, measured: set[str], title: str) -> list[Panel]:
    """The panels that have anything measured, each after the columns `which` that say of what; one at least."""
    first = "predictions" if STAGES[stage].has_pairs else "policy"  # whatever was measured
    return [
        Panel(
            f"{title}: {CAPTIONS[name]}. {_interval_note(frame)}",
            which + [_column(metric) for metric in PANELS[name] if metric.name in measured],
            label=name,
        )
        for name in dict.fromkeys([first, *PANELS])
        if name == first or any(metric.name in measured for metric in PANELS[name])
    ]


def _proved(study: Study, proofs: pd.DataFrame) -> tuple[str, str | None]:
    """Status of an arm that has proofs only, and the arm whose numbers stand for it, if any do."""
    twin, results = proofs.twin.iloc[0], proofs.result.tolist()
    if "differs" in results:
        return f"DIFFERS from {twin}", None
    if EQUAL not in results:
        return f"proof {results[0]}", None
    equal = results.count(EQUAL)
    of_seeds = "" if equal == len(results) else f"; {equal} of {len(results)} seeds"
    return f"proved = {twin} ({study.proof_text(proofs.stage.iloc[0])}{of_seeds})", twin


def _column(metric: Metric) -> Column:
    return Column(metric.header, lambda row: estimate(row, metric.name, metric.decimals))


def estimate(row: Row, name: str, decimals: int) -> str:
    """`mean ± half-width (n of N)`: the interval if there is one, the count if seeds are missing."""
    n, expected = row[f"{name}_n"], row["n_expected"]
    if n == 0:
        return NOTHING
    interval = row[f"{name}_ci95"]
    text = number(row[name], decimals) + ("" if math.isnan(interval) else f" ± {number(interval, decimals)}")
    return text if n == expected else f"{text} ({n} of {expected})"


def _interval_note(frame: pd.DataFrame) -> str:
    if frame.n_seeds.max() > 1:
        return "Mean over seeds ± half-width of its 95 % confidence interval (Student's t)."
    return (
        "No cell has more than one seed: there is no interval to show, and no difference between arms to be believed."
    )


def _landmarks(metrics: pd.DataFrame) -> str:
    """Mean over seeds; every arm of a seed sees the same held-out rows."""
    texts = []
    for name, title in LANDMARKS.items():
        per_seed = metrics[metrics.metric == name].groupby("seed").value.mean()
        if len(per_seed):
            texts.append(f"{title} {number(per_seed.mean(), 3)}")
    return ", ".join(texts)
