"""The files of a study's figures, and what they draw of finished runs; how runs went is in `curves`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from discobeta.design.arms import CORNERS, IDEAS, Arm
from discobeta.design.stages import STAGES
from discobeta.files import replacing
from discobeta.folders import claim
from discobeta.metrics import reliability
from discobeta.report import outputs
from discobeta.report.measures import GAINED, METRICS, PREDICTED, TESTED
from discobeta.report.results import Found, Results
from discobeta.report.statistics import wilson
from discobeta.report.style import (
    COLUMN,
    FAINT,
    STYLE,
    colour_of,
    drawn_arms,
    footer,
    label_of,
    say_missing,
    seeds_mark,
    seeds_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def write(results: Results) -> None:
    """The figures that `outputs` names, into `study.directory`/figures."""
    study = results.study
    directory = study.figures_directory
    figures = outputs.figures(study)
    claim(directory, "discobeta figures", [name for output in figures for name in output.files])
    for output in figures:
        save(output.make(results), [directory / name for name in output.files])


def save(figure: Figure, paths: list[Path]) -> None:
    """In the format that each path's ending says; equal figures give equal bytes."""
    dateless = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    with matplotlib.rc_context(STYLE):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for axes in figure.axes:  # the layout's solver differs in the last bit between processes
            axes.set_position(np.round(axes.get_position().bounds, 5))
        for path in paths:
            ending = path.suffix.removeprefix(".")
            with replacing(path) as temporary:
                figure.savefig(temporary, format=ending, bbox_inches="tight", metadata=dateless.get(ending))


# --- reliability


def reliability_diagram(results: Results, stage: str) -> Figure:
    """Accuracy against confidence of the predicted winner, per arm, over the pairs of all seeds."""
    runs, arms = results.whole_runs(stage), drawn_arms(results.study, stage)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(COLUMN, 0.2 + 1.65 * len(arms)), 2.75), layout="constrained")
        grid = figure.subplots(2, len(arms), sharex=True, sharey="row", squeeze=False, height_ratios=(3.2, 1))
        for (upper, lower), arm in zip(grid.T, arms, strict=True):
            upper.set_title(label_of(arm))
            upper.plot([0.5, 1], [0.5, 1], color=FAINT, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1)
            there = [results[run] for run in runs if run.arm == arm and _has(results[run], *PREDICTED)]
            if there:
                draw_bins(upper, lower, there, colour_of(arm), seeds_mark(len(there), seeds_of(arm, runs)))
            else:
                say_missing(upper)
        first = grid[0, 0]
        first.set(xlim=(0.5, 1), ylim=(min(0.45, first.get_ylim()[0]), 1.02), xticks=[0.5, 0.75, 1])
        first.set_xticklabels(["0.5", "0.75", "1"])
        first.set_ylabel("Accuracy")
        grid[1, 0].set_ylabel("Share of\npairs")
        grid[1, 0].set_ylim(0, None)
        figure.align_ylabels()
        figure.supxlabel("Confidence in the predicted winner", fontsize=8)
        footer(figure, results, runs)
    return figure


def _has(found: Found, *columns: str) -> bool:
    """Whether this was measured of each example."""
    return found.examples is not None and len(found.examples) > 0 and set(columns) <= set(found.examples)


def draw_bins(upper: Axes, lower: Axes, measured: list[Found], colour: str, mark: str) -> None:
    pairs = pd.concat([found.examples[list(PREDICTED)] for found in measured])
    bins = pd.DataFrame(reliability(pairs["probability"], pairs["mean_margin"])).query("count > 0")
    low, high = np.transpose([wilson(p * n, n) for p, n in zip(bins["accuracy"], bins["count"], strict=True)])
    upper.errorbar(
        bins["confidence"], bins["accuracy"], np.stack([bins["accuracy"] - low, high - bins["accuracy"]]).clip(0),
        color=colour, marker="o", markersize=3, linewidth=1, elinewidth=0.8, zorder=3,
    )  # fmt: skip
    lower.bar(
        bins["low"], bins["count"] / len(pairs), bins["high"] - bins["low"],
        align="edge", color=colour, alpha=0.6, edgecolor="white", linewidth=0.4,
    )  # fmt: skip
    known = [found.metrics["ece"] for found in measured if "ece" in found.metrics]
    lines = [f"ECE {np.mean(known):.3f}"] if known else []
    lines += [f"{len(pairs):,} pairs", *([mark.strip(" ()")] if mark else [])]
    upper.text(0.05, 0.97, "\n".join(lines), transform=upper.transAxes, va="top", fontsize=6.5)


# --- interaction


