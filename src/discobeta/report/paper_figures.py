"""Figures of a paper: reward against KL of every arm, and what came of the registered hypotheses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.lines import Line2D

from discobeta.design.arms import CORNERS
from discobeta.design.stages import STAGES
from discobeta.report import across, frontier
from discobeta.report.across import Cell
from discobeta.report.frontier import REWARD, Point, frontiers, kl_of
from discobeta.report.hypotheses import Verdict
from discobeta.report.marks import End, name_ends
from discobeta.report.measures import MEASURES
from discobeta.report.published import Published, Source, label_of
from discobeta.report.reward_kl import draw_oracle, draw_points, keep_sensible, looks_of, note_of, oracle_points
from discobeta.report.statistics import mean_ci
from discobeta.report.style import (
    COLUMN,
    FAINT,
    INK,
    PAGE,
    UNITS,
    axis_words,
    new_figure,
    say_missing,
    state_source,
    words_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASELINE = Source(CORNERS[0].name)


# --- reward against KL


MOST = 2 / 3
"""The share of a study's seeds that must have both lines at a KL for their mean difference to be drawn there."""


def frontier_figure(study: Published, stage: str) -> Figure:
    """True reward over KL to the reference, along the sweep over β, of every arm and control that was swept.

    Above as in `reward_kl`: faint points are runs, crosses those that are left out because the policy has collapsed. A
    line joins the means over seeds at each β, of what is left; a hollow point is a mean of fewer seeds than the study
    has. The dotted line is the oracle's frontier, true reward plus regret, where the world gives it. Below: the
    difference from the baseline at equal KL, mean over the seeds that have both there, where most have (`MOST`).
    """
    found = frontiers(study, stage)
    looks = looks_of(found)
    with new_figure(1.35 * COLUMN, 4.6) as figure:
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.6))
        below.axhline(0, color=FAINT, linewidth=0.6)
        ends = draw_points(axes, found, looks, study, len(study.seeds))
        below_ends: list[End] = []
        for source, by_seed in found.items():
            if source.text == BASELINE.text or BASELINE not in found:
                continue
            kls, values = differences(by_seed, found[BASELINE], len(study.seeds))
            if kls:
                look = looks[source]
                below.plot(kls, values, **look.of_line, marker=look.marker, markersize=3, markevery=6)
                below_ends.append((kls[-1], values[-1], label_of(source, study), look.colour))
        keep_sensible(axes, found)
        ends += draw_oracle(axes, oracle_points(study, stage, list(found)))
        if not below_ends:
            say_missing(below, "not comparable at equal KL")
        below.set_xlabel(words_of(kl_of(study, stage)))
        axes.set_ylabel(axis_words(REWARD))
        below.set_ylabel("Minus the baseline's\nat equal KL (r*)\n↑ better")
        axes.set_title(STAGES[stage].title, loc="left")
        figure.align_ylabels()
        name_ends(figure, {axes: ends, below: below_ends})
        note = note_of(found, has_oracle="regret" in study.metrics(stage))
        note += f" Below: mean over the seeds that have both, where {MOST:.0%} of all or more do." * bool(below_ends)
        state_source(figure, made_by_of(study), note)
    return figure


def made_by_of(study: Published) -> dict[str, str]:
    """What made the numbers of a study, as of a figure of its runs."""
    return {"study": study.name, "seeds": " ".join(map(str, study.seeds)), **study.made_by}


