"""The figures of a study: learning curves, reliability, interaction, reward by noise, as PDF, SVG and PNG.

Idle arms compute what their twins compute, so arms are told apart by what they use; an idle arm is
drawn as a thin dashed line, which lies on its twin's unless something is wrong.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from discobeta.design.arms import CORNERS, IDEAS, Arm
from discobeta.design.stages import STAGES
from discobeta.design.study import Run, Study
from discobeta.files import replacing
from discobeta.metrics import reliability
from discobeta.record import claim
from discobeta.report.collect import Found, Results, provenance_line, read_log
from discobeta.report.measures import METRICS, TESTED
from discobeta.report.render import printable
from discobeta.report.statistics import wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#4d4d4d", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
"""Of the arms without idle heads (Okabe and Ito's, told apart by colour-blind readers)."""

COLUMN = 3.4  # inches, one column of a two-column paper
FORMATS = ("pdf", "svg", "png")
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
IDLE = {"color": "black", "linewidth": 0.7, "linestyle": (0, (1.5, 4)), "zorder": 4}


def write(results: Results) -> None:
    """The figures of every stage (`study.figures_of`), into `study.directory`/figures."""
    study = results.study
    draw = {
        "learning-curves": learning_curves,
        "reliability": reliability_diagram,
        "interaction": interaction,
        "reward-by-noise": reward_by_noise,
    }
    directory = study.directory / "figures"
    figures = {f"{name}-{stage}": (draw[name], stage) for stage in study.stages for name in study.figures_of(stage)}
    claim(directory, "discobeta figures", [f"{stem}.{ending}" for stem in figures for ending in FORMATS])
    for stem, (draw_figure, stage) in figures.items():
        save(draw_figure(results, stage), directory / stem)


def save(figure: Figure, stem: Path) -> None:
    """`stem`.pdf, .svg and .png; equal figures give equal bytes."""
    dateless = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    with matplotlib.rc_context(STYLE):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for axes in figure.axes:  # the layout's solver differs in the last bit between processes
            axes.set_position(np.round(axes.get_position().bounds, 5))
        for ending in FORMATS:
            with replacing(stem.with_name(f"{stem.name}.{ending}")) as temporary:
                figure.savefig(temporary, format=ending, bbox_inches="tight", metadata=dateless.get(ending))


# --- learning curves


def learning_curves(results: Results, stage: str) -> Figure:
    """How the runs of a stage went: `loss_curves`, or `rollout_curves` of ppo."""
    return loss_curves(results, stage) if STAGES[stage].has_pairs else rollout_curves(results, stage)


def loss_curves(results: Results, stage: str) -> Figure:
    """Loss, loss minus the baseline's of the same seed, and accuracy over steps.

    Lines are means over seeds, bands reach from the least to the greatest seed. Held-out where the
    runs have logged it, else training.
    """
    study, (runs, logs) = results.study, runs_and_logs(results, stage)
    held_out = any("eval_loss" in log for log in logs.values())
    prefix, kind = ("eval_", "Held-out") if held_out else ("", "Training")
    arms, drawn = study.arms_of(stage), drawn_arms(study, stage)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(COLUMN, 5), layout="constrained")
        top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(1.2, 1, 1))
        middle.axhline(0, color=FAINT, linewidth=0.6)
        baseline = by_seed(logs, runs, Arm(), f"{prefix}loss")
        for arm in sorted(arms, key=drawn.__contains__, reverse=True):
            colour, style = line_look(arm, drawn)
            loss = by_seed(logs, runs, arm, f"{prefix}loss")
            curve(top, loss, colour, **style)
            curve(middle, loss - baseline.reindex_like(loss) if arm != Arm() else loss[[]], colour, **style)
            curve(bottom, by_seed(logs, runs, arm, f"{prefix}accuracy"), colour, **style)
            if held_out and arm in drawn:
                curve(top, by_seed(logs, runs, arm, "loss"), colour, band=False, linewidth=0.6, alpha=0.4)
        name_arms(top, drawn, logs, runs, with_idle=len(drawn) < len(arms))
        if held_out:
            top.plot([], [], color=FAINT, linewidth=0.6, label="training loss")
        top.set_ylabel(f"{kind} loss\n(nats)")
        middle.set_ylabel("Loss minus\nbaseline's (nats)")
        bottom.set_ylabel(f"{kind}\naccuracy")
        bottom.set_xlabel("Optimiser step")
        if not logs:
            say_missing(top)
        figure.align_ylabels()
        figure.legend(loc="outside upper center", ncols=2, handlelength=1.8, columnspacing=1.2)
        footer(figure, results, runs)
    return figure


