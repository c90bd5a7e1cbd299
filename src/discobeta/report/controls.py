"""The table of what stands beside the grid of a stage: controls, sweeps, what was fitted after training, a tuned β.

None of it is in a mean, effect or comparison of the grid. Means are over the seeds, which controls share with the grid.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from discobeta.design.arms import Arm
from discobeta.design.stages import STAGES
from discobeta.design.study import Run, Study
from discobeta.design.variants import text_of
from discobeta.report.cells import MEASURED, estimates, panels_of
from discobeta.report.collect import collect, of_grid, provenance, provenance_line
from discobeta.report.render import Column, Table, count
from discobeta.report.results import Results, enumerate_seeds

POSTHOC = {
    "temperature": "post-hoc temperature",
    "topic_scale": "post-hoc scale per topic",
    "sigma": "post-hoc σ",
}
"""What evaluation fits on calibration pairs to a frozen baseline -> what the table calls it."""

AS_IN_THE_GRID = "as in the grid"


def controls_table(results: Results, stage: str) -> Table:
    """A row per arm and variant, after the row of the arm as it is in the grid; mean ± CI over seeds."""
    study = results.study
    metrics = collect(results)
    metrics = metrics[metrics.stage == stage]
    tuned, chosen = tuned_beta(results, stage)
    rows: list[dict[str, Any]] = []
    for arm in study.arms_of(stage):
        variants = [name for of, name in study.variants_of(stage) if of == arm]
        of_arm = metrics[metrics.arm == arm.name]
        more = _posthoc_rows(results, of_grid(of_arm)) if arm == Arm() else []
        if arm == Arm() and len(chosen):
            more.append(_row(arm, "tuned", "tuned β", tuned, study.seeds, list(chosen)))
        if variants or more:
            rows += [_run_row(results, stage, arm, name, of_arm) for name in ("", *variants)] + more
    frame = pd.DataFrame(rows or [_run_row(results, stage, study.arms_of(stage)[0], "", metrics[:0])])
    fitted = [name for name in MEASURED if name.startswith("posthoc/")]  # which are rows here
    measured = {name for name in MEASURED if (frame[f"{name}_n"] > 0).any()} - set(fitted)
    frame = frame.drop(columns=[c for m in MEASURED if m not in measured for c in (m, f"{m}_ci95", f"{m}_n")])
    which = [
        Column("Arm", lambda row: row["arm"], is_number=False),
        Column("Variant", lambda row: row["label"], is_number=False),
        Column("Seeds", lambda row: count(row["n_seeds"], row["n_expected"])),
    ]
    panels = panels_of(stage, which, frame, measured, f"Controls and sweeps beside the grid of {stage}")
    made_by = provenance(results)
    return Table(frame, panels, [*_notes(results, stage, chosen), provenance_line(results)], made_by, group=["arm"])


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
    missing = [seed for seed in expected if seed not in there]
    return {
        "arm": arm.name,
        "variant": variant,
        "label": label,
        "n_seeds": len(there),
        "n_expected": len(expected),
        "missing_seeds": " ".join(map(str, missing)),
        **estimates(metrics),
    }


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


def tuned_beta(results: Results, stage: str) -> tuple[pd.DataFrame, dict[int, float]]:
    """The baseline's numbers at the β with the least `calibration/nll` of each seed, and seed -> that β.

    The values to choose from are the grid's and those at which the stage's sweep has the baseline with nothing else
    changed; a seed is left out unless all of them are measured there, since the least of fewer is another choice. Of
    equal ones the first counts, the grid's before the others.
    """
    study, numbers = results.study, collect(results)
    numbers = numbers[(numbers.stage == stage) & (numbers.arm == Arm().name)]
    betas = betas_of(study, stage)
    nll = numbers[numbers.metric == "calibration/nll"].pivot(index="seed", columns="variant", values="value")
    nll = nll.reindex(columns=list(betas)).dropna() if len(betas) > 1 else nll[:0]
    best = {int(seed): min(betas, key=values.get) for seed, values in nll.to_dict("index").items()}
    chosen = [name == best.get(seed) for seed, name in zip(numbers.seed, numbers.variant, strict=True)]
    return numbers[chosen], {seed: betas[best[seed]] for seed in study.seeds if seed in best}


def betas_of(study: Study, stage: str) -> dict[str, float]:
    """Variant of the baseline -> its β: the grid's own (""), and the points of the sweep that differ in β alone."""
    if not STAGES[stage].has_pairs or Arm() not in study.arms_of(stage):
        return {}
    trained = {}
    for name in ("", *(name for arm, name in study.variants_of(stage) if arm == Arm())):
        run = study.run(stage, Arm(), study.seeds[0], variant=name)
        of = study.variant(run)
        if of is None or (of.point and not of.control):
            trained[name] = study.config(run).settings_of("training")
    betas = {name: settings.pop("pref_beta", None) for name, settings in trained.items()}
    return {name: beta for name, beta in betas.items() if beta is not None and trained[name] == trained[""]}


def _notes(results: Results, stage: str, chosen: dict[int, float]) -> list[str]:
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
    if chosen:
        betas = ", ".join(map(text_of, sorted(betas_of(study, stage).values())))
        seeds = {beta: [seed for seed in chosen if chosen[seed] == beta] for beta in dict.fromkeys(chosen.values())}
        picked = ", ".join(f"{text_of(beta)} ({enumerate_seeds(seeds[beta])})" for beta in sorted(seeds))
        notes.append(
            f"Tuned β: of each seed the run with the least NLL on its calibration pairs, of β {betas}; "
            f"chosen: {picked}. A seed counts where all of them are measured."
        )
    own = [arm for arm, _ in study.variants_of(stage)]
    runs: list[Run] = [run for run in results.whole_runs(stage) if run.arm in own] + results.variant_runs(stage)
    if missing := results.describe_missing(runs):
        notes.append(f"Missing: {missing}. A mean over fewer seeds than the study has says so.")
    return notes


def _differences(of: Any) -> str:
    parts = [f"{key} = {value}" for key, value in of.settings.items()]
    parts += [f"replicate {of.replicate}"] * bool(of.replicate)
    parts += [f"reward models {', '.join(of.reward_models)}"] * bool(of.reward_models)
    return ", ".join(parts)
