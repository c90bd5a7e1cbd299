"""The tables of a stage: the arms that the question is about, and the whole grid of flags.

No value is set in bold. Seeds are shared across arms, so arms differ by less than the intervals of
their means suggest, and by chance more often than a bold best value suggests: whether two arms
differ is a question for paired differences, which the tables of effects and comparisons hold.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pandas as pd

from discobeta.design.arms import CORNERS, FLAGS, IDEAS, Arm, Cell, grid
from discobeta.design.stages import STAGES
from discobeta.design.study import Run, Study
from discobeta.report.collect import collect, of_grid, provenance, provenance_line
from discobeta.report.compare import EQUAL
from discobeta.report.estimates import estimate, interval_words
from discobeta.report.measures import LANDMARKS, MEASURES, METRICS, PANELS, arm_text
from discobeta.report.neutrality import neutrality_frame
from discobeta.report.render import NOTHING, Column, Panel, Row, Table, number, seeds_column
from discobeta.report.results import Results, overlap_note
from discobeta.report.statistics import mean_ci

CAPTIONS = {
    "predictions": "how well held-out preferences are predicted",
    "heads": "what the heads that are used have learned",
    "votes": "how the run agrees with several people who judged the same held-out pairs",
    "policy": "what the policy gains when it answers held-out prompts itself, and at which KL",
    "responses": "what the policy's responses to held-out prompts are like",
    "ranking": "how well it tells the reference's own responses to a held-out prompt apart",
    "calibration": "on the calibration pairs, which no training sees",
}
JUDGES = (
    "The reward gain is the mean score of the policy's responses minus that of the reference's, in standard deviations "
    "of the latter. The arm's own reward model is the judge, and the arms with and without a used Disco Head have two "
    "different ones: compare gains within one of the two groups, and across them the true reward, where it is known."
)
SHARED_SEEDS = (
    "Seeds are shared across arms (data, initialisation, order): compare arms by their paired differences (tables "
    "effects and comparisons). No value is marked as best."
)
OF_HEADS = "What heads have learned is shown of the arms that use them; – stands for a head that the arm does not have."
MEASURED = [*METRICS, *LANDMARKS]


def stage_table(results: Results, stage: str) -> Table:
    """The arms without idle heads that the stage trains, a row each."""
    study = results.study
    metrics = of_grid(collect(results))
    metrics = metrics[metrics.stage == stage]
    rows = []
    for arm in CORNERS:
        if runs := [run for run in results.whole_runs(stage) if run.arm == arm]:
            there = [run.seed for run in runs if results.absence(run) is None]
            rows.append(arm_row(arm, metrics[metrics.arm == arm.name], study.seeds, there))
    panels = panels_of(stage, arm_columns(rows), f"{STAGES[stage].title} ({stage})", study.seeds)
    notes = [SHARED_SEEDS] if len(rows) > 1 else []
    if not rows:
        notes.append(f"Every arm of this study has an idle head: see the table {stage}-grid.")
    notes += filter(None, [overlap_note(results, stage), *_notes(metrics)])
    for idea in IDEAS:
        if not idea.acts_in(stage) and any(idea.key in arm.used for arm in study.arms):
            notes.append(f"Arms with {idea.label} are the runs of those without it: {idea.elsewhere}.")
    runs = [run for run in study.grid_runs() if run.stage == stage and not run.arm.is_idle and not run.proof]
    if missing := results.describe_missing(runs):
        notes.append(f"Missing: {missing}.")
    frame, printed = frames(rows, ["arm", "label", "n_seeds", "n_expected", "missing_seeds"])
    notes, made_by = [*notes, provenance_line(results)], provenance(results)
    return Table(frame, panels, notes, made_by, printed=printed, title=STAGES[stage].title)


def arm_row(arm: Arm, metrics: pd.DataFrame, expected: Sequence[int], there: Sequence[int]) -> dict[str, Any]:
    """metrics: of the arm's runs in one stage. expected, there: seeds."""
    missing = [seed for seed in expected if seed not in there]
    row = {"arm": arm.name, "label": arm.label, "n_seeds": len(there), "n_expected": len(expected)}
    return row | {"missing_seeds": " ".join(map(str, missing))} | estimates(_by_seed(metrics))


def _by_seed(metrics: pd.DataFrame) -> dict[str, dict[int, float]]:
    """Of everything that is tabled: its values by seed."""
    found = {name: metrics[metrics.metric == name] for name in MEASURED}
    return {name: dict(zip(of.seed.tolist(), of.value.tolist(), strict=True)) for name, of in found.items()}


def estimates(by_seed: dict[str, dict[int, float]]) -> dict[str, Any]:
    """Of each metric the mean of its values, half-width of the mean's interval, their number, and the values."""
    row: dict[str, Any] = {}
    for name, values in by_seed.items():
        row[name], row[f"{name}_ci95"] = mean_ci(list(values.values()))
        row[f"{name}_n"], row[f"{name}_values"] = len(values), values
    return row