ROLLOUTS = {
    "reward": "Score by the\nreward model",
    "kl_per_sequence": "KL to reference\n(nats per response)",
    "response_length": "Tokens per\nresponse",
}
"""What ppo logs of the responses of an update -> the label of its panel."""


def rollout_curves(results: Results, stage: str) -> Figure:
    """Reward-model score, KL and length of the sampled responses over updates; lines and bands as in `loss_curves`.

    Reward models with and without a used Disco Head score in different units: each kind has its panel.
    """
    study, (runs, logs) = results.study, runs_and_logs(results, stage)
    arms, drawn = study.arms_of(stage), drawn_arms(study, stage)
    arms = sorted(arms, key=drawn.__contains__, reverse=True)
    panels = [(name, label, arms) for name, label in ROLLOUTS.items()]
    by_judge: dict[Arm, list[Arm]] = {}
    for arm in arms:
        by_judge.setdefault(arm.trained_as(STAGES[stage].judge.stage).twin, []).append(arm)
    if len(by_judge) > 1:
        panels[:1] = [
            ("reward", f"Score by reward\nmodel, {judge.label}", by_judge[judge])
            for judge in CORNERS
            if judge in by_judge
        ]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(COLUMN, 1 + 1.3 * len(panels)), layout="constrained")
        rows = figure.subplots(len(panels), 1, sharex=True)
        for axes, (name, label, shown) in zip(rows, panels, strict=True):
            for arm in shown:
                colour, style = line_look(arm, drawn)
                curve(axes, by_seed(logs, runs, arm, name), colour, **style)
            axes.set_ylabel(label)
        name_arms(rows[0], drawn, logs, runs, with_idle=len(drawn) < len(arms))
        label_updates(rows[-1])
        if not logs:
            say_missing(rows[0])
        figure.align_ylabels()
        figure.legend(loc="outside upper center", ncols=2, handlelength=1.8, columnspacing=1.2)
        footer(figure, results, runs)
    return figure


def label_updates(axes: Axes) -> None:
    axes.set_xlabel("Update")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def runs_and_logs(results: Results, stage: str) -> tuple[list[Run], dict[Run, pd.DataFrame]]:
    """The whole runs of a stage, and the logs of those that count."""
    runs = [run for run in results.study.runs() if run.stage == stage and not run.proof]
    return runs, {run: results[run].log for run in runs if results.counts(run)}


def line_look(arm: Arm, drawn: list[Arm]) -> tuple[str, dict]:
    """Colour and style of an arm's curve: an idle arm that lies on its twin has no colour and band of its own."""
    return look(arm)[1], {"band": True} if arm in drawn else {"band": False, **IDLE}


def name_arms(axes: Axes, drawn: list[Arm], logs: dict[Run, pd.DataFrame], runs: list[Run], *, with_idle: bool) -> None:
    """Entries of the legend: the arms, with the number of their seeds where some are missing."""
    for arm in drawn:
        label, colour = look(arm)
        there, expected = (sum(run.arm == arm for run in of) for of in (logs, runs))
        axes.plot([], [], color=colour, label=label + seeds_mark(there, expected))
    if with_idle:
        axes.plot([], [], label="with an idle head", **IDLE)


