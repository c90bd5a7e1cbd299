"""One number of every study beside the others': what holds in all of them, and what in some.

The number is the KL divergence from the known truth to the model, which is of one unit whatever the data are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from discobeta.design.arms import CORNERS
from discobeta.design.stages import STAGES
from discobeta.report.effects import with_seeds
from discobeta.report.estimates import estimate
from discobeta.report.measures import MEASURES
from discobeta.report.published import Printed, Published, Source, printed_rows
from discobeta.report.render import Column, Panel, Row, Table
from discobeta.report.statistics import mean_ci, sign_flip_p

METRIC = "excess_kl"
BASELINE = Printed(Source(CORNERS[0].name))


@dataclass(frozen=True)
class Cell:
    """A row of a study: values, and their differences from the baseline's of the same seeds, by seed."""

    study: Published
    row: Printed
    values: dict[int, float]
    differences: dict[int, float]


def shared(studies: list[Published], stage: str) -> dict[str, list[Cell]]:
    """Label -> of every study that knows the truth a cell, the baseline first; of the rows that all of these have.

    Nothing of fewer than two studies. A control counts as the same where it has the same name and the same label, and
    of what was fitted afterwards only the fits to the baseline are taken.
    """
    found = [_cells(study, stage) for study in studies if study.values(stage, BASELINE.source, METRIC)]
    if len(found) < 2:
        return {}
    everywhere = [key for key in found[0] if all(key in cells for cells in found)]
    return {label: [cells[row, label] for cells in found] for row, label in everywhere}


def _cells(study: Published, stage: str) -> dict[tuple[Printed, str], Cell]:
    cells, baseline = {}, study.values(stage, BASELINE.source, METRIC)
    for row in printed_rows(study, stage):
        values = study.values(stage, row.source, row.metric(METRIC))
        if values and not (row.posthoc and row.source.variant):
            common = [seed for seed in values if seed in baseline and row != BASELINE]
            differences = {seed: values[seed] - baseline[seed] for seed in common}
            cells[row, row.label(study)] = Cell(study, row, values, differences)
    return cells


def table(found: dict[str, list[Cell]], stage: str) -> Table:
    """A row per study, a column per label: what each says, and its difference from the baseline. The CSV is long."""
    metric = MEASURES[METRIC]
    records = [_record(label, cell) for label, cells in found.items() for cell in cells]
    of_seeds = [cell.differences for cells in found.values() for cell in cells]
    seeds = sorted({seed for cells in found.values() for cell in cells for seed in cell.study.seeds})
    studies = [cell.study for cell in next(iter(found.values()))]
    printed = pd.DataFrame(
        {"study": study.name, "cells": {label: cells[place] for label, cells in found.items()}}
        for place, study in enumerate(studies)
    )

    def columns(labels: list[str], what: str) -> list[Column]:
        def text(row: Row, label: str) -> str:
            cell = row["cells"][label]
            return estimate(getattr(cell, what), cell.study.seeds, metric.decimals)

        which = [Column("Study", lambda row: row["study"], is_number=False)]
        return [*which, *(Column(label, lambda row, label=label: text(row, label)) for label in labels)]

    title = f"{STAGES[stage].title}, all studies: {metric.words}"
    first, *others = found
    panels = [
        Panel(
            f"{title} ({metric.unit}). Mean over seeds ± half-width of its 95 % interval.",
            columns(list(found), "values"),
        ),
        Panel(f"{title}: difference from {first}, paired over seeds.", columns(others, "differences"), "differences"),
    ]  # fmt: skip
    notes = ["What all of these studies have. Two-sided sign-flip tests of the differences, not corrected: in the CSV."]
    return Table(
        with_seeds(pd.DataFrame(records), seeds, of_seeds), panels, notes + [study.made_by_line for study in studies],
        {}, ["study"], printed, title,
    )  # fmt: skip


def _record(label: str, cell: Cell) -> dict[str, Any]:
    source, values = cell.row.source, list(cell.differences.values())
    mean, half_width = mean_ci(list(cell.values.values()))
    difference, ci95 = mean_ci(values)
    return {
        **cell.study.made_by, "arm": source.arm, "variant": source.variant, "posthoc": cell.row.posthoc, "label": label,
        "n_seeds": len(values or cell.values), "n_expected": len(cell.study.seeds),
        METRIC: mean, f"{METRIC}_ci95": half_width,
        "difference": difference, "ci95": ci95, "p": sign_flip_p(values) if values else math.nan,
    }  # fmt: skip
