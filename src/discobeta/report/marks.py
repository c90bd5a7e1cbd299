"""How seeds are drawn, as lines or as points, and how names stand at the ends of lines.

Fewer than `INTERVAL_FROM` seeds are drawn one by one: an interval of two is wider than any figure, and of five it says
less than the five. From there on lines have a band and points a bar, Student's 95 % interval of the mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from discobeta.report.statistics import INTERVAL_FROM, mean_ci
from discobeta.report.style import INK, Look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS = {"markersize": 2.2, "alpha": 0.6, "markeredgewidth": 0}
"""Of single seeds."""


def seed_lines(axes: Axes, values: pd.DataFrame, look: Look, *, marks: int | None = None) -> None:
    """The mean over the columns, which are seeds, with a band or with each of them.

    values: a row per step. marks: at most that many points are marked; None: all, because each is a measurement.
    """
    values = values.dropna(axis=1)
    if values.empty:
        return
    n = values.shape[1]
    if n >= INTERVAL_FROM:
        mean, half = np.transpose([mean_ci(row) for row in values.to_numpy().tolist()])
        axes.fill_between(values.index, mean - half, mean + half, color=look.colour, alpha=0.15, linewidth=0)
    elif n > 1:
        axes.plot(values.index, values, **look.of_line, linewidth=0.5, alpha=0.6)
    every = 1 if marks is None else max(1, len(values) // marks)
    axes.plot(
        values.index, values.mean(axis=1), **look.of_line, marker=look.marker, markersize=3, markevery=every, zorder=3
    )


def seed_points(
    axes: Axes, place: float, values: Sequence[float], look: Look, *, across: bool = False, width: float = 0.05
) -> None:
    """A dot per seed, in the order of the seeds over twice the width, and the mean with its interval.

    place: on the axis that holds the rows; across: that is the vertical one, and values run from left to right.
    """
    values = [float(value) for value in values]
    if not values:
        return

    def draw(where: Sequence[float], what: Sequence[float], **style) -> None:
        axes.plot(*((what, where) if across else (where, what)), color=look.colour, **style)

    places = place + (np.linspace(-width, width, len(values)) if len(values) > 1 else np.zeros(1))
    mean, half = mean_ci(values)
    if len(values) > 1:
        draw(places, values, marker=look.marker, linestyle="none", **DOTS, zorder=2)
    if len(values) >= INTERVAL_FROM:
        draw([place, place], [mean - half, mean + half], linewidth=1, zorder=3)
    draw([place], [mean], marker=look.marker, markersize=4.5, markeredgecolor="white", markeredgewidth=0.5, zorder=4)


def interval_words(seeds: Iterable[int], *, lines: bool) -> str:
    """What a band or a bar shows, e.g. `band: 95 % Student interval over 6 seeds`; seeds: of each that is drawn."""
    seeds = sorted(set(seeds) - {0})
    if not seeds:
        return ""
    few, many = [n for n in seeds if n < INTERVAL_FROM], [n for n in seeds if n >= INTERVAL_FROM]
    words = []
    if many:
        words.append(f"{'band' if lines else 'bar'}: 95 % Student interval of the mean over {_count(many)}")
    if few and few[-1] > 1:
        words.append(f"{'thick line' if lines else 'large'}: mean of {_count(few)}")
    elif few:
        words.append("one seed")
    if (few and few[-1] > 1) or (many and not lines):
        words.append(f"{'thin lines' if lines else 'small dots'}: single seeds")
    return "; ".join(words)


def _count(seeds: list[int]) -> str:
    return f"{seeds[0]} seeds" if seeds[0] == seeds[-1] else f"{seeds[0]} to {seeds[-1]} seeds"


# --- names at the ends of lines

End = tuple[float, float, str, str]
"""(x, y, name, colour) of the last point of a line."""


def name_ends(figure: Figure, ends: Mapping[Axes, Iterable[End]], *, size: float = 6.5) -> None:
    """Names in a column right of each axes, each as near to the height of its line's end as the others let it.

    Called when all else is drawn: what heights are free depends on the size that the layout gives the axes.
    """
    if any(ends.values()):
        figure.draw_without_rendering()
    for axes, names in ends.items():
        names = sorted(names, key=lambda end: (end[1], end[2]))
        height = axes.get_window_extent().height * 72 / figure.dpi
        x_limits, (low, high) = axes.get_xlim(), axes.get_ylim()
        to_axes = axes.transData + axes.transAxes.inverted()
        wanted = [to_axes.transform((x_limits[0], min(max(y, low), high)))[1] for _, y, *_ in names]
        for (x, y, name, colour), place in zip(names, apart(wanted, 1.2 * size / height), strict=True):
            axes.annotate(
                name, (x, y), (1.04, round(place, 3)), textcoords="axes fraction", color=INK, fontsize=size,
                va="center", annotation_clip=False, parse_math=False,
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "relpos": (0, 0.5),
                            "shrinkA": 1, "shrinkB": 2},
            )  # fmt: skip
        axes.set(xlim=x_limits, ylim=(low, high))


def apart(wanted: Sequence[float], gap: float) -> list[float]:
    """The places nearest to the wanted ones (rising, least squares) that are at least `gap` apart and, if there is
    room, between 0 and 1."""
    blocks: list[list[float]] = []  # of wanted places less the gaps below them, which must not fall
    for rank, place in enumerate(wanted):
        blocks.append([place - rank * gap])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    highest = 1 - (len(wanted) - 1) * gap
    flat = [min(max(float(np.mean(block)), 0.0), max(highest, 0.0)) for block in blocks for _ in block]
    return [place + rank * gap for rank, place in enumerate(flat)]