def by_seed(logs: dict[Run, pd.DataFrame], runs: list[Run], arm: Arm, name: str) -> pd.DataFrame:
    """One logged quantity: a row per step that every finished run of the arm has, a column per seed."""
    columns = {
        run.seed: logs[run].set_index("step")[name].dropna()
        for run in runs
        if run.arm == arm and run in logs and name in logs[run]
    }
    return pd.concat(columns, axis=1, join="inner") if columns else pd.DataFrame()


def curve(axes: Axes, values: pd.DataFrame, colour: str, *, band: bool, **style) -> None:
    """Mean over the columns, which are seeds, and the span from the least to the greatest."""
    values = values.dropna(axis=1)
    if values.empty:
        return
    axes.plot(values.index, values.mean(axis=1), **{"color": colour, **style})
    if band and values.shape[1] > 1:
        axes.fill_between(values.index, values.min(axis=1), values.max(axis=1), color=colour, alpha=0.15, linewidth=0)


def loss_curve(log_path: str | Path, png_path: str | Path) -> None:
    """How one run went: its loss over steps, training and, if there is one, held-out; of ppo, reward and KL."""
    log = read_log(Path(log_path))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.5, 2.8), layout="constrained")
        if {"reward", "kl_per_sequence"} <= set(log):
            _draw_rollouts(figure, log)
        else:
            _draw_loss(figure, log)
        with replacing(png_path) as temporary:
            figure.savefig(temporary, format="png", dpi=200)


def _draw_rollouts(figure: Figure, log: pd.DataFrame) -> None:
    panels = figure.subplots(2, 1, sharex=True)
    for axes, name, colour in zip(panels, ("reward", "kl_per_sequence"), ("#0072B2", "#D55E00"), strict=True):
        _draw_column(axes, log, name, color=colour)
        axes.set_ylabel(ROLLOUTS[name])
    label_updates(panels[-1])
    figure.align_ylabels()


def _draw_loss(figure: Figure, log: pd.DataFrame) -> None:
    axes = figure.subplots()
    for name, label, colour in (("loss", "training", "#0072B2"), ("eval_loss", "held-out", "#D55E00")):
        if name in log:
            _draw_column(axes, log, name, color=colour, label=label)
    axes.set(xlabel="Optimiser step", ylabel="Loss (nats)")
    if axes.lines:
        figure.legend(loc="outside upper right", ncols=2)


def _draw_column(axes: Axes, log: pd.DataFrame, name: str, **look) -> None:
    values = log[["step", name]].dropna()
    axes.plot(values["step"], values[name], marker="o" if len(values) < 20 else None, markersize=3, **look)


# --- reliability


def reliability_diagram(results: Results, stage: str) -> Figure:
    """Accuracy against confidence of the predicted winner, per arm, over the pairs of all seeds."""
    study = results.study
    runs = [run for run in study.runs() if run.stage == stage and not run.proof]
    arms = drawn_arms(study, stage)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(COLUMN, 0.2 + 1.65 * len(arms)), 2.75), layout="constrained")
        grid = figure.subplots(2, len(arms), sharex=True, sharey="row", squeeze=False, height_ratios=(3.2, 1))
        for (upper, lower), arm in zip(grid.T, arms, strict=True):
            label, colour = look(arm)
            upper.set_title(label)
            upper.plot([0.5, 1], [0.5, 1], color=FAINT, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1)
            there = [results[run] for run in runs if run.arm == arm and _has(results[run], *PAIRS)]
            if there:
                mark = seeds_mark(len(there), sum(run.arm == arm for run in runs))
                draw_bins(upper, lower, there, colour, mark)
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


PAIRS = ("probability", "mean_margin")


def _has(found: Found, *columns: str) -> bool:
    """Whether this was measured of each example."""
    return found.examples is not None and len(found.examples) > 0 and set(columns) <= set(found.examples)


