"""Reward against KL to the reference: what policies have bought, and at which price.

Of a study's runs as they are, and, of committed numbers, of a paper (`paper_figures`). Rewards at unequal KL are not
comparable, which is why there is no figure of rewards alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from discobeta.design.arms import BY_NAME, CORNERS
from discobeta.design.stages import STAGES
from discobeta.report import frontier
from discobeta.report.collect import collect, provenance
from discobeta.report.frontier import LEAST_WELL_FORMED, REWARD, Point, kl_of
from discobeta.report.marks import End, name_ends
from discobeta.report.published import Published, Source, along, label_of
from discobeta.report.results import Results
from discobeta.report.style import (
    COLUMN,
    INK,
    LOOKS,
    MARKERS,
    Look,
    axis_words,
    footer,
    look_of,
    new_figure,
    say_missing,
    words_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GAIN = "reward_gain"
"""What is drawn where no truth is known: the score by the arm's own reward model."""

REGRET = "regret"
"""What a policy's true reward falls short of the oracle's at its KL."""

BySeed = dict[int, list[Point]]


def reward_kl(results: Results, stage: str) -> Figure:
    """True reward (or the gain by the own reward model, where no truth is known) against KL to the reference.

    Small points are runs, large ones means over seeds at each β; a sweep's are joined. Crosses are runs whose policy
    has collapsed, which are in no mean. Beside the arms stand their controls, and where the world gives it the oracle's
    frontier: at every run's KL the most true reward that a policy can have; below, what each falls short of it,
    in which arms can be told apart. Each kind of reward model has a panel if its score is all there is, since the units
    differ.
    """
    study = results.study
    found = Published(study.name, collect(results), study.settings, provenance(results))
    kl, arms = kl_of(found, stage), [arm.name for arm in study.arms_of(stage) if not arm.is_idle]
    sources = _sources(found, stage, arms)
    panels = [(REWARD, "", arms)] if study.world else [(GAIN, *of_judge) for of_judge in _by_judge(stage, arms)]
    panels += [(REGRET, "", arms)] if study.world and REGRET in found.metrics(stage) else []
    every = {
        value: {source: frontier.points(found, stage, source, value=value, kl=kl) for source in sources}
        for value, *_ in panels
    }
    looks = looks_of(sources)
    with new_figure(1.35 * COLUMN, 0.5 + 2.3 * len(panels)) as figure:
        names = {}
        grid = figure.subplots(len(panels), 1, squeeze=False, sharex=len(panels) > 1)[:, 0]
        for axes, (value, judge, shown) in zip(grid, panels, strict=True):
            part = {source: of for source, of in every[value].items() if source.arm in shown and of}
            names[axes] = draw_points(axes, part, looks, found, len(study.seeds))
            axes.set_ylabel(axis_words(value, judge))
            if not part:
                say_missing(axes)
            keep_sensible(axes, part)
            if value == REWARD:
                names[axes] += draw_oracle(axes, oracle_points(found, stage, part))
        grid[-1].set_xlabel(words_of(kl))
        figure.align_ylabels()
        name_points(figure)
        name_ends(figure, names)
        runs = results.whole_runs(stage) + results.variant_runs(stage)
        footer(figure, results, runs, note_of(every[panels[0][0]], has_oracle=panels[-1][0] == REGRET))
    return figure


def _sources(study: Published, stage: str, arms: list[str]) -> list[Source]:
    """The arms, and then the controls, each without the point of the sweep over β that it is at."""
    return sorted((source for source in along(study, stage) if source.arm in arms), key=lambda of: bool(of.variant))


def _by_judge(stage: str, arms: list[str]) -> list[tuple[str, list[str]]]:
    """Of each kind of reward model what its panel is called, and its arms."""
    judge, found = STAGES[stage].judge, {}
    for name in arms:
        given = BY_NAME[name].trained_as(judge.stage).twin if judge else CORNERS[0]
        found.setdefault(given, []).append(name)
    return [(f"by reward model, {given.label}" if len(found) > 1 else "", names) for given, names in found.items()]


def looks_of(sources: Iterable[Source]) -> dict[Source, Look]:
    """Arms have their own look; controls the colours and markers that arms do not use, in turn."""
    looks: dict[Source, Look] = {}
    others = len(CORNERS)
    for source in sources:
        if source.variant:
            colour, line = LOOKS[others % len(LOOKS)].colour, LOOKS[others % len(LOOKS)].line
            looks[source] = Look(colour, (*MARKERS[len(CORNERS) :], "p", "h", "*", "X", "d")[len(looks) % 9], line)
            others = others + 1 if others + 1 < len(LOOKS) else len(CORNERS)
        else:
            looks[source] = look_of(BY_NAME[source.arm])
    return looks


