"""The files of a study's figures, and what they draw of finished runs; how runs went is in `curves`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.transforms import Bbox

from discobeta.design.arms import CORNERS, IDEAS, Arm
from discobeta.design.stages import STAGES
from discobeta.files import replacing
from discobeta.folders import claim
from discobeta.metrics import reliability
from discobeta.report import outputs
from discobeta.report.marks import End, interval_words, name_ends, seed_points
from discobeta.report.measures import GAINED, PREDICTED, TESTED
from discobeta.report.results import Found, Results
from discobeta.report.statistics import wilson
from discobeta.report.style import (
    COLUMN,
    FAINT,
    INK,
    STYLE,
    Look,
    axis_words,
    drawn_arms,
    footer,
    label_of,
    look_of,
    new_figure,
    say_missing,
    seeds_mark,
    seeds_of,
    source_line,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MARGIN = 0.03  # inches, around what is drawn


def write(results: Results) -> None:
    """The figures that `outputs` names, into `study.directory`/figures."""
    study = results.study
    directory = study.figures_directory
    figures = outputs.figures(study)
    claim(directory, "discobeta figures", [name for output in figures for name in output.files])
    for output in figures:
        save(output.make(results), [directory / name for name in output.files])


def save(figure: Figure, paths: list[Path]) -> None:
    """In the format that each path's ending says, with what made it in the metadata; equal figures give equal bytes."""
    with matplotlib.rc_context(STYLE):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for axes in figure.axes:  # the layout's solver differs in the last bit between processes
            axes.set_position(np.round(axes.get_position().bounds, 5))
        drawn = figure.get_tightbbox().padded(MARGIN)
        crop = Bbox(np.round(drawn.get_points(), 3))
        for path in paths:
            ending = path.suffix.removeprefix(".")
            with replacing(path) as temporary:
                figure.savefig(temporary, format=ending, bbox_inches=crop, metadata=metadata(figure, path))


def metadata(figure: Figure, path: Path) -> dict[str, Any]:
    """What the file says of itself: its name and what made it (study, seeds, digest of the config, commit, …).

    In a PNG each is a field of its own; PDF and SVG have fields for a title, a description and keywords only. No date.
    """
    made_by = getattr(figure, "made_by", {})
    line, words = source_line(made_by), [f"{key}={value}" for key, value in made_by.items()]
    return {
        "png": {"Title": path.stem, "Description": line, **made_by},
        "pdf": {"Title": path.stem, "Subject": line, "Keywords": "; ".join(words), "CreationDate": None},
        "svg": {"Title": path.stem, "Description": line, "Keywords": words, "Date": None},
    }.get(path.suffix.removeprefix("."), {})


# --- reliability


def reliability_diagram(results: Results, stage: str) -> Figure:
    """Accuracy against confidence of the predicted winner, per arm, over the pairs of all seeds."""
    runs, arms = results.whole_runs(stage), drawn_arms(results.study, stage)
    with new_figure(max(COLUMN, 0.2 + 1.65 * len(arms)), 2.75) as figure:
        grid = figure.subplots(2, len(arms), sharex=True, sharey="row", squeeze=False, height_ratios=(3.2, 1))
        for (upper, lower), arm in zip(grid.T, arms, strict=True):
            upper.set_title(label_of(arm))
            upper.plot([0.5, 1], [0.5, 1], color=FAINT, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1)
            there = [results[run] for run in runs if run.arm == arm and _has(results[run], *PREDICTED)]
            if there:
                draw_bins(upper, lower, there, look_of(arm), seeds_mark(len(there), seeds_of(arm, runs)))
            else:
                say_missing(upper)
        first = grid[0, 0]
        first.set(xlim=(0.5, 1), ylim=(min(0.45, first.get_ylim()[0]), 1.02), xticks=[0.5, 0.75, 1])
        first.set_xticklabels(["0.5", "0.75", "1"])
        first.set_ylabel("Accuracy\n(share of pairs)")
        grid[1, 0].set_ylabel("Share of\npairs")
        grid[1, 0].set_ylim(0, None)
        figure.align_ylabels()
        figure.supxlabel("Confidence in the predicted winner, max(p, 1 − p)", fontsize=7.5)
        note = "Dashed: calibrated (below: overconfident). Bars: 95 % Wilson intervals of the pairs of all seeds."
        footer(figure, results, runs, note)
    return figure


def _has(found: Found, *columns: str) -> bool:
    """Whether this was measured of each example."""
    return found.examples is not None and len(found.examples) > 0 and set(columns) <= set(found.examples)


