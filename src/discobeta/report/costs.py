"""The table of costs: seconds, memory and GPU-hours of every arm and of what arms share."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from discobeta.design.arms import Arm
from discobeta.design.study import Run
from discobeta.report.collect import provenance, provenance_line
from discobeta.report.render import Column, Panel, Table, count, number
from discobeta.report.results import Results, kind_of


def cost_table(results: Results) -> Table:
    """Per stage and arm: time per run, relative to the baseline, and GPU-hours; shared work once."""
    study, rows = results.study, []
    for stage in study.stages:
        of_stage = [run for run in study.runs() if run.stage == stage]
        kinds: dict[tuple[bool, str], list[Run]] = {}
        for run in sorted(of_stage, key=lambda run: run.proof):
            kinds.setdefault((run.proof, ", ".join(filter(None, [run.arm.name, run.variant]))), []).append(run)
        baseline = _costs(results, kinds.get((False, Arm().name), []))
        for (proof, work), runs in kinds.items():
            name = f"{work}, {study.proof_text(stage)}" if proof else work
            rows.append(_cost_row(stage, name, _costs(results, runs), None if proof else baseline))
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
    return Table(frame, [Panel(caption, columns)], notes, provenance(results), group=["stage"])


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
