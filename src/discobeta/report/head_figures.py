"""What the used heads have learned, beside what is true: σ of responses, and s of prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from discobeta.design.arms import IDEAS, Arm
from discobeta.design.study import Run
from discobeta.report.marks import interval_words, seed_points
from discobeta.report.measures import SCALES, SIGMAS
from discobeta.report.render import capitalised
from discobeta.report.results import Found, Results
from discobeta.report.statistics import INTERVAL_FROM, mean_ci
from discobeta.report.style import (
    COLUMN,
    FAINT,
    INK,
    LOOKS,
    Look,
    drawn_arms,
    footer,
    label_of,
    look_of,
    new_figure,
    say_missing,
    seeds_mark,
    seeds_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIGMA0 = 2 / np.sqrt(np.pi)
"""What a fresh Disco Head says of every response (`heads.SIGMA0`, which needs torch)."""

MOST_LEVELS = 16
"""Of noise, that are drawn apart; of more, tenths of the responses."""


# --- σ


def sigma_figure(results: Results, stage: str) -> Figure:
    """σ̂/σ₀ of held-out responses against their true σ, by level of the latter; a panel for each arm that uses Disco.

    Both axes are logarithmic, and points are geometric means: comparisons of two answers to a prompt leave a common
    factor of µ and σ open, so σ̂ is known up to its level, and what can be right or wrong is the slope. The solid line
    has slope 1 through the means; at the dashed one every response has σ₀, as a fresh head says.
    """

    def of_run(found: Found) -> pd.Series:
        examples = found.examples
        said = np.concatenate([examples["sigma_chosen"], examples["sigma_rejected"]]) / SIGMA0
        return geometric_means(np.concatenate([examples["chosen_sigma"], examples["rejected_sigma"]]), said)

    def draw(axes: Axes, seeds: pd.DataFrame, arm: Arm, first: bool) -> None:
        look, n = look_of(arm), seeds.shape[1]
        levels = np.log(seeds.index.to_numpy(float))
        mean = np.log(seeds).mean(axis=1).to_numpy()
        line = np.exp(mean.mean() + np.array([levels[0], levels[-1]]) - levels.mean())
        axes.plot(np.exp([levels[0], levels[-1]]), line, color=INK, linewidth=0.8, zorder=1)
        axes.axhline(1, color=FAINT, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1)
        for seed in seeds:
            axes.plot(seeds.index, seeds[seed], **look.of_line, linewidth=0.4, alpha=0.5, marker=look.marker,
                      markersize=1.8, markeredgewidth=0)  # fmt: skip
        axes.plot(seeds.index, np.exp(mean), linestyle="none", color=look.colour, marker=look.marker, markersize=5,
                  markeredgecolor="white", markeredgewidth=0.5, zorder=4)  # fmt: skip
        if n >= INTERVAL_FROM:
            half = [mean_ci(row)[1] for row in np.log(seeds).to_numpy().tolist()]
            axes.vlines(seeds.index, np.exp(mean - half), np.exp(mean + half), color=look.colour, linewidth=1, zorder=3)
        if first:
            axes.annotate("slope 1", (np.exp(levels[-1]), line[1]), (-4, -1), textcoords="offset points", ha="right",
                          va="bottom", fontsize=6.5, color=INK)  # fmt: skip
            axes.annotate("σ₀", (1, 1), (-2, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
                          ha="right", va="bottom", fontsize=6.5, color=INK)  # fmt: skip
        known = [results[run].metrics["sigma_spearman"] for run in results.whole_runs(stage)
                 if run.arm == arm and "sigma_spearman" in results[run].metrics]  # fmt: skip
        if known:
            axes.text(0.04, 0.97, f"rank correlation {np.mean(known):.2f}", transform=axes.transAxes, va="top",
                      fontsize=6.5)  # fmt: skip

    note = "thin lines: single seeds; large: geometric means over seeds{}; dashed: σ₀, a head that has learned nothing"
    return _of_arms(
        results, stage, SIGMAS, "sigma", of_run, draw, note,
        ("True σ of the response (units of r*)", "σ̂ / σ₀ (level free: the gauge)"),
    )  # fmt: skip


def geometric_means(truth: np.ndarray, said: np.ndarray) -> pd.Series:
    """Level of the true σ -> geometric mean of what is said of it, where both are known and above 0; of more than
    MOST_LEVELS levels, tenths of the responses at their geometric means."""
    known = np.isfinite(truth) & np.isfinite(said) & (truth > 0) & (said > 0)
    truth, said = pd.Series(np.log(truth[known])), pd.Series(np.log(said[known]))
    by = truth if truth.nunique() <= MOST_LEVELS else pd.qcut(truth, 10, labels=False, duplicates="drop")
    means = said.groupby(by).mean()
    means.index = np.exp(truth.groupby(by).mean()).round(10)
    return np.exp(means)


# --- s


def scale_figure(results: Results, stage: str) -> Figure:
    """s(x), the factor of β, by the label noise and the familiarity of the prompt's topic; a panel for each arm.

    Geometric means over prompts; familiarity level 0 is what the base has seen most, 3 the rarest, side by side at each
    noise. At 1 the coefficient is the configured one, as it is at the start.
    """

    def of_run(found: Found) -> pd.Series:
        examples = found.examples.dropna(subset=list(SCALES))
        return np.exp(examples["log_s"].groupby([examples["noise"], examples["familiarity"]]).mean())

    def draw(axes: Axes, seeds: pd.DataFrame, arm: Arm, first: bool) -> None:
        noises, groups = (sorted(seeds.index.unique(level)) for level in (0, 1))
        axes.axhline(1, color=FAINT, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1)
        for rank, group in enumerate(groups):
            look = FAMILIARITY[rank % len(FAMILIARITY)]
            shift = 0.19 * (rank - (len(groups) - 1) / 2)
            for place, noise in enumerate(noises):
                if (noise, group) in seeds.index:
                    values = np.log(seeds.loc[(noise, group)].dropna())
                    draw_factor(axes, place + shift, values.tolist(), look)
            if first:
                axes.plot([], [], color=look.colour, marker=look.marker, linestyle="none", label=f"{group:g}")
        axes.set_xticks(range(len(noises)), [f"{noise:g}" for noise in noises])
        axes.grid(axis="x", visible=False)
        axes.relim()
        if first:
            axes.figure.legend(title="familiarity of the topic (0: seen most)", title_fontsize=7, ncols=len(groups),
                               loc="outside upper center", handletextpad=0.1)  # fmt: skip

    note = "small dots: single seeds; large: geometric means over seeds{}; dashed: s = 1, the configured β"
    return _of_arms(
        results, stage, SCALES, "scale", of_run, draw, note,
        ("Label noise of the prompt's topic (s.d., units of r*)", "s(x), factor of β"),
    )  # fmt: skip


FAMILIARITY = tuple(
    Look(colour, look.marker, look.line)
    for colour, look in zip(("#0b2545", "#2f6690", "#4f9bc4", "#7fb7d6"), LOOKS, strict=False)
)
"""Of the levels, the darker the more often the base has seen the topic."""


def draw_factor(axes: Axes, place: float, logs: list[float], look: Look) -> None:
    """`seed_points` of factors, given by their logarithms: mean and interval are of these."""
    before = len(axes.lines)
    seed_points(axes, place, logs, look, width=0.05)
    for line in axes.lines[before:]:
        line.set_ydata(np.exp(line.get_ydata()))


# --- both


def _of_arms(
    results: Results,
    stage: str,
    columns: tuple[str, ...],
    what: str,
    of_run: Callable[[Found], pd.Series],
    draw: Callable[[Axes, pd.DataFrame, Arm, bool], None],
    note: str,
    labels: tuple[str, str],
) -> Figure:
    """A panel for each arm that uses a head which says this, on common logarithmic axes.

    of_run: level -> geometric mean of one run. draw: (axes, a column per seed, arm, whether it is the first panel).
    """
    ideas = {idea.key for idea in IDEAS if idea.says == what}
    runs = [run for run in results.whole_runs(stage) if run.arm.used & ideas]
    arms = [arm for arm in drawn_arms(results.study, stage) if arm.used & ideas]
    there: dict[Run, pd.Series] = {}
    for run in runs:
        examples = results[run].examples
        if examples is not None and set(columns) <= set(examples) and len(values := of_run(results[run])):
            there[run] = values
    with new_figure(COLUMN * (1 if len(arms) < 2 else 0.85 * len(arms)), 2.7) as figure:
        grid = figure.subplots(1, len(arms), sharex=True, sharey=True, squeeze=False)[0]
        is_first = True
        for axes, arm in zip(grid, arms, strict=True):
            mark = seeds_mark(seeds_of(arm, there), seeds_of(arm, runs))
            axes.set_title(label_of(arm) + mark)
            seeds = pd.DataFrame({run.seed: values for run, values in there.items() if run.arm == arm})
            if seeds.empty:
                say_missing(axes)
                continue
            draw(axes, seeds, arm, is_first)
            is_first = False
        grid[0].set_ylabel(labels[1])
        if there:
            _logarithmic(grid[0], "y")
            if what == "sigma":
                levels = sorted({level for values in there.values() for level in values.index})
                _logarithmic(grid[0], "x", levels)
        figure.supxlabel(labels[0], fontsize=7.5)
        n = [seeds_of(arm, there) for arm in arms]
        bars = interval_words([seeds for seeds in n if seeds >= INTERVAL_FROM], lines=False).partition(";")[0]
        text = note.format(f" ({bars})" * bool(bars))
        footer(figure, results, runs, f"{capitalised(text)}." if there else "")
    return figure


def _logarithmic(axes: Axes, which: str, levels: list[float] | None = None) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5, or at these levels where they do not stand too close; over a
    range in which there are hardly any, at even steps."""
    axis = getattr(axes, f"{which}axis")
    getattr(axes, f"set_{which}scale")("log")
    low, high = getattr(axes, f"get_{which}lim")()
    if levels:
        ticks = [levels[0]]
        for level in levels[1:]:
            if level / ticks[-1] > (levels[-1] / levels[0]) ** 0.11:
                ticks.append(level)
    else:
        ticks = [digit * 10.0**power for power in range(-4, 5) for digit in (1, 1.5, 2, 3, 5, 7)]
        if sum(low <= tick <= high for tick in ticks) < 3:
            ticks = [tick for tick in MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high) if tick > 0]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
