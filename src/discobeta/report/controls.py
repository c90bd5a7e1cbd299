"""The table of what stands beside the grid of a stage: controls, sweeps, what was fitted after training, a tuned β.

None of it is in a mean, effect or comparison of the grid. Means are over the seeds, which controls share with the grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from discobeta.design.arms import BY_NAME, CORNERS, Arm
from discobeta.design.study import Run
from discobeta.design.variants import AS_IN_THE_GRID, TUNED, text_of
from discobeta.report import published
from discobeta.report.cells import MEASURED, arm_row, frames, panels_of
from discobeta.report.collect import collect, of_grid, provenance, provenance_line
from discobeta.report.measures import METRICS, POSTHOC
from discobeta.report.published import Published, Source
from discobeta.report.render import Column, Table, seeds_column
from discobeta.report.results import Results, enumerate_seeds


def controls_table(results: Results, stage: str) -> Table:
    """A row per arm and variant, after the row of the arm as it is in the grid."""
    study = results.study
    numbers = Published(study.name, collect(results), study.settings, {})
    metrics = numbers.frame[numbers.frame.stage == stage]
    tuned = _tuned(results, stage, numbers)
    rows: list[dict[str, Any]] = []
    for arm in study.arms_of(stage):
        variants = [name for of, name in study.variants_of(stage) if of == arm]
        of_arm = metrics[metrics.arm == arm.name]
        more = _posthoc_rows(results, of_grid(of_arm)) if arm == Arm() else []
        more += [one.row for one in tuned if one.source.arm == arm.name]
        if variants or more:
            rows += [_run_row(results, stage, arm, name, of_arm) for name in ("", *variants)] + more
    rows = rows or [_run_row(results, stage, study.arms_of(stage)[0], "", metrics[:0])]
    which = [
        Column("Arm", lambda row: BY_NAME[row["arm"]].label, is_number=False),
        Column("Variant", lambda row: row["label"], is_number=False),
    ]
    if any(row["n_seeds"] != row["n_expected"] for row in rows):
        which.append(seeds_column())
    title = f"Controls and sweeps beside the grid of {stage}"
    panels = panels_of(stage, which, title, study.seeds)
    frame, printed = frames(rows)
    notes, made_by = [*_notes(results, stage, tuned, printed), provenance_line(results)], provenance(results)
    return Table(frame, panels, notes, made_by, ["arm"], printed, f"Beside the grid of {stage}: controls and sweeps")


def _run_row(results: Results, stage: str, arm: Arm, variant: str, metrics: pd.DataFrame) -> dict[str, Any]:
    """Of the runs of an arm as they are in the grid, or of one of its variants. metrics: of the arm."""
    study = results.study
    of_stage = [*results.whole_runs(stage), *results.variant_runs(stage)]
    runs = [run for run in of_stage if (run.arm, run.variant) == (arm, variant)]
    of = study.variant(runs[0]) if runs else None
    there = [run.seed for run in runs if results.absence(run) is None]
    label = of.label if of else AS_IN_THE_GRID
    return _row(arm, variant, label, metrics[metrics.variant == variant], [run.seed for run in runs], there)


def _row(
    arm: Arm, variant: str, label: str, metrics: pd.DataFrame, expected: list[int], there: list[int]
) -> dict[str, Any]:
    row = arm_row(arm, metrics, expected, there)
    return {"arm": row.pop("arm"), "variant": variant, **(row | {"label": label})}


def _posthoc_rows(results: Results, metrics: pd.DataFrame) -> list[dict[str, Any]]:
    """Of `posthoc/<name>/<metric>` in the baseline's metrics; metrics: of the baseline as it is in the grid."""
    fitted: dict[str, list[tuple[int, str, float]]] = {}
    for seed, metric, value in zip(metrics.seed, metrics.metric, metrics.value, strict=True):
        place, _, rest = metric.partition("/")
        name, _, metric = rest.partition("/")
        if place == "posthoc" and metric in MEASURED:
            fitted.setdefault(name, []).append((seed, metric, value))
    rows = []
    for name in sorted(fitted, key=lambda name: [*POSTHOC, *sorted(fitted)].index(name)):
        frame = pd.DataFrame(fitted[name], columns=["seed", "metric", "value"])
        label, seeds = POSTHOC.get(name, name), results.study.seeds
        rows.append(_row(Arm(), f"posthoc/{name}", label, frame, seeds, frame.seed.unique().tolist()))
    return rows


