"""The tables of a study: one per stage, effects and comparisons (effects.py), neutrality, cost.

No value is set in bold. Seeds are shared across arms, so arms differ by less than the intervals of
their means suggest, and by chance more often than a bold best value suggests: whether two arms
differ is a question for paired differences, which the tables of effects and comparisons hold.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from discobeta.design.arms import FLAGS, Arm, Cell, grid
from discobeta.design.stages import STAGES
from discobeta.design.study import Run, Study
from discobeta.files import write_text
from discobeta.folders import claim
from discobeta.identity import WEIGHTS, file_hash
from discobeta.report.collect import collect, config_text, provenance, provenance_line
from discobeta.report.effects import comparisons_table, effects_table
from discobeta.report.measures import LANDMARKS, METRICS, PANELS, Metric
from discobeta.report.neutrality import EQUAL, OUTCOMES, files_of, verdict
from discobeta.report.render import NOTHING, Column, Panel, Row, Table, count, number, yes_no
from discobeta.report.results import Results
from discobeta.report.statistics import mean_ci

CAPTIONS = {
    "predictions": "how well held-out preferences are predicted",
    "heads": "what the heads that are used have learned",
    "policy": "what the policy does when it answers held-out prompts itself",
}
JUDGES = (
    "The reward gain is the mean score of the policy's responses minus that of the reference's, in standard deviations "
    "of the latter. The arm's own reward model is the judge, and the arms with and without a used Disco Head have two "
    "different ones: compare gains within one of the two groups, and across them the true reward, where it is known."
)
MEASURED = [*METRICS, *LANDMARKS]


def write(results: Results) -> None:
    """metrics.csv, a table per stage, effects, comparisons, neutrality, cost, and the config of the digest."""
    study = results.study
    directory = study.directory / "tables"
    metrics = collect(results)
    proofs = neutrality_frame(results)
    tables = [
        *(stage_table(results, stage, metrics, proofs) for stage in study.stages),
        effects_table(results, metrics),
        comparisons_table(results, metrics),
        neutrality_table(results, proofs),
        cost_table(results),
    ]
    written = [f"{table.name}.{ending}" for table in tables for ending in ("csv", "md", "tex")]
    claim(directory, "discobeta tables", ["config.yaml", "metrics.csv", *written])
    write_text(directory / "config.yaml", config_text(study))
    write_text(directory / "metrics.csv", metrics.to_csv(index=False))
    for table in tables:
        table.write(directory)


# --- the 16 cells of a stage


def stage_table(results: Results, stage: str, metrics: pd.DataFrame, proofs: pd.DataFrame) -> Table:
    """All 16 cells; those that are not run say why, those that are show mean +- CI over seeds."""
    study = results.study
    runs = [run for run in study.runs() if run.stage == stage and not run.proof]
    metrics, proofs = metrics[metrics.stage == stage], proofs[proofs.stage == stage]
    frame = pd.DataFrame([_cell_row(results, cell, runs, metrics, proofs) for cell in grid((stage,))])
    measured = set(metrics.metric)
    frame = frame.drop(columns=[c for m in MEASURED if m not in measured for c in (m, f"{m}_ci95", f"{m}_n")])
    which = [Column(flag, lambda row, flag=flag: yes_no(row[flag]), is_number=False) for flag in FLAGS] + [
        Column("Status", lambda row: row["status"].replace("same-as", "same as"), is_number=False),
        Column("Arm", lambda row: row["arm"] or NOTHING, is_number=False),
        Column("Seeds", lambda row: count(row["n_seeds"], row["n_expected"])),
    ]
    stage_row = STAGES[stage]
    first = "predictions" if stage_row.has_pairs else "policy"  # whatever was measured
    panels = [
        Panel(
            f"{stage_row.title} ({stage}): {CAPTIONS[name]}. {_interval_note(frame)}",
            which + [_column(metric) for metric in PANELS[name] if metric.name in measured],
            label=name,
        )
        for name in dict.fromkeys([first, *PANELS])
        if name == first or any(metric.name in measured for metric in PANELS[name])
    ]
    notes = [
        "Seeds are shared across arms (data, initialisation, order): compare arms by their paired differences (tables "
        "effects and comparisons), not by whether two intervals overlap. No value is marked as best."
    ]
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
    if missing := results.describe_missing(run for run in study.runs() if run.stage == stage):
        notes.append(f"Missing: {missing}. A mean over fewer seeds than the study has says so.")
    return Table(stage, frame, panels, [*notes, provenance_line(results)], provenance(results), group=list(FLAGS[:2]))


def _cell_row(
    results: Results, cell: Cell, runs: list[Run], metrics: pd.DataFrame, proofs: pd.DataFrame
) -> dict[str, Any]:
    status, shown = cell.status, cell.arm
    if cell.arm is not None:
        of_arm = proofs[proofs.arm == cell.arm]
        if len(of_arm) and all(of_arm.proof):
            verdict, shown = _proved(results.study, of_arm)
            status = verdict if cell.status == "run" else status
        elif not any(run.arm.name == cell.arm for run in runs):
            status = "not in this study"
    runs = [run for run in runs if run.arm.name == shown]
    missing = [run.seed for run in runs if results.absence(run)]
    if status == "run" and len(missing) == len(runs):
        status = "missing"
    row = {**cell.flags, "status": status, "arm": cell.arm or "", "shown": shown or "", "reason": cell.reason}
    row |= {"n_seeds": len(runs) - len(missing), "n_expected": len(runs), "missing_seeds": " ".join(map(str, missing))}
    metrics = metrics[metrics.arm == shown]
    for name in MEASURED:
        values = metrics.value[metrics.metric == name].tolist()
        row[name], row[f"{name}_ci95"] = mean_ci(values)
        row[f"{name}_n"] = len(values)
    return row


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


# --- idle = absent


def neutrality_frame(results: Results) -> pd.DataFrame:
    """One row per run with an idle head: what of it equals its twin, the run without that head.

    In a study that proves its idle arms, the proofs of both are compared. `result` is equal, differs, stale, damaged
    or missing.
    """
    study = results.study
    by_place = {(run.stage, run.arm, run.seed, run.proof): run for run in study.runs()}
    rows = []
    for run in study.runs():
        if run.arm.is_idle:
            twin = by_place.get((run.stage, run.arm.twin, run.seed, run.proof))
            verdicts = _verdicts(results, run, twin)
            row = {"stage": run.stage, "arm": run.arm.name, "twin": run.arm.twin.name, "seed": run.seed}
            rows.append(row | {"proof": run.proof, "result": _result(verdicts, run.proof)} | verdicts)
    return pd.DataFrame(rows, columns=["stage", "arm", "twin", "seed", "proof", "result", *OUTCOMES])


def _verdicts(results: Results, run: Run, twin: Run | None) -> dict[str, str]:
    if twin is None:
        return dict.fromkeys(OUTCOMES, "twin not in this study")
    if not (results.counts(run) and results.counts(twin)):
        absent = _kind(results.absence(twin)) if results.counts(run) else _kind(results.absence(run))
        return dict.fromkeys(OUTCOMES, f"twin {absent}" if results.counts(run) else absent)
    verdicts = {}
    for outcome in OUTCOMES:
        ours, theirs = files_of(outcome, run.directory), files_of(outcome, twin.directory)
        if outcome in MEASURED_ALONE:
            if run.proof and not (ours or theirs):
                verdicts[outcome] = NOTHING
                continue
            lacking = [one for one in (run, twin) if not (run.proof or results.is_measured(one))]
            if lacking:
                absent = _kind(results.absence(lacking[0]))
                verdicts[outcome] = f"twin {absent}" if lacking[0] is twin else absent
                continue
        if ours and theirs:
            pairs = [_verdict(results, run, twin, name) for name in dict.fromkeys(ours + theirs)]
            verdicts[outcome] = next((text for text in pairs if text != EQUAL), EQUAL)
        else:
            verdicts[outcome] = "twin missing" if ours else "missing" if theirs or not run.proof else NOTHING
    return verdicts


MEASURED_ALONE = ("metrics", "examples")
"""Outcomes that `discobeta evaluate` leaves; the others are training's."""


