"""What all figures share: how they look, which arms they draw and under which names, what stands below them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING

from discobeta.design.arms import CORNERS, Arm
from discobeta.design.study import Run, Study
from discobeta.report.collect import provenance_line
from discobeta.report.render import printable
from discobeta.report.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#4d4d4d", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
"""Colours of the arms without idle heads: Okabe and Ito's, which colour-blind readers tell apart."""

COLUMN = 3.4  # inches, one column of a two-column paper
FAINT = "#8c8c8c"
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "lines.linewidth": 1.3,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 250,
    "pdf.fonttype": 42,  # text stays text
    "svg.hashsalt": "discobeta",  # equal figures give equal files
}


def drawn_arms(study: Study, stage: str) -> list[Arm]:
    """The arms without idle heads, and those with one whose twin the study does not train."""
    arms = study.arms_of(stage)
    return [arm for arm in arms if not arm.is_idle or arm.twin not in arms]


def label_of(arm: Arm) -> str:
    label = arm.label[0].upper() + arm.label[1:]
    return f"{label}, idle head" if arm.is_idle else label


def colour_of(arm: Arm) -> str:
    """That of its twin, which computes the same."""
    return COLOURS[CORNERS.index(arm.twin) % len(COLOURS)]


def say_missing(axes: Axes) -> None:
    box = {"facecolor": "white", "edgecolor": "none"}
    axes.text(0.5, 0.5, "missing", transform=axes.transAxes, ha="center", va="center", color=FAINT, bbox=box)


def seeds_of(arm: Arm, runs: Iterable[Run]) -> int:
    """How many runs of the arm are among these."""
    return sum(run.arm == arm for run in runs)


def seeds_mark(there: int, expected: int) -> str:
    return "" if there == expected else f" ({there} of {expected} seeds)"


def footer(figure: Figure, results: Results, runs: list[Run]) -> None:
    """What made the figure and what is not in it, below it: `save` crops to what is drawn."""
    missing = results.describe_missing(runs)
    text = provenance_line(results) + (f" Missing: {missing}." if missing else "")
    lines = textwrap.wrap(printable(text), width=int(33 * figure.get_figwidth()))
    # what came with a run is no formula, whatever dollars are in it
    figure.text(0.01, -0.02, "\n".join(lines), fontsize=4.5, color=FAINT, va="top", parse_math=False)
