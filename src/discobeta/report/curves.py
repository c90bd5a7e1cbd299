"""How runs went: quantities of their logs over steps, of the arms of a stage.

Idle arms compute what their twins compute, so arms are told apart by what they use; an idle arm is
drawn as a thin dashed line, which lies on its twin's unless something is wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.ticker import MaxNLocator

from discobeta.design.arms import Arm
from discobeta.design.stages import STAGES
from discobeta.design.study import Run
from discobeta.report.marks import End, interval_words, name_ends, seed_lines
from discobeta.report.render import capitalised
from discobeta.report.results import Results
from discobeta.report.style import (
    COLUMN,
    FAINT,
    INK,
    PAGE,
    drawn_arms,
    footer,
    label_of,
    look_of,
    new_figure,
    say_missing,
    seeds_of,
    short_mark,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IDLE = {"color": "#c2185b", "linewidth": 0.7, "linestyle": (0, (1.5, 4)), "zorder": 5}

STARTS_AT_LN_2 = ("sigmoid", "probit")
"""Losses that are ln 2 where policy and reference are one: each answer then wins with probability 1/2."""

MOVES = 0.05
"""The length of responses has a panel where it changes by this share of what it was in the first update."""


@dataclass
class Panel:
    """What is drawn over steps in one axes, a line for each arm."""

    label: str  # of the vertical axis
    lines: dict[Arm, pd.DataFrame]  # a row per step, a column per seed
    marks: int | None = None  # as of `seed_lines`
    zero: bool = False  # whether it shows differences
    limit: tuple[str, float] | None = None  # name and height of a line that is the best possible

    @property
    def is_empty(self) -> bool:
        return all(values.empty for values in self.lines.values())

    def __sub__(self, other: Arm) -> dict[Arm, pd.DataFrame]:
        """The lines of the other arms minus this one's, of the same seed."""
        least = self.lines.get(other, pd.DataFrame())
        return {
            arm: (values - least.reindex_like(values)).dropna(axis=1)
            for arm, values in self.lines.items()
            if arm.twin != other.twin
        }