def _kind(absence: str | None) -> str:
    """stale, damaged or missing."""
    kind = (absence or "").partition(" (")[0]
    return kind if kind in ("stale", "damaged") else "missing"


def _verdict(results: Results, run: Run, twin: Run, name: str) -> str:
    """`neutrality.verdict` of two files, after a look at whether they are those that the runs have left.

    Everything but weights has been looked at when the records were read.
    """
    if name.endswith(WEIGHTS):
        written = [results[one].facts["files"].get(name) for one in (run, twin)]
        there = [file_hash(one.directory / name) if (one.directory / name).exists() else None for one in (run, twin)]
        for text, was, now in zip(("damaged", "twin damaged"), written, there, strict=True):
            if was != now:
                return text
        if there[0] == there[1]:
            return EQUAL
    if name == "log.jsonl" and results[run].facts.get("log") != results[twin].facts.get("log"):
        return "of other steps"
    return verdict(run.directory / name, twin.directory / name)


def _result(verdicts: dict[str, str], proof: bool) -> str:
    """A proof is trained and not evaluated, so its weights and log decide."""
    texts = [text.removeprefix("twin ") for text in verdicts.values()]
    for result in ("damaged", "stale"):
        if result in texts:
            return result
    if any(text.startswith("differs") for text in texts):
        return "differs"
    needed = ("weights", "log") if proof else tuple(OUTCOMES)
    return EQUAL if all(verdicts[outcome] == EQUAL for outcome in needed) else "missing"