# --- a tuned β


@dataclass(frozen=True)
class Tuned:
    """An arm or control whose β was chosen: its row, the values to choose from, and seed -> that which was chosen."""

    source: Source
    row: dict[str, Any]
    betas: list[float]
    chosen: dict[int, float]


def _tuned(results: Results, stage: str, numbers: Published) -> list[Tuned]:
    """Of each arm and control that is swept and whose β `published.chosen` finds in some seed.

    The values to choose from are those that the study should have, whether they are there or not.
    """
    study, found = results.study, []
    runs = [Source(arm.name) for arm in CORNERS if arm in study.arms_of(stage)]
    runs += [Source(arm.name, name) for arm, name in study.variants_of(stage)]
    for source, points in published.swept(numbers, stage, runs).items():
        if chosen := published.chosen(numbers, stage, points):
            of = numbers.frame[(numbers.frame.stage == stage) & (numbers.frame.arm == source.arm)]
            runs_of = {seed: run.variant for seed, run in chosen.items()}
            here = [runs_of.get(seed) == name for seed, name in zip(of.seed, of.variant, strict=True)]
            label = ", ".join(filter(None, [_label(results, stage, source), "tuned β"]))
            name = ",".join(filter(None, [source.variant, TUNED]))
            row = _row(BY_NAME[source.arm], name, label, of[here], study.seeds, list(chosen))
            of_seed = {seed: points[chosen[seed]] for seed in study.seeds if seed in chosen}
            found.append(Tuned(source, row, sorted(points.values()), of_seed))
    return found


def _label(results: Results, stage: str, source: Source) -> str:
    """Of a control what the study calls it; nothing of an arm as it is in the grid."""
    runs = (run for run in results.variant_runs(stage) if (run.arm.name, run.variant) == (source.arm, source.variant))
    run = next(runs, None)
    return results.study.variant(run).label if run else source.variant


def _notes(results: Results, stage: str, tuned: list[Tuned], rows: pd.DataFrame) -> list[str]:
    study = results.study
    notes = [
        "A variant is its arm with other settings, trained beside the grid on the same rows and seeds; none is in "
        "another table's means or in a figure of the grid. The first row of an arm is its run of the grid."
    ]
    said = {}
    for run in results.variant_runs(stage):
        of = study.variant(run)
        if of.control and not of.point:
            said[of.label] = _differences(of)
    if said:
        notes.append(f"Settings: {'; '.join(f'{label}: {text}' for label, text in said.items())}.")
    if rows.variant.str.startswith("posthoc/").any():
        notes.append(
            "What is post hoc was fitted to the frozen baseline on calibration pairs: it says other probabilities of "
            "the same choices between responses, and has no accuracy, and no row, of its own where these are all."
        )
    if any((rows[f"{name}_n"].between(1, rows.n_seeds - 1)).any() for name in METRICS):
        notes.append("(n of N): what is measured is undefined in the other seeds, e.g. a correlation with a constant.")
    for one in tuned:
        seeds = {beta: [seed for seed in one.chosen if one.chosen[seed] == beta] for beta in one.betas}
        picked = ", ".join(f"{text_of(beta)} ({enumerate_seeds(of)})" for beta, of in seeds.items() if of)
        whose = ", ".join(filter(None, [BY_NAME[one.source.arm].label, _label(results, stage, one.source)]))
        notes.append(
            f"Tuned β of {whose}: of each seed the run with the least NLL on its calibration pairs, of β "
            f"{', '.join(map(text_of, one.betas))}; chosen: {picked}. A seed counts where all of them are measured."
        )
    own = [arm for arm, _ in study.variants_of(stage)]
    runs: list[Run] = [run for run in results.whole_runs(stage) if run.arm in own] + results.variant_runs(stage)
    if missing := results.describe_missing(runs):
        notes.append(f"Missing: {missing}.")
    return notes


def _differences(of: Any) -> str:
    parts = [f"{key} = {value}" for key, value in of.settings.items()]
    parts += [f"replicate {of.replicate}"] * bool(of.replicate)
    parts += [f"reward models {', '.join(of.reward_models)}"] * bool(of.reward_models)
    return ", ".join(parts)