@dataclass
class Course:
    """The logs of a stage, and how they are drawn."""

    results: Results
    stage: str
    runs: list[Run] = field(init=False)
    logs: dict[Run, pd.DataFrame] = field(init=False)
    arms: list[Arm] = field(init=False)
    drawn: list[Arm] = field(init=False)

    def __post_init__(self) -> None:
        self.runs = self.results.whole_runs(self.stage)
        self.logs = {run: self.results[run].log for run in self.runs if self.results.counts(run)}
        self.drawn = drawn_arms(self.results.study, self.stage)
        self.arms = sorted(self.results.study.arms_of(self.stage), key=self.drawn.__contains__, reverse=True)

    def has(self, name: str) -> bool:
        return any(name in log for log in self.logs.values())

    def panel(self, name: str, label: str, start: float | None = None, **options) -> Panel:
        """A logged quantity. start: what it is at step 0, where that is known and not logged."""
        lines = {arm: by_seed(self.logs, self.runs, arm, name) for arm in self.arms}
        if start is not None:
            for arm, values in lines.items():
                if len(values) and 0 not in values.index:
                    first = pd.DataFrame(start, index=[0], columns=values.columns)
                    lines[arm] = pd.concat([first, values])
        return Panel(label, lines, **options)

    def metric(self, name: str) -> float | None:
        """Mean over runs of what is the same in every arm; None where nobody knows it."""
        found = [self.results[run].metrics[name] for run in self.runs if name in self.results[run].metrics]
        return math.fsum(found) / len(found) if found else None

    def draw(self, rows: list[list[Panel | None]], x_label: str, height: float, first: int) -> Figure:
        """A figure of panels, side by side over the same steps, which begin at `first`."""
        columns = max(map(len, rows))
        with new_figure(PAGE if columns > 1 else COLUMN, 0.45 + height * len(rows)) as figure:
            figure.get_layout_engine().set(hspace=0.05, h_pad=0.05)
            grid = figure.subplots(len(rows), columns, sharex=True, squeeze=False)
            ends = {}
            for of_row, panels in zip(grid, rows, strict=True):
                for axes, panel in zip(of_row, panels, strict=True):
                    if panel is None:
                        axes.remove()
                    else:
                        ends[axes] = self.draw_panel(axes, panel)
                        label_steps(axes, x_label, first)
            figure.align_ylabels()
            name_ends(figure, ends)
            seeds = [values.shape[1] for row in rows for panel in row if panel for values in panel.lines.values()]
            words = [interval_words(seeds, lines=True)]
            if any("/" in name for names in ends.values() for *_, name, _ in names):
                words.append("(n/N): n of N seeds")
            if any(run.arm not in self.drawn for run in self.runs):
                words.append("thin dots: with an idle head, on the line of the arm without it")
            text = "; ".join(filter(None, words))
            footer(figure, self.results, self.runs, f"{capitalised(text)}." if text else "")
        return figure

    def draw_panel(self, axes: Axes, panel: Panel) -> list[End]:
        ends = []
        if panel.zero:
            axes.axhline(0, color=FAINT, linewidth=0.6)
        if panel.limit:
            name, height = panel.limit
            axes.axhline(height, color=INK, linewidth=0.8, linestyle=(0, (6, 2)))
        for arm, values in panel.lines.items():
            values = values.dropna(axis=1)
            if values.empty:
                continue
            if arm not in self.drawn:
                axes.plot(values.index, values.mean(axis=1), **IDLE)
                continue
            look = look_of(arm)
            seed_lines(axes, values, look, marks=panel.marks)
            mark = short_mark(values.shape[1], seeds_of(arm, self.runs))
            ends.append((values.index[-1], values.iloc[-1].mean(), label_of(arm) + mark, look.colour))
        if panel.is_empty:
            say_missing(axes)
        elif panel.limit:
            ends.append((axes.get_xlim()[1], height, name, INK))
        axes.set_ylabel(panel.label)
        return ends


# --- pairs


def loss_curves(results: Results, stage: str) -> Figure:
    """Held-out loss, the same minus the baseline's of the same seed, held-out accuracy, and training loss over steps.

    Lines, bands and single seeds as in `marks`. Where nothing held-out is logged, the training loss and its difference.
    A policy begins at ln 2 and 1/2 by construction; the oracle's NLL and the Bayes accuracy are drawn where known.
    """
    course = Course(results, stage)
    train = course.panel("loss", "Training loss\n(nats per pair)\n↓ better", marks=8)
    oracle = course.metric("oracle_nll")
    if not course.has("eval_loss"):
        train.limit = oracle and ("oracle,\nheld-out", oracle)
        rows = [[train, _less_baseline(train, "Training loss minus")]]
        return course.draw(rows, "Optimiser step", 2.0, 0)
    start = _start(results, stage)
    loss = course.panel("eval_loss", "Held-out loss\n(nats per pair)\n↓ better", start)
    loss.limit = oracle and ("oracle", oracle)
    accuracy = course.panel("eval_accuracy", "Held-out accuracy\n(share of pairs)\n↑ better", start and 0.5)
    bayes = course.metric("bayes_accuracy")
    accuracy.limit = bayes and ("Bayes limit", bayes)
    rows = [[loss, _less_baseline(loss, "Held-out loss minus")], [train, accuracy]]
    return course.draw(rows, "Optimiser step", 1.75, 0)


def _less_baseline(panel: Panel, words: str) -> Panel:
    label = f"{words}\nthe baseline's\n(nats per pair), ↓ better"
    return Panel(label, panel - Arm(), panel.marks, zero=True)