def draw_bins(upper: Axes, lower: Axes, measured: list[Found], colour: str, mark: str) -> None:
    pairs = pd.concat([found.examples[list(PAIRS)] for found in measured])
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
    runs = [run for run in study.runs() if run.stage == stage and run.arm in CORNERS and not run.proof]
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
        colour = look(fixed)[1]
        for _, seed in values.iterrows():
            axes.plot([0, 1], [seed[fixed], seed[dynamic]], color=colour, linewidth=0.5, alpha=0.5)
        mean = values[[fixed, dynamic]].mean()
        axes.plot([0, 1], mean, color=colour, marker="o", markersize=4, linewidth=1.8, label=label)
    added_up = values[first].mean() + values[second].mean()
    diamond = {"marker": "D", "markersize": 5, "markerfacecolor": "white", "zorder": 5}
    axes.plot(1, added_up, color=look(first)[1], linestyle="none", label="if they added up", **diamond)
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
    study = results.study
    runs = [run for run in study.runs() if run.stage == stage and not run.proof]
    gains = {run: gain_by_noise(results[run].examples) for run in runs if _has(results[run], *GAIN)}
    drawn = drawn_arms(study, stage)
    levels = sorted({level for gain in gains.values() for level in gain.index})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(COLUMN, 2.8), layout="constrained")
        axes = figure.subplots()
        axes.axhline(0, color=FAINT, linewidth=0.6)
        for number, arm in enumerate(drawn):
            label, colour = look(arm)
            there, expected = (sum(run.arm == arm for run in of) for of in (gains, runs))
            seeds = pd.DataFrame({run.seed: gain for run, gain in gains.items() if run.arm == arm}, index=levels)
            place = np.arange(len(levels)) + 0.14 * (number - (len(drawn) - 1) / 2)
            mean = seeds.mean(axis=1)
            axes.errorbar(
                place, mean, np.stack([mean - seeds.min(axis=1), seeds.max(axis=1) - mean]),
                color=colour, marker="o", markersize=3, linestyle="none", elinewidth=1,
                label=label + seeds_mark(there, expected),
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


GAIN = ("true_reward", "reference_true_reward", "noise")


def gain_by_noise(examples: pd.DataFrame) -> pd.Series:
    """Noise level -> mean true reward gained over the reference."""
    return (examples["true_reward"] - examples["reference_true_reward"]).groupby(examples["noise"]).mean()


# --- what all figures share


def drawn_arms(study: Study, stage: str) -> list[Arm]:
    """The arms without idle heads, and those with one whose twin the study does not train."""
    arms = study.arms_of(stage)
    return [arm for arm in arms if not arm.is_idle or arm.twin not in arms]


def look(arm: Arm) -> tuple[str, str]:
    colour = COLOURS[CORNERS.index(arm.twin) % len(COLOURS)]
    label = arm.label[0].upper() + arm.label[1:]
    return (f"{label}, idle head" if arm.is_idle else label), colour


def say_missing(axes: Axes) -> None:
    box = {"facecolor": "white", "edgecolor": "none"}
    axes.text(0.5, 0.5, "missing", transform=axes.transAxes, ha="center", va="center", color=FAINT, bbox=box)


def seeds_mark(there: int, expected: int) -> str:
    return "" if there == expected else f" ({there} of {expected} seeds)"


def footer(figure: Figure, results: Results, runs: list[Run]) -> None:
    """What made the figure and what is not in it, below it: `save` crops to what is drawn."""
    missing = results.describe_missing(runs)
    text = provenance_line(results) + (f" Missing: {missing}." if missing else "")
    lines = textwrap.wrap(printable(text), width=int(33 * figure.get_figwidth()))
    # what came with a run is no formula, whatever dollars are in it
    figure.text(0.01, -0.02, "\n".join(lines), fontsize=4.5, color=FAINT, va="top", parse_math=False)