def interaction(results: Results, stage: str) -> Figure:
    """What the second idea changes without the first and with it, as differences to the baseline of the same seed.

    The other ideas are not used. A panel for each metric that the hypotheses are about. Thin lines are the seeds that
    have all four arms, thick ones their means; the open diamond is where both together would be if the two added up.
    """
    study = results.study
    runs = [run for run in results.whole_runs(stage) if run.arm in CORNERS]
    measured = {run: results[run].metrics for run in runs}
    tested = [name for name in STAGES[stage].compared if name in TESTED]
    names = [name for name in tested if any(name in values for values in measured.values())] or tested[:1]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(COLUMN, 0.9 + 1.9 * len(names)), layout="constrained")
        for axes, name in zip(figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0], names, strict=True):
            points = [(run.seed, run.arm, values[name]) for run, values in measured.items() if name in values]
            draw_interaction(axes, pd.DataFrame(points, columns=["seed", "arm", "value"]), len(study.seeds))
            axes.set_ylabel(f"{METRICS[name].words} minus\nthe baseline's")
        axes.set_xticks([0, 1], [f"without {IDEAS[1].label}", f"with {IDEAS[1].label}"])
        axes.set_xlim(-0.25, 1.25)
        figure.align_ylabels()
        handles, texts = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, texts, loc="outside upper center", ncols=3, handlelength=1.8, columnspacing=1.2)
        footer(figure, results, runs)
    return figure


def draw_interaction(axes: Axes, points: pd.DataFrame, n_seeds: int) -> None:
    axes.axhline(0, color=FAINT, linewidth=0.6)
    axes.grid(axis="x", visible=False)
    values = points.pivot(index="seed", columns="arm", values="value").reindex(columns=CORNERS).dropna()
    baseline, first, second, both = two_by_two()
    values = values.sub(values[baseline], axis=0)
    mark = seeds_mark(len(values), n_seeds)
    for label, fixed, dynamic in (
        (f"Without {first.label}", baseline, second),
        (f"With {first.label}{mark}", first, both),
    ):
        colour = colour_of(fixed)
        for _, seed in values.iterrows():
            axes.plot([0, 1], [seed[fixed], seed[dynamic]], color=colour, linewidth=0.5, alpha=0.5)
        mean = values[[fixed, dynamic]].mean()
        axes.plot([0, 1], mean, color=colour, marker="o", markersize=4, linewidth=1.8, label=label)
    added_up = values[first].mean() + values[second].mean()
    diamond = {"marker": "D", "markersize": 5, "markerfacecolor": "white", "zorder": 5}
    axes.plot(1, added_up, color=colour_of(first), linestyle="none", label="if they added up", **diamond)
    if values.empty:
        say_missing(axes)


def two_by_two() -> tuple[Arm, Arm, Arm, Arm]:
    """The arms that use neither, the first, the second and both of the first two ideas."""
    keys = [idea.key for idea in IDEAS[:2]]
    return tuple(Arm.from_states(**dict.fromkeys(used, "used")) for used in ([], keys[:1], keys[1:], keys))


# --- reward by noise


def reward_by_noise(results: Results, stage: str) -> Figure:
    """True reward of the policy's responses minus the reference's to the same prompts, by the prompts' label noise.

    A point is the mean over seeds of the means over prompts, its bar the span from the least to the
    greatest seed. The arms stand side by side at each noise level. Only the world knows both.
    """
    runs = results.whole_runs(stage)
    gains = {run: gain_by_noise(results[run].examples) for run in runs if _has(results[run], *GAINED)}
    drawn = drawn_arms(results.study, stage)
    levels = sorted({level for gain in gains.values() for level in gain.index})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(COLUMN, 2.8), layout="constrained")
        axes = figure.subplots()
        axes.axhline(0, color=FAINT, linewidth=0.6)
        for rank, arm in enumerate(drawn):
            mark = seeds_mark(seeds_of(arm, gains), seeds_of(arm, runs))
            seeds = pd.DataFrame({run.seed: gain for run, gain in gains.items() if run.arm == arm}, index=levels)
            place = np.arange(len(levels)) + 0.14 * (rank - (len(drawn) - 1) / 2)
            mean = seeds.mean(axis=1)
            axes.errorbar(
                place, mean, np.stack([mean - seeds.min(axis=1), seeds.max(axis=1) - mean]),
                color=colour_of(arm), marker="o", markersize=3, linestyle="none", elinewidth=1,
                label=label_of(arm) + mark,
            )  # fmt: skip
        axes.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("Label noise of the prompt's topic")
        axes.set_ylabel("True reward minus\nthe reference's")
        if not gains:
            say_missing(axes)
        figure.legend(loc="outside upper center", ncols=2, handlelength=1.8, columnspacing=1.2)
        footer(figure, results, runs)
    return figure


def gain_by_noise(examples: pd.DataFrame) -> pd.Series:
    """Noise level -> mean true reward gained over the reference."""
    return (examples["true_reward"] - examples["reference_true_reward"]).groupby(examples["noise"]).mean()
