"""Figures of a paper: reward against KL of every arm, and what came of the registered hypotheses."""

from __future__ import annotations

import math
from itertools import cycle
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from discobeta.design.arms import BY_NAME, CORNERS
from discobeta.design.stages import STAGES
from discobeta.report import frontier
from discobeta.report.frontier import REWARD, Point, frontiers, kl_of
from discobeta.report.hypotheses import Verdict
from discobeta.report.measures import METRICS
from discobeta.report.published import Published, Source, label_of, split_variant
from discobeta.report.style import COLOURS, COLUMN, FAINT, STYLE, colour_of, say_missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BASELINE = Source(CORNERS[0].name)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LINES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
"""Of arms and controls one after the other: with the marker they tell lines apart in grey too."""


# --- reward against KL


def frontier_figure(study: Published, stage: str) -> Figure:
    """True reward over KL to the reference, along the sweep over β, of every arm and control that was swept.

    Above: faint points are runs, crosses those that are left out because the policy has collapsed. A line joins the
    means over seeds at each β, of what is left; a hollow point is a mean of fewer seeds than the study has. The dotted
    line is the oracle's frontier, true reward plus regret, where the world gives it. Below: the difference from the
    baseline at equal KL, mean over seeds, where all seeds have both.
    """
    found = frontiers(study, stage)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.35 * COLUMN, 4.6), layout="constrained")
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.6))
        ends: list[tuple[float, float, str, str]] = []
        below_ends: list[tuple[float, float, str, str]] = []
        below.axhline(0, color=FAINT, linewidth=0.6)
        others = cycle(COLOURS[len(CORNERS) :])
        for place, (source, by_seed) in enumerate(found.items()):
            colour = next(others) if source.variant else colour_of(BY_NAME[source.arm])
            marker, style = MARKERS[place % len(MARKERS)], LINES[place % len(LINES)]
            all_points = [point for points in by_seed.values() for point in points]
            kept = [point for point in all_points if not point.has_collapsed]
            lost = [point for point in all_points if point.has_collapsed]
            axes.plot(*_xy(kept), color=colour, marker=marker, markersize=2, alpha=0.3, linestyle="none", zorder=2)
            axes.plot(*_xy(lost), color=colour, marker="x", markersize=3, alpha=0.5, linestyle="none", zorder=2)
            means = mean_points(by_seed)
            axes.plot(
                [kl for kl, *_ in means], [value for _, value, _ in means], color=colour, linestyle=style, zorder=3
            )
            for kl, value, n in means:
                face = colour if n == len(study.seeds) else "white"
                axes.plot(kl, value, marker=marker, markersize=4.5, color=colour, markerfacecolor=face, zorder=4)
            if means:
                ends.append((*means[-1][:2], label_of(source, study), colour))
            if kls := (source.text != BASELINE.text and BASELINE in found and common_grid(by_seed, found[BASELINE])):
                values = [difference_at(kl, by_seed, found[BASELINE]) for kl in kls]
                below.plot(kls, values, color=colour, linestyle=style, marker=marker, markersize=3, markevery=6)
                below_ends.append((kls[-1], values[-1], label_of(source, study), colour))
        if oracle := oracle_points(study, stage, list(found)):
            axes.plot(*zip(*oracle, strict=True), color="black", linestyle=(0, (1, 2)), linewidth=1, zorder=1)
            ends.append((*oracle[-1], "oracle", "black"))
        name_ends(axes, ends)
        if below_ends:
            name_ends(below, below_ends, gap=0.13)
        else:
            say_missing(below)
        below.set_xlabel(f"{METRICS['kl_per_sequence'].words} (nats per response)")
        axes.set_ylabel(METRICS[REWARD].words)
        below.set_ylabel("Minus the baseline's\nat equal KL")
        figure.align_ylabels()
        text = f"{STAGES[stage].title}. {study.made_by_line} KL: {kl_of(study, stage)}."
        figure.text(0.01, -0.02, text, fontsize=4.5, color=FAINT, va="top", parse_math=False)
    return figure


def common_grid(*arms: dict[int, list[Point]]) -> list[float]:
    """25 values of KL over the range that all seeds of all arms have; none if there is no such range."""
    lines = [frontier.line([p for p in points if not p.has_collapsed])[0] for arm in arms for points in arm.values()]
    if set(arms[0]) != set(arms[1]) or any(len(kl) < 2 for kl in lines):
        return []
    low, high = max(kl[0] for kl in lines), min(kl[-1] for kl in lines)
    return np.linspace(low, high, 25).tolist() if low < high else []


def difference_at(kl: float, arm: dict[int, list[Point]], baseline: dict[int, list[Point]]) -> float:
    """Mean over seeds of what the arm's line has more than the baseline's at this KL."""
    at = [
        [np.interp(kl, *frontier.line([p for p in of[seed] if not p.has_collapsed])) for of in (arm, baseline)]
        for seed in arm
    ]
    return float(np.mean([value - other for value, other in at]))