def differences(
    arm: dict[int, list[Point]], baseline: dict[int, list[Point]], seeds: int
) -> tuple[list[float], list[float]]:
    """At 25 values of KL what the arm's line has more than the baseline's, mean over the seeds that have both there.

    From the least to the largest KL at which at least `MOST` of the study's seeds have; empty if there is none.
    """
    kept = {
        seed: [frontier.line([point for point in of[seed] if not point.has_collapsed]) for of in (arm, baseline)]
        for seed in arm.keys() & baseline.keys()
    }
    kept = {seed: lines for seed, lines in kept.items() if all(len(kl) > 1 for kl, _ in lines)}
    spans = [(max(kl[0] for kl, _ in lines), min(kl[-1] for kl, _ in lines)) for lines in kept.values()]
    ends = sorted({end for span in spans for end in span})
    common = [kl for kl in ends if sum(low <= kl <= high for low, high in spans) >= MOST * seeds]
    if len(common) < 2:
        return [], []
    kls, means = np.linspace(common[0], common[-1], 25), []
    for kl in kls:
        there = [lines for lines, (low, high) in zip(kept.values(), spans, strict=True) if low <= kl <= high]
        each = [np.interp(kl, *ours) - np.interp(kl, *theirs) for ours, theirs in there]
        means.append(float(np.mean(each)) if len(there) >= MOST * seeds else math.nan)
    return kls.tolist(), means


# --- all studies


def across_figure(found: Mapping[str, Mapping[str, Sequence[Cell]]]) -> Figure:
    """`across.shared` of each stage: a row per study, a mark per arm (filled), control and fit; means and intervals."""
    every = [cell for rows in found.values() for cells in rows.values() for cell in cells]
    studies = list(dict.fromkeys(cell.study.name for cell in every))
    labels = {label: cells[0].row for rows in found.values() for label, cells in rows.items()}
    looks = looks_of(Source(row.source.arm, row.posthoc or row.source.variant) for row in labels.values())
    styles = {
        label: {
            "color": look.colour, "marker": look.marker, "markersize": 4, "linestyle": "none",
            "markerfacecolor": "white" if source.variant else look.colour,
        }
        for label, (source, look) in zip(labels, looks.items(), strict=True)
    }  # fmt: skip
    with new_figure(PAGE, 1.2 + 0.52 * len(studies)) as figure:
        grid = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
        for axes, (stage, rows) in zip(grid, found.items(), strict=True):
            axes.grid(axis="y", visible=False)
            for place in range(1, len(studies)):
                axes.axhline(place - 0.5, color=FAINT, linewidth=0.4)
            for above, (label, cells) in zip(np.linspace(-0.34, 0.34, len(rows)), rows.items(), strict=True):
                for cell in cells:
                    mean, half_width = mean_ci(list(cell.values.values()))
                    place = studies.index(cell.study.name) + above
                    bar = None if math.isnan(half_width) else half_width
                    axes.errorbar(mean, place, xerr=bar, elinewidth=0.8, **styles[label])
            axes.set_xlim(left=0)
            axes.set_xlabel(words_of(across.METRIC))
            axes.set_title(f"{STAGES[stage].title} (← better)", loc="left")
        grid[0].set_yticks(range(len(studies)), studies)
        grid[0].set_ylim(len(studies) - 0.5, -0.5)
        handles = [Line2D([], [], label=label, **style) for label, style in styles.items()]
        figure.legend(handles=handles, loc="outside upper center", ncols=4)
        commits = dict.fromkeys(commit for cell in every for commit in cell.study.made_by["commit"].split(", "))
        words = "Bars: 95 % interval of the mean over seeds. Differences are paired: see the table."
        state_source(figure, {"commit": ", ".join(commits)}, f"Filled: arms; hollow: controls and fits. {words}")
    return figure


# --- hypotheses