def draw_points(
    axes: Axes, found: Mapping[Source, BySeed], looks: Mapping[Source, Look], study: Published, n_seeds: int
) -> list[End]:
    """The runs, their means and the lines that join a sweep's; returns where the lines end.

    A hollow mean is one of fewer seeds than the study has. What has no line is named in the legend.
    """
    ends: list[End] = []
    for source, by_seed in found.items():
        look = looks[source]
        points = [point for of_seed in by_seed.values() for point in of_seed]
        kept, lost = ([p for p in points if p.has_collapsed is has] for has in (False, True))
        small = {"color": look.colour, "linestyle": "none", "zorder": 2}
        axes.plot(*xy(kept), marker=look.marker, markersize=2.6, alpha=0.6, markeredgewidth=0, **small)
        axes.plot(*xy(lost), marker="x", markersize=3.5, markeredgewidth=0.7, **small)
        means = mean_points(by_seed)
        axes.plot([kl for kl, *_ in means], [value for _, value, _ in means], **look.of_line, zorder=3)
        name = label_of(source, study)
        for kl, value, n in means:
            face = look.colour if n == n_seeds else "white"
            edge = {"markeredgecolor": "white" if n == n_seeds else look.colour, "markeredgewidth": 0.6}
            axes.plot(kl, value, marker=look.marker, markersize=5, linestyle="none", markerfacecolor=face, zorder=4,
                      color=look.colour, label=name if len(means) == 1 else None, **edge)  # fmt: skip
        if len(means) > 1:
            ends.append((*means[-1][:2], name.partition(" (")[0], look.colour))
    return ends


def mean_points(by_seed: BySeed) -> list[tuple[float, float, int]]:
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


def oracle_points(study: Published, stage: str, sources: Iterable[Source]) -> list[tuple[float, float]]:
    """(KL, true reward + regret) of every run, by KL: points of the oracle's frontier, which is the same for all."""
    runs, found = along(study, stage), []
    for run in [run for source in set(sources) for run in runs.get(source, ())]:
        kl, reward, regret = (study.values(stage, run, name) for name in (kl_of(study, stage), REWARD, "regret"))
        found += [(kl[seed], reward[seed] + regret[seed]) for seed in kl.keys() & reward.keys() & regret.keys()]
    return sorted(found)


def draw_oracle(axes: Axes, points: list[tuple[float, float]]) -> list[End]:
    """The frontier through its points, and its end."""
    if not points:
        return []
    right, (low, high) = axes.get_xlim()[1], axes.get_ylim()
    axes.plot(*zip(*points, strict=True), color=INK, linestyle=(0, (1, 2)), linewidth=1, zorder=1)
    inside = [point for point in points if point[0] <= right] or points[:1]
    axes.set_ylim(min(low, inside[0][1]), max(high, inside[-1][1] + 0.03 * (high - low)))
    return [(*inside[-1], "oracle", INK)]


def name_points(figure: Figure) -> None:
    """A legend above, of what has no line to be named at its end."""
    entries = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        figure.legend(entries.values(), entries, loc="outside upper center", ncols=2, handletextpad=0.2,
                      columnspacing=1.2)  # fmt: skip


def keep_sensible(axes: Axes, found: Mapping[Source, BySeed]) -> None:
    """The ranges of the runs that have not collapsed: one that has may be far away."""
    kept = [p for by_seed in found.values() for points in by_seed.values() for p in points if not p.has_collapsed]
    for of_axis, numbers in zip((axes.set_xlim, axes.set_ylim), xy(kept) if kept else ((), ()), strict=True):
        if numbers:
            room = 0.06 * max(max(numbers) - min(numbers), 0.1 * abs(max(numbers)), 1e-9)
            of_axis(min(numbers) - room, max(numbers) + room)


def note_of(found: Mapping[Source, BySeed], *, has_oracle: bool) -> str:
    """What the marks mean, and how many runs have collapsed."""
    points = [point for by_seed in found.values() for of_seed in by_seed.values() for point in of_seed]
    lost = sum(point.has_collapsed for point in points)
    words = ["Small: runs; large: means over seeds at each β (hollow: of fewer seeds than the study has)"]
    if lost:
        words.append(
            f"×: {lost} run{'s' * (lost > 1)} with less than {LEAST_WELL_FORMED:.0%} well-formed, in no mean; far ones "
            "are beyond the axes"
        )
    if has_oracle:
        words.append("dotted: the oracle's frontier")
    return "; ".join(words) + "." if points else ""


def xy(points: list[Point]) -> tuple[list[float], list[float]]:
    return [point.kl for point in points], [point.value for point in points]