def _xy(points: list[Point]) -> tuple[list[float], list[float]]:
    return [point.kl for point in points], [point.value for point in points]


def mean_points(by_seed: dict[int, list[Point]]) -> list[tuple[float, float, int]]:
    """(mean KL, mean value, seeds) of each setting, collapsed runs left out, in the order of the KL."""
    of_setting: dict[float, list[Point]] = {}
    for points in by_seed.values():
        for point in points:
            if not point.has_collapsed:
                of_setting.setdefault(point.setting, []).append(point)
    return sorted(
        (float(np.mean([p.kl for p in points])), float(np.mean([p.value for p in points])), len(points))
        for points in of_setting.values()
    )


def oracle_points(study: Published, stage: str, sources: list[Source]) -> list[tuple[float, float]]:
    """(mean KL, mean true reward + regret) at each β, over runs and seeds: points of the oracle's frontier."""
    found: dict[str | None, list[tuple[float, float]]] = {}
    for run in study.sources(stage):
        variant, setting = split_variant(run.variant, "pref_beta")
        if Source(run.arm, variant) in sources:
            kl, reward, regret = (study.values(stage, run, name) for name in (kl_of(study, stage), REWARD, "regret"))
            points = [(kl[seed], reward[seed] + regret[seed]) for seed in kl.keys() & reward.keys() & regret.keys()]
            found.setdefault(setting, []).extend(points)
    return sorted(tuple(np.mean(sorted(points), axis=0).tolist()) for points in found.values() if points)


def name_ends(axes: Axes, ends: list[tuple[float, float, str, str]], gap: float = 0.065) -> None:
    """Names beside the right ends of lines, moved apart where they would overlap; ends: (x, y, name, colour).

    gap: between two names, as a share of the height.
    """
    axes.autoscale_view()
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    ends = sorted(ends, key=lambda end: (end[1], end[2]))
    places = [y for _, y, *_ in ends]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap * (high - low))
    above = max([0.0, places[-1] - high]) if places else 0.0  # of what is too high, all are moved down
    for (x, y, name, colour), place in zip(ends, places, strict=True):
        axes.annotate(
            name, (x, y), (right + 0.03 * (right - left), place - above), color=colour, fontsize=6.5, va="center",
            annotation_clip=False, parse_math=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.4, "alpha": 0.6, "shrinkA": 0, "shrinkB": 2},
        )  # fmt: skip
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)


# --- hypotheses


def forest(verdicts: list[Verdict]) -> Figure:
    """The difference of every hypothesis with its 95 % interval, a panel for each quantity.

    The grey bar reaches from zero, in the registered direction, to the least difference that would be found; of an
    equivalence dashed lines are the margin. What has no number has no point.
    """
    panels: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in verdicts:
        panels.setdefault((verdict.hypothesis.stage, verdict.hypothesis.words), []).append(verdict)
    heights = [len(panel) + 0.9 for panel in panels.values()]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.35 * COLUMN, 0.3 + 0.27 * sum(heights)), layout="constrained")
        grid = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
        for axes, ((stage, quantity), panel) in zip(grid, panels.items(), strict=True):
            draw_panel(axes, panel)
            axes.set_title(f"{stage}: {quantity}", loc="left", parse_math=False)
    return figure


def draw_panel(axes: Axes, panel: list[Verdict]) -> None:
    axes.axvline(0, color=FAINT, linewidth=0.6)
    axes.grid(axis="y", visible=False)
    for place, verdict in enumerate(panel):
        asked = verdict.hypothesis
        if math.isfinite(verdict.detectable):
            ways = {"less": (-1,), "greater": (1,)}.get(asked.direction, (-1, 1))
            ends = [way * verdict.detectable for way in ways]
            reach = [min(0, *ends), max(0, *ends)]
            axes.plot(reach, [place, place], color="#dddddd", linewidth=7, solid_capstyle="butt")
        if asked.margin is not None:
            for edge in (-asked.margin, asked.margin):
                axes.plot([edge, edge], [place - 0.4, place + 0.4], color="black", linewidth=0.8, linestyle=(0, (2, 1)))
        if verdict.n:
            half_width = 0 if math.isnan(verdict.ci95) else verdict.ci95
            axes.errorbar(
                verdict.difference, place, xerr=half_width, color="black", marker="o", markersize=3.5, elinewidth=1,
                markerfacecolor="black" if verdict.verdict in ("supported", "equivalent") else "white",
            )  # fmt: skip
        axes.text(1.02, place, verdict.verdict, transform=axes.get_yaxis_transform(), fontsize=6.5, va="center")
    names = [verdict.hypothesis.id for verdict in panel]
    axes.set_yticks(range(len(panel)), names)
    axes.set_ylim(len(panel) - 0.4, -0.6)
    axes.locator_params(axis="x", nbins=6)