def _start(results: Results, stage: str) -> float | None:
    """The held-out loss before the first step, where no run is needed to know it."""
    runs = results.whole_runs(stage)
    losses = {results.study.config(run).pref_loss for run in runs}
    return math.log(2) if STAGES[stage].reference_pass and losses <= set(STARTS_AT_LN_2) else None


# --- prompts


def rollout_curves(results: Results, stage: str) -> Figure:
    """Score by the own reward model and KL of the sampled responses over updates, and both as paired differences.

    Left: the score gained since the first update, and the KL. Right: minus the arm with the same reward model that
    uses the least (of the KL: the baseline), of the same seed. Reward models with and without a used Disco Head score
    in different units: each kind has its row. Length has a row only where it moves (`MOVES`).
    """
    course = Course(results, stage)
    score = course.panel("reward", "", marks=8)
    score.lines = {arm: values - values.iloc[0] if len(values) else values for arm, values in score.lines.items()}
    by_judge: dict[Arm, list[Arm]] = {}
    for arm in course.arms:
        by_judge.setdefault(arm.trained_as(STAGES[stage].judge.stage).twin, []).append(arm)
    rows: list[list[Panel | None]] = []
    for judge in sorted(by_judge, key=lambda arm: len(arm.used)):
        whose = f" of {judge.label}" if len(by_judge) > 1 else ""
        label = f"Score by the reward\nmodel{whose}\n(since update 1) ↑"
        panel = Panel(label, {arm: score.lines[arm] for arm in by_judge[judge]}, 8)
        rows.append(_beside(panel, "Score", "its reward model's unit"))
    kl = course.panel("kl_per_sequence", "KL to reference\n(nats per response)", marks=8)
    rows.append(_beside(kl, "KL", "nats per response"))
    length = course.panel("response_length", "Tokens per response", marks=8)
    if any(_moves(values) for values in length.lines.values()):
        rows.append(_beside(length, "Tokens", "per response"))
    if all(panel is None for _, panel in rows):
        rows = [[panel] for panel, _ in rows]
    return course.draw(rows, "Update", 1.45, 1)


def _beside(panel: Panel, words: str, unit: str) -> list[Panel | None]:
    """The panel, and what its arms differ by from the one that uses the least; None where it is alone."""
    least = min((arm for arm in panel.lines if not arm.is_idle), key=lambda arm: len(arm.used), default=None)
    if least is None or not any(arm.twin != least for arm in panel.lines):
        return [panel, None]
    whose = "the baseline's" if least == Arm() else f"that of {least.label}"
    return [panel, Panel(f"{words} minus\n{whose}\n({unit})", panel - least, 8, zero=True)]


def _moves(values: pd.DataFrame) -> bool:
    mean = values.mean(axis=1)
    return len(mean) > 0 and (mean - mean.iloc[0]).abs().max() > MOVES * abs(mean.iloc[0])


# --- both


def by_seed(logs: dict[Run, pd.DataFrame], runs: list[Run], arm: Arm, name: str) -> pd.DataFrame:
    """One logged quantity: a row per step that every finished run of the arm has, a column per seed."""
    columns = {
        run.seed: logs[run].set_index("step")[name].dropna()
        for run in runs
        if run.arm == arm and run in logs and name in logs[run]
    }
    return pd.concat(columns, axis=1, join="inner") if columns else pd.DataFrame()


def label_steps(axes: Axes, label: str, first: int = 1) -> None:
    """Whole numbers from `first` on, which has a tick of its own."""
    axes.set_xlabel(label)
    axes.xaxis.set_tick_params(labelbottom=True)
    axes.margins(x=0.03)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    low, high = axes.dataLim.intervalx
    if math.isfinite(low) and high > first:
        ticks = [tick for tick in MaxNLocator(nbins=6, integer=True).tick_values(first, high) if first < tick <= high]
        axes.set_xticks([first, *(tick for tick in ticks if tick - first > 0.6 * (ticks[-1] - first) / len(ticks))])
        axes.set_xlim(first - 0.03 * (high - first), high + 0.03 * (high - first))