def forest(verdicts: list[Verdict], studies: list[Published], digest: str) -> Figure:
    """The difference of every hypothesis with its 95 % interval, a panel for each quantity.

    A dot is a seed. The grey bar reaches from zero, in the registered direction, to the least difference that would be
    found; of an equivalence dashed lines are the margin. Hypotheses without numbers are named below. digest: of theirs.
    """
    panels: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in verdicts:
        if verdict.n:
            panels.setdefault((verdict.hypothesis.stage, verdict.hypothesis.words), []).append(verdict)
    silent = [verdict for verdict in verdicts if not verdict.n]
    heights = [len(panel) + 1.4 for panel in panels.values()] or [2.0]
    with new_figure(1.35 * COLUMN, 1.0 + 0.27 * sum(heights)) as figure:
        grid = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        for axes, ((stage, quantity), panel) in zip(grid, panels.items(), strict=False):
            draw_panel(axes, panel)
            name = panel[0].hypothesis.measured
            unit = f" ({UNITS[name]})" if name in UNITS else ""
            axes.set_title(f"{stage}: {quantity}{unit}", loc="left", parse_math=False)
            if name in MEASURES and not panel[0].hypothesis.quantity and MEASURES[name].better:
                side = {"↑": ("better →", "right"), "↓": ("← better", "left")}[MEASURES[name].better]
                axes.set_xlabel(side[0], loc=side[1], labelpad=1)
        if panels:
            figure.legend(handles=handles_of(verdicts), loc="outside upper center", ncols=2, handlelength=1.8)
        else:
            say_missing(grid[0], "nothing has run")
        verdict_words = {}
        for verdict in silent:
            verdict_words.setdefault(verdict.verdict, []).append(verdict.hypothesis.id)
        text = "; ".join(f"{word}: {', '.join(ids)}" for word, ids in verdict_words.items())
        made_by = {"study": ", ".join(study.name for study in studies), "hypotheses": digest}
        made_by["commit"] = ", ".join(dict.fromkeys(study.made_by["commit"] for study in studies)) or "unknown"
        state_source(figure, made_by, f"No numbers yet, {text}." if silent else "")
    return figure


def handles_of(verdicts: list[Verdict]) -> list[Line2D]:
    """Entries of the legend, of what is drawn."""
    there = [verdict for verdict in verdicts if verdict.n]
    handles = [
        Line2D([], [], color=INK, marker="o", markersize=4, label="supported or equivalent, 95 % interval"),
        Line2D([], [], color=INK, marker="o", markersize=4, markerfacecolor="white", label="not so"),
        Line2D([], [], color=FAINT, marker="o", linestyle="none", markersize=2.2, label="single seeds"),
    ]
    if any(math.isfinite(verdict.detectable) for verdict in there):
        handles.append(Line2D([], [], linewidth=7, label="less than this would hardly be found", **DETECTABLE))
    if any(verdict.hypothesis.margin is not None for verdict in there):
        handles.append(Line2D([], [], label="margin of an equivalence", **MARGIN))
    return handles


DETECTABLE = {"color": "#dddddd", "solid_capstyle": "butt"}
MARGIN = {"color": INK, "linewidth": 0.8, "linestyle": (0, (2, 1))}


def draw_panel(axes: Axes, panel: list[Verdict]) -> None:
    axes.axvline(0, color=FAINT, linewidth=0.6)
    axes.grid(axis="y", visible=False)
    for place, verdict in enumerate(panel):
        asked = verdict.hypothesis
        if math.isfinite(verdict.detectable):
            ways = {"less": (-1,), "greater": (1,)}.get(asked.direction, (-1, 1))
            ends = [way * verdict.detectable for way in ways]
            axes.plot([min(0, *ends), max(0, *ends)], [place, place], linewidth=7, **DETECTABLE)
        if asked.margin is not None:
            for edge in (-asked.margin, asked.margin):
                axes.plot([edge, edge], [place - 0.4, place + 0.4], **MARGIN)
        values = list(verdict.found.values.values())
        places = place + np.linspace(-0.2, 0.2, len(values)) if len(values) > 1 else [place]
        axes.plot(values, places, color=FAINT, marker="o", markersize=2.2, markeredgewidth=0, linestyle="none")
        half_width = 0 if math.isnan(verdict.ci95) else verdict.ci95
        axes.errorbar(
            verdict.difference, place, xerr=half_width, color=INK, marker="o", markersize=4, elinewidth=1,
            markerfacecolor=INK if verdict.verdict in ("supported", "equivalent") else "white",
        )  # fmt: skip
        axes.text(1.02, place, verdict.verdict, transform=axes.get_yaxis_transform(), fontsize=6.5, va="center")
    axes.set_yticks(range(len(panel)), [verdict.hypothesis.id for verdict in panel])
    axes.set_ylim(len(panel) - 0.4, -0.6)
    axes.locator_params(axis="x", nbins=6)
