"""The effects of all stages at a glance: a dot for each seed, their mean and its interval, and zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from discobeta.design.arms import CORNERS, IDEAS
from discobeta.design.stages import STAGES
from discobeta.report.collect import collect
from discobeta.report.effects import comparisons, effects_frame, factorial, short_label
from discobeta.report.marks import interval_words, seed_points
from discobeta.report.measures import MEASURES
from discobeta.report.render import capitalised
from discobeta.report.results import Results
from discobeta.report.statistics import INTERVAL_FROM
from discobeta.report.style import (
    COLUMN,
    FAINT,
    INK,
    Look,
    footer,
    look_of,
    new_figure,
    say_missing,
    short_mark,
    words_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW, HEAD = 0.165, 0.56  # inches: of an effect, and of what a panel has besides


def effects_forest(results: Results) -> Figure:
    """A panel for each metric, a row for each stage and effect: differences per seed, their mean and its interval.

    The effects are those of the table, paired over seeds; a stage without all arms has one arm against another instead.
    A filled mean has an interval without zero, and the direction that is better stands below the axis. Where the KL to
    the truth is known it stands for the NLL: the difference of the two is the labels' noise.
    """
    frame = differences(results)
    if "excess_kl" in set(frame.metric):
        frame = frame[frame.metric != "nll"]
    frame = frame[frame.n_seeds > 0]
    order = list(dict.fromkeys(name for stage in STAGES.values() for name in stage.compared))
    panels = [frame[frame.metric == name] for name in order if name in set(frame.metric)]
    heights = [HEAD + ROW * len(panel) for panel in panels] or [1.0]
    with new_figure(COLUMN, 0.1 + sum(heights)) as figure:
        grid = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        for axes, panel in zip(grid, panels, strict=False):
            draw_effects(axes, panel)
        if not panels:
            say_missing(grid[0])
        runs = [run for run in results.study.grid_runs() if run.arm in CORNERS and not run.proof]
        words = interval_words(frame.n_seeds.astype(int), lines=False)
        words += "; (n/N): n of N seeds" if (frame.n_seeds < frame.n_expected).any() else ""
        words += "; hollow: the interval holds zero" if "bar" in words else ""
        footer(figure, results, runs, f"{capitalised(words)}. Effects are paired over seeds." * bool(words))
    return figure


def differences(results: Results) -> pd.DataFrame:
    """The factorial effects; of a stage that has not all arms, one arm against another."""
    study, numbers = results.study, collect(results)
    frame = effects_frame(study, numbers, factorial())
    others = effects_frame(study, numbers, comparisons())
    return pd.concat([frame, others[~others.stage.isin(frame.stage)]], ignore_index=True)


def draw_effects(axes: Axes, panel: pd.DataFrame) -> None:
    """The rows of one metric, from above in the order of the stages."""
    name = panel.metric.iloc[0]
    axes.axvline(0, color=INK, linewidth=0.7)
    axes.grid(axis="y", visible=False)
    for place, row in enumerate(panel.to_dict("records")):
        look = look_of_effect(row["contrast"])
        seed_points(axes, place, row["differences"], look, across=True, width=0.24)
        if row["n_seeds"] >= INTERVAL_FROM and abs(row["difference"]) <= row["ci95"]:
            axes.lines[-1].set(markerfacecolor="white", markeredgecolor=look.colour, markeredgewidth=0.9)
        if place and panel.stage.iloc[place - 1] != row["stage"]:
            axes.axhline(place - 0.5, color=FAINT, linewidth=0.4)
    names = [
        f"{row.stage}: {row.contrast}{short_mark(row.n_seeds, row.n_expected)}" for row in panel.itertuples(index=False)
    ]
    axes.set_yticks(range(len(panel)), names)
    axes.set_ylim(len(panel) - 0.4, -0.6)
    axes.locator_params(axis="x", nbins=5)
    axes.set_title(words_of(name), loc="left", parse_math=False, pad=3)
    arrow = MEASURES[name].better
    axes.set_xlabel({"↑": "better →", "↓": "← better"}.get(arrow, "more →"), loc="right" if arrow != "↓" else "left",
                    labelpad=1)  # fmt: skip
    reach = max(abs(limit) for limit in axes.get_xlim())
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, -0.15 * reach), max(high, 0.15 * reach))  # zero, and a little of either side


def look_of_effect(contrast: str) -> Look:
    """That of the arm that uses the ideas of the effect, or of the first of two arms."""
    first = contrast.partition(" − ")[0]
    words = first.replace(" + ", " × ").split(" × ")
    used = {idea.key for idea in IDEAS if idea.label in words or first == short_label(CORNERS[-1])}
    return look_of(next(arm for arm in CORNERS if arm.used == used))