def neutrality_table(results: Results, frame: pd.DataFrame) -> Table:
    """Printed with the seeds of an arm that have the same verdicts in one row; the CSV has a row for each."""
    study = results.study
    columns = [
        Column("Stage", lambda row: row["stage"], is_number=False),
        Column("Idle arm", lambda row: row["arm"], is_number=False),
        Column("Twin", lambda row: row["twin"], is_number=False),
        Column("Seeds", lambda row: row["seed"], is_number=False),
        Column("Compared", lambda row: _extent(study, row["stage"], row["proof"]), is_number=False),
        *(Column(name.capitalize(), lambda row, name=name: row[name], is_number=False) for name in OUTCOMES),
    ]
    caption = "Runs with an idle head against their twin, the run without that head: what each computed, byte for byte."
    alike = [name for name in frame if name != "seed"]
    printed = frame.groupby(alike, sort=False).seed.agg(lambda seeds: ", ".join(map(str, seeds))).reset_index()
    counts = frame.result.value_counts()
    summary = (
        "This study trains no arm with an idle head"
        if frame.empty
        else f"{counts.get(EQUAL, 0)} of {len(frame)} idle runs equal their twin byte for byte"
    )
    summary += "".join(f"; {words}: {counts[result]}" for result, words in OTHERWISE.items() if result in counts) + "."
    notes = [f"{summary} Offsets of bytes are counted from 0.", provenance_line(results)]
    return Table("neutrality", frame, [Panel(caption, columns)], notes, provenance(results), ["stage"], printed)


OTHERWISE = {
    "differs": "different",
    "missing": "not comparable, because something is missing",
    "stale": "stale",
    "damaged": "damaged",
}


def _extent(study: Study, stage: str, proof: bool) -> str:
    return study.proof_text(stage) if proof else "whole run"


# --- what it cost