def draw_bins(upper: Axes, lower: Axes, measured: list[Found], look: Look, mark: str) -> None:
    pairs = pd.concat([found.examples[list(PREDICTED)] for found in measured])
    bins = pd.DataFrame(reliability(pairs["probability"], pairs["mean_margin"])).query("count > 0")
    low, high = np.transpose([wilson(p * n, n) for p, n in zip(bins["accuracy"], bins["count"], strict=True)])
    upper.errorbar(
        bins["confidence"], bins["accuracy"], np.stack([bins["accuracy"] - low, high - bins["accuracy"]]).clip(0),
        color=look.colour, marker=look.marker, markersize=3.5, linewidth=1, elinewidth=0.8, zorder=3,
    )  # fmt: skip
    lower.bar(
        bins["low"], bins["count"] / len(pairs), bins["high"] - bins["low"],
        align="edge", color=look.colour, alpha=0.6, edgecolor="white", linewidth=0.4,
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
    with new_figure(COLUMN, 0.6 + 1.9 * len(names)) as figure:
        grid = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
        grid[-1].set_xticks([0, 1], [f"without {IDEAS[1].label}", f"with {IDEAS[1].label}"])
        grid[-1].set_xlim(-0.15, 1.1)
        ends = {}
        for axes, name in zip(grid, names, strict=True):
            points = [(run.seed, run.arm, values[name]) for run, values in measured.items() if name in values]
            frame = pd.DataFrame(points, columns=["seed", "arm", "value"])
            ends[axes] = draw_interaction(axes, frame, len(study.seeds))
            axes.set_ylabel(axis_words(name, "minus the baseline's"))
        figure.align_ylabels()
        name_ends(figure, ends)
        note = "Thin lines: single seeds, minus the baseline of the same seed; thick: their means."
        footer(figure, results, runs, note if any(ends.values()) else "")
    return figure


def draw_interaction(axes: Axes, points: pd.DataFrame, n_seeds: int) -> list[End]:
    axes.axhline(0, color=FAINT, linewidth=0.6)
    axes.grid(axis="x", visible=False)
    values = points.pivot(index="seed", columns="arm", values="value").reindex(columns=CORNERS).dropna()
    if values.empty:
        say_missing(axes)
        return []
    baseline, first, second, both = two_by_two()
    values, mark, ends = values.sub(values[baseline], axis=0), seeds_mark(len(values), n_seeds), []
    for label, fixed, dynamic in (
        (f"without {first.label}", baseline, second),
        (f"with {first.label}{mark}", first, both),
    ):
        look, mean = look_of(fixed), values[[fixed, dynamic]].mean()
        for _, seed in values.iterrows():
            axes.plot([0, 1], [seed[fixed], seed[dynamic]], **look.of_line, linewidth=0.5, alpha=0.6)
        axes.plot([0, 1], mean, **look.of_line, marker=look.marker, markersize=5, linewidth=1.8)
        ends.append((1, mean.iloc[1], label, look.colour))
    added_up = values[first].mean() + values[second].mean()
    axes.plot(1, added_up, color=INK, linestyle="none", marker="D", markersize=5, markerfacecolor="white", zorder=5)
    return [*ends, (1, added_up, "if they added up", INK)]


def two_by_two() -> tuple[Arm, Arm, Arm, Arm]:
    """The arms that use neither, the first, the second and both of the first two ideas."""
    keys = [idea.key for idea in IDEAS[:2]]
    return tuple(Arm.from_states(**dict.fromkeys(used, "used")) for used in ([], keys[:1], keys[1:], keys))


# --- reward by noise


def reward_by_noise(results: Results, stage: str) -> Figure:
    """True reward of the policy's responses by the label noise of the prompts: what was gained over the reference, and
    the same minus the baseline's of the same seed.

    The seeds' numbers are means over the same prompts. Above, means over seeds; below, a dot for each seed and the
    mean with its interval (`marks`). The arms stand side by side at each noise level. Only the world knows both.
    """
    runs = results.whole_runs(stage)
    gains = {run: gain_by_noise(results[run].examples) for run in runs if _has(results[run], *GAINED)}
    drawn = drawn_arms(results.study, stage)
    by_arm = {
        arm: pd.DataFrame({run.seed: gain for run, gain in gains.items() if run.arm == arm}).sort_index()
        for arm in drawn
    }
    levels = sorted({level for gain in gains.values() for level in gain.index})
    with new_figure(COLUMN, 3.5) as figure:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.5))
        below.axhline(0, color=FAINT, linewidth=0.6)
        least, counts = by_arm.get(Arm(), pd.DataFrame()), []
        others = [arm for arm in drawn if arm != Arm()]
        for arm, seeds in by_arm.items():
            look, mark = look_of(arm), seeds_mark(seeds_of(arm, gains), seeds_of(arm, runs))
            above.plot([levels.index(level) for level in seeds.index], seeds.mean(axis=1), **look.of_line,
                       marker=look.marker, markersize=3.5, linewidth=0.8, label=label_of(arm) + mark)  # fmt: skip
            paired = (seeds - least.reindex_like(seeds)).dropna(axis=1, how="all")
            for level, values in paired.iterrows() if arm in others else ():
                place = levels.index(level) + 0.24 * (others.index(arm) - (len(others) - 1) / 2)
                seed_points(below, place, values.dropna().tolist(), look, width=0.07)
                counts.append(values.count())
        below.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
        below.grid(axis="x", visible=False)
        below.set_xlabel("Label noise of the prompt's topic (s.d., units of r*)")
        above.set_ylabel("True reward (r*)\nminus the reference's\n↑ better")
        below.set_ylabel("True reward (r*)\nminus the baseline's\n↑ better")
        if not gains:
            say_missing(above)
        if not counts:
            say_missing(below)
        figure.align_ylabels()
        figure.legend(loc="outside upper center", ncols=2, handlelength=2.4, columnspacing=1.2)
        words = interval_words(counts, lines=False)
        footer(figure, results, runs, f"Above: means over seeds. Below: {words}." if words else "")
    return figure


def gain_by_noise(examples: pd.DataFrame) -> pd.Series:
    """Noise level -> mean true reward gained over the reference."""
    return (examples["true_reward"] - examples["reference_true_reward"]).groupby(examples["noise"]).mean()