def frames(rows: list[dict[str, Any]], columns: Sequence[str] = ()) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Of rows with `estimates`: what the CSV holds, without metrics that no row has, and what is printed."""
    printed = pd.DataFrame(rows) if rows else pd.DataFrame(columns=list(columns))
    names = [name for name in printed if f"{name}_n" in printed]
    absent = [name for name in names if not (printed[f"{name}_n"] > 0).any()]
    away = [f"{name}_values" for name in names] + [c for name in absent for c in (name, f"{name}_ci95", f"{name}_n")]
    return printed.drop(columns=away), printed


def panels_of(stage: str, which: list[Column], title: str, seeds: Sequence[int]) -> list[Panel]:
    """A panel for each group of metrics, after the columns `which` that say what a row is of."""
    first = "predictions" if STAGES[stage].has_pairs else "policy"
    return [
        Panel(
            f"{title}: {CAPTIONS[name]}. {interval_words(seeds)}",
            which + [metric_column(metric.name, seeds) for metric in PANELS[name]],
            label=name,
            keys=len(which),
        )
        for name in dict.fromkeys([first, *PANELS])
    ]


def metric_column(name: str, seeds: Sequence[int]) -> Column:
    """A cell with fewer seeds than its row says so."""
    metric = MEASURES[name]
    return Column(
        metric.header, lambda row: estimate(row.get(f"{name}_values", {}), seeds, metric.decimals, row["n_seeds"])
    )


def arm_columns(rows: list[dict[str, Any]]) -> list[Column]:
    """What a row is of; the number of its seeds where it is not what the caption says."""
    columns = [Column("Arm", lambda row: row["label"], is_number=False)]
    if any(row["n_seeds"] != row["n_expected"] for row in rows):
        columns.append(seeds_column())
    return columns


def _notes(metrics: pd.DataFrame) -> list[str]:
    measured, notes = set(metrics.metric), []
    if "reward_gain" in measured:
        notes.append(JUDGES)
    if any(metric.name in measured for metric in PANELS["heads"]):
        notes.append(OF_HEADS)
    if landmarks := _landmarks(metrics):
        notes.append(f"The same in every arm: {landmarks}.")
    return notes


def _landmarks(metrics: pd.DataFrame) -> str:
    """Mean over seeds; every arm of a seed sees the same held-out rows."""
    texts = []
    for name, title in LANDMARKS.items():
        per_seed = metrics[metrics.metric == name].groupby("seed").value.mean()
        if len(per_seed):
            texts.append(f"{title} {number(per_seed.mean(), 3)}")
    return ", ".join(texts)


# --- the whole grid


def grid_table(results: Results, stage: str) -> Table:
    """Every setting of the flags and what became of it, and the arms with idle heads beside those that they must equal.

    The CSV has every number of every cell; printed are those by which arms are compared.
    """
    study = results.study
    runs = results.whole_runs(stage)
    metrics, proofs = (frame[frame.stage == stage] for frame in (of_grid(collect(results)), neutrality_frame(results)))
    rows = [_cell_row(results, cell, runs, metrics, proofs) for cell in grid((stage,))]
    title = f"{STAGES[stage].title} ({stage})"
    which = [
        Column("Arm", lambda row: arm_text(row["arm"]) if row["arm"] else NOTHING, is_number=False),
        seeds_column(),
    ]
    cells = [Column(flag, lambda row, flag=flag: "yes" if row[flag] else "no", is_number=False) for flag in FLAGS]
    cells += [Column("Status", _status, is_number=False), which[0], which[1]]
    compared = [metric_column(name, study.seeds) for name in STAGES[stage].compared]
    numbers = f"{title}: the arms of the grid, those with idle heads too. {interval_words(study.seeds)}"
    panels = [
        Panel(f"{title}: all {len(rows)} settings of the flags.", cells, keys=len(cells)),
        Panel(numbers, [*which, *compared], label="arms", keys=2, of=lambda row: row["status"] != "same-as"),
    ]
    notes = []
    if study.idle_arms == "prove" and len(proofs):
        notes.append(
            f"A proved arm was trained for its {study.proof_text(stage)} only and equalled the arm without the idle "
            "head byte for byte, so its row shows that arm's numbers."
        )
    for kind, words in (("same-as", "Same as"), ("refused", "Refused")):
        if reasons := "; ".join(dict.fromkeys(row["reason"] for row in rows if row["status"] == kind)):
            notes.append(f"{words}: {reasons}.")
    if missing := results.describe_missing(run for run in study.grid_runs() if run.stage == stage):
        notes.append(f"Missing: {missing}.")
    (frame, printed), made_by = frames(rows), provenance(results)
    title = f"{STAGES[stage].title}: all settings of the flags"
    notes.append(provenance_line(results))
    return Table(frame, panels, notes, made_by, list(FLAGS[:2]), printed=printed, title=title)


def _status(row: Row) -> str:
    """Of a proof without its arm and length, which stand beside it and in the note."""
    proved = re.fullmatch(r"proved = \S+ \([^;]*(?:; (.*))?\)", row["status"])
    text = ", ".join(filter(None, ["proved", proved[1]])) if proved else row["status"].replace("same-as", "same as")
    return text.partition(" from ")[0]


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
    return row | estimates(_by_seed(metrics[metrics.arm == shown]))


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