def cost_table(results: Results) -> Table:
    """Per stage and arm: time per run, relative to the baseline, and GPU-hours; shared work once."""
    study, rows = results.study, []
    for stage in study.stages:
        of_stage = [run for run in study.runs() if run.stage == stage]
        baseline = _costs(results, [run for run in of_stage if (run.arm, run.proof) == (Arm(), False)])
        for proof in (False, True):
            of_kind = [run for run in of_stage if run.proof == proof]
            for arm in dict.fromkeys(run.arm for run in of_kind):
                costs = _costs(results, [run for run in of_kind if run.arm == arm])
                name = f"{arm.name}, {_extent(study, stage, True)}" if proof else arm.name
                rows.append(_cost_row(stage, name, costs, None if proof else baseline))
    shared: dict[str, dict[Any, dict[str, float]]] = {}
    for label, cost in results.shared_costs():
        work, _, part = label.partition(", ")
        shared.setdefault(work, {})[part] = cost
    rows += [_cost_row("shared", work, costs) for work, costs in shared.items()]
    frame = pd.DataFrame(rows)
    frame = pd.concat([frame, pd.DataFrame([_total(frame)])], ignore_index=True)
    columns = [
        Column("Stage", lambda row: row["stage"], is_number=False),
        Column("Work", lambda row: row["work"], is_number=False),
        Column("Jobs", lambda row: count(row["jobs"], row["jobs_expected"])),
        Column("Seconds\nper job", lambda row: number(row["seconds"], 1)),
        Column("× baseline", lambda row: number(row["times_baseline"], 2)),
        Column("Evaluation,\nseconds per job", lambda row: number(row["evaluation_seconds"], 1)),
        Column("Tokens/s", lambda row: number(row["tokens_per_second"], 0)),
        Column("Peak memory,\nGiB", lambda row: number(row["peak_memory_bytes"] / 2**30, 2)),
        Column("Total\nseconds", lambda row: number(row["total_seconds"], 1)),
        Column("Total\nGPU-hours", lambda row: number(row["gpu_hours"], 3)),
    ]
    caption = (
        "Cost of the study. Seconds per job and tokens/s are means over the jobs that are there, peak memory is their "
        "maximum; totals are sums of training and evaluation."
    )
    notes = [
        "Wall-clock seconds are those of the machine and of what else it did: jobs that ran side by side slowed each "
        "other down; the start-up of processes is not counted. Work that several arms share is listed once. On a CPU, "
        "peak memory is that of the whole process.",
        provenance_line(results),
    ]
    if absent := [f"{row['stage']}, {row['work']} ({row['missing']})" for row in rows if row["missing"]]:
        notes.insert(0, f"Missing and in no sum: {'; '.join(absent)}.")
    return Table("cost", frame, [Panel(caption, columns)], notes, provenance(results), group=["stage"])


def _costs(results: Results, runs: list[Run]) -> dict[str, dict[str, float]]:
    """Seed -> cost.json with the evaluation's seconds beside; empty where a run does not count."""
    costs = {}
    for run in runs:
        found = results[run]
        cost, evaluation = dict(found.cost), found.evaluation_cost
        if cost and evaluation:
            cost["evaluation_seconds"] = evaluation["seconds"]
            cost["gpu_seconds"] = cost.get("gpu_seconds", 0) + evaluation.get("gpu_seconds", 0)
        kind = _kind(found.fault)
        costs[f"seed {run.seed}" + (f", {kind}" if kind != "missing" else "")] = cost
    return costs


def _cost_row(stage: str, work: str, costs: dict[str, dict], baseline: dict[str, dict] | None = None) -> dict[str, Any]:
    there = {part: cost for part, cost in costs.items() if cost}
    values = pd.DataFrame(list(there.values()), dtype=object).reindex(columns=COSTS).astype(float)
    paired = [part for part in there if baseline and baseline.get(part)]
    of_baseline = sum(baseline[part]["seconds"] for part in paired)
    ratio = sum(there[part]["seconds"] for part in paired) / of_baseline if of_baseline else math.nan
    return {
        "stage": stage,
        "work": work,
        "jobs": len(there),
        "jobs_expected": len(costs),
        "missing": ", ".join(part or "not there" for part in costs if part not in there),
        "seconds": values.seconds.mean(),
        "times_baseline": ratio,
        "evaluation_seconds": values.evaluation_seconds.mean(),
        "tokens_per_second": values.tokens_per_second.mean(),
        "peak_memory_bytes": values.peak_memory_bytes.max(),
        "total_seconds": values[["seconds", "evaluation_seconds"]].sum(axis=1, min_count=1).sum(min_count=1),
        "gpu_hours": values.gpu_seconds.sum(min_count=1) / 3600,
    }


COSTS = ["seconds", "evaluation_seconds", "tokens_per_second", "peak_memory_bytes", "gpu_seconds"]


def _total(frame: pd.DataFrame) -> dict[str, Any]:
    counts = {name: int(frame[name].sum()) for name in ("jobs", "jobs_expected")}
    sums = {name: frame[name].sum() for name in ("total_seconds", "gpu_hours")}
    return {"stage": "total", "work": "all of it", **counts, **sums}
