"""How runs went: quantities of their logs over steps, of the arms of a stage or of one run.

Idle arms compute what their twins compute, so arms are told apart by what they use; an idle arm is
drawn as a thin dashed line, which lies on its twin's unless something is wrong.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from discobeta.design.arms import CORNERS, Arm
from discobeta.design.stages import STAGES
from discobeta.design.study import Run
from discobeta.files import replacing
from discobeta.report.results import Results, read_log
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

IDLE = {"color": "black", "linewidth": 0.7, "linestyle": (0, (1.5, 4)), "zorder": 4}


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
        name_arms(top, drawn, logs, runs)
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
        name_arms(rows[0], drawn, logs, runs)
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
    runs = results.whole_runs(stage)
    return runs, {run: results[run].log for run in runs if results.counts(run)}


def line_look(arm: Arm, drawn: list[Arm]) -> tuple[str, dict]:
    """Colour and style of an arm's curve: an idle arm that lies on its twin has no colour and band of its own."""
    return colour_of(arm), {"band": True} if arm in drawn else {"band": False, **IDLE}


def name_arms(axes: Axes, drawn: list[Arm], logs: dict[Run, pd.DataFrame], runs: list[Run]) -> None:
    """Entries of the legend: the arms, with the number of their seeds where some are missing. runs: the whole ones."""
    for arm in drawn:
        mark = seeds_mark(seeds_of(arm, logs), seeds_of(arm, runs))
        axes.plot([], [], color=colour_of(arm), label=label_of(arm) + mark)
    if any(run.arm not in drawn for run in runs):  # where idle arms are proved, none of them has a curve
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


def _draw_column(axes: Axes, log: pd.DataFrame, name: str, **style) -> None:
    values = log[["step", name]].dropna()
    axes.plot(values["step"], values[name], marker="o" if len(values) < 20 else None, markersize=3, **style)
