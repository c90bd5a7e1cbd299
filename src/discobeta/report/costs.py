"""The table of costs: seconds, memory and GPU-hours of every arm and of what arms share."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from discobeta.design.arms import Arm
from discobeta.design.study import Run
from discobeta.report.collect import provenance, provenance_line
from discobeta.report.measures import arm_text
from discobeta.report.render import Column, Panel, Table, count, number
from discobeta.report.results import Results, kind_of


def cost_table(results: Results) -> Table:
    """Per stage and arm: time per run, relative to the baseline, and GPU-hours; shared work once.

    Printed with the proofs of a stage in one row; the CSV has a row for each arm.
    """
    study, rows, printed = results.study, [], []
    for stage in study.stages:
        of_stage = [run for run in study.runs() if run.stage == stage]
        kinds: dict[tuple[bool, str, str], list[Run]] = {}
        for run in sorted(of_stage, key=lambda run: run.proof):
            kinds.setdefault((run.proof, run.arm.name, run.variant), []).append(run)
        baseline = _costs(results, kinds.get((False, Arm().name, ""), []))
        proofs: dict[str, dict[str, float]] = {}
        for (proof, arm, variant), runs in kinds.items():
            work, costs = ", ".join(filter(None, [arm, variant])), _costs(results, runs)
            row = _cost_row(stage, f"{work}, {study.proof_text(stage)}" if proof else work, costs, baseline)
            rows.append(row | {"times_baseline": math.nan} if proof else row)
            if proof:
                proofs |= {f"{arm}, {part}": cost for part, cost in costs.items()}
            else:
                of = study.variant(runs[0])
                label = ", ".join(filter(None, [arm_text(arm), of.label if of else ""]))
                printed.append(row | {"label": label})
        if proofs:
            label = f"proofs of idle heads, {study.proof_text(stage)} each"
            printed.append(_cost_row(stage, "", proofs) | {"label": label})
    shared: dict[str, dict[Any, dict[str, float]]] = {}
    for label, cost in results.shared_costs():
        work, _, part = label.partition(", ")
        shared.setdefault(work, {})[part] = cost
    of_shared = [_cost_row("shared", work, costs) for work, costs in shared.items()]
    frame = pd.DataFrame([*rows, *of_shared])
    total = _total(frame)
    frame = pd.concat([frame, pd.DataFrame([total])], ignore_index=True)
    printed = pd.DataFrame([*printed, *(row | {"label": row["work"]} for row in [*of_shared, total])])
    has_gpu = frame.gpu_hours.max() > 0
    columns = [
        Column("Stage", lambda row: row["stage"], is_number=False),
        Column("Work", lambda row: row["label"], is_number=False, widest=0.4),
        Column("Jobs", lambda row: count(row["jobs"], row["jobs_expected"])),
        Column("Training\n(s per job)", lambda row: number(row["seconds"], 1)),
        Column("Training,\n× baseline", lambda row: number(row["times_baseline"], 2)),
        Column("Evaluation\n(s per job)", lambda row: number(row["evaluation_seconds"], 1)),
        Column("Tokens/s", lambda row: number(row["tokens_per_second"], 0)),
        Column("Peak memory\n(GiB)", lambda row: number(row["peak_memory_bytes"] / 2**30, 2)),
        Column("Total\n(s)", lambda row: number(row["total_seconds"], 1)),
        *([Column("Total\n(GPU-hours)", lambda row: number(row["gpu_hours"], 3))] if has_gpu else []),
    ]
    caption = (
        "Cost of the study. Seconds per job and tokens/s are means over the jobs that are there, peak memory is their "
        "maximum; totals are sums of training and evaluation."
    )
    notes = [
        "Wall-clock seconds are those of the machine and of what else it did: jobs that ran side by side slowed each "
        "other down; the start-up of processes is not counted. Work that several arms share is listed once. On a CPU, "
        "peak memory is that of the whole process. Proofs and shared work are not evaluated, and have no baseline.",
        provenance_line(results),
    ]
    if absent := [f"{row['stage']}, {row['work']} ({row['missing']})" for row in rows + of_shared if row["missing"]]:
        notes.insert(0, f"Missing and in no sum: {'; '.join(absent)}.")
    panels, made_by = [Panel(caption, columns, keys=3)], provenance(results)
    return Table(frame, panels, notes, made_by, ["stage"], printed, "Cost of the study")


def _costs(results: Results, runs: list[Run]) -> dict[str, dict[str, float]]:
    """Seed -> cost.json with the evaluation's seconds beside; empty where a run does not count."""
    costs = {}
    for run in runs:
        found = results[run]
        cost, evaluation = dict(found.cost), found.evaluation_cost
        if cost and evaluation:
            cost["evaluation_seconds"] = evaluation["seconds"]
            cost["gpu_seconds"] = cost.get("gpu_seconds", 0) + evaluation.get("gpu_seconds", 0)
        kind = kind_of(found.fault)
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
