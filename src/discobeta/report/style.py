"""What all figures share: how they look, which arms they draw and how one tells them apart, what stands below them."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from discobeta.design.arms import CORNERS, Arm
from discobeta.design.study import Run, Study
from discobeta.report.collect import provenance
from discobeta.report.measures import MEASURES
from discobeta.report.render import capitalised, printable
from discobeta.report.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN, PAGE = 3.4, 7.0  # inches: one column of a two-column paper, and both
INK, FAINT = "#262626", "#737373"
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
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
    "lines.markersize": 4,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "figure.dpi": 250,  # at which text is measured too
    "savefig.dpi": 250,
    "pdf.fonttype": 42,  # text stays text
    "svg.hashsalt": "discobeta",  # equal figures give equal files
}


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """An empty figure of so many inches; what is drawn inside is in `STYLE`."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


# --- which arms there are, and how one tells them apart


@dataclass(frozen=True)
class Look:
    """Of the lines and points of an arm or a control: the marker alone tells them apart, so no colour is needed."""

    colour: str
    marker: str
    line: str | tuple

    @property
    def of_line(self) -> dict:
        return {"color": self.colour, "linestyle": self.line}


COLOURS = ("#1a1a1a", "#E69F00", "#0060A8", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#999999")
"""Of the arms without idle heads and, from the fifth on, of controls. Hues of Okabe and Ito, which colour-blind readers
tell apart; of the first four each is another grey when it is printed in grey (a test holds by how much)."""

MARKERS = ("o", "^", "s", "D", "v", "P", "<", ">")
LINES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1.2, 1, 1.2)))
LOOKS = tuple(Look(colour, MARKERS[i], LINES[i % len(LINES)]) for i, colour in enumerate(COLOURS))


def look_of(arm: Arm) -> Look:
    """That of its twin, which computes the same."""
    return LOOKS[CORNERS.index(arm.twin) % len(LOOKS)]


def drawn_arms(study: Study, stage: str) -> list[Arm]:
    """The arms without idle heads, and those with one whose twin the study does not train."""
    arms = study.arms_of(stage)
    return [arm for arm in arms if not arm.is_idle or arm.twin not in arms]


def label_of(arm: Arm) -> str:
    label = capitalised(arm.label)
    return f"{label}, idle head" if arm.is_idle else label


def seeds_of(arm: Arm, runs: Iterable[Run]) -> int:
    """How many runs of the arm are among these."""
    return sum(run.arm == arm for run in runs)


def seeds_mark(there: int, expected: int) -> str:
    return "" if there == expected else f" ({there} of {expected} seeds)"


def short_mark(there: int, expected: int) -> str:
    """`seeds_mark` beside a line or a row, where there is little room."""
    return "" if there == expected else f" ({there}/{expected})"


# --- the words of an axis

UNITS = {
    "nll": "nats per pair",
    "excess_kl": "nats per pair",
    "accuracy": "share of pairs",
    "true_reward": "r*",
    "regret": "r*",
    "best_of_4/true_reward": "r*",
    "best_of_16/true_reward": "r*",
    "kl_per_sequence": "nats per response",
    "kl_rao_blackwell": "nats per response",
}
"""Metric -> its unit, where an axis says more of it than a column; r* is the reward by which the world draws labels."""


def words_of(name: str) -> str:
    """A metric and its unit, e.g. `NLL (nats per pair)`."""
    title = MEASURES[name].words
    unit = UNITS.get(name, MEASURES[name].unit)
    return f"{title} ({unit})" if unit else title


def better(name: str) -> str:
    """Which way is better, e.g. `↓ better`; empty of what is neither."""
    return f"{MEASURES[name].better} better" if MEASURES[name].better else ""


def axis_words(name: str, *more: str) -> str:
    """The label of a vertical axis: the metric, its unit, what else is to be said, and the better direction."""
    return "\n".join(filter(None, [words_of(name), *more, better(name)]))


# --- what stands in and below a figure


def say_missing(axes: Axes, why: str = "missing") -> None:
    box = {"facecolor": "white", "edgecolor": "none"}
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color=FAINT, bbox=box)


MOST_NAMED = 300  # letters: if naming the missing runs takes more, they are counted


def footer(figure: Figure, results: Results, runs: list[Run], note: str = "") -> None:
    """How to read the figure, what is not in it, and, in one small line, what made it: below it."""
    missing = results.describe_missing(runs)
    if len(missing) > MOST_NAMED:
        absent = [results.absence(run) for run in runs if results.absence(run)]
        kinds = Counter(reason.partition(" (")[0] for reason in absent)
        said = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        missing = f"{len(absent)} of {len(runs)} runs ({said}), which the notes of the tables name"
    state_source(figure, provenance(results), note, f"Missing: {missing}." if missing else "")


def state_source(figure: Figure, made_by: Mapping[str, str], *notes: str) -> None:
    """Notes, and in one small line what made the figure, below it; `save` crops to what is drawn.

    made_by also goes, as it is, into the metadata of the files.
    """
    figure.made_by = dict(made_by)
    place = 0.0
    texts = [(note, 6, INK) for note in notes if note]
    for text, size, colour in [*texts, (source_line(made_by), 5, FAINT)]:
        lines = textwrap.wrap(printable(text), width=int(142 / size * figure.get_figwidth()))
        # what came with a run is no formula, whatever dollars are in it
        figure.text(
            0.01, place - 0.05 / figure.get_figheight(), "\n".join(lines),
            fontsize=size, color=colour, va="top", parse_math=False, linespacing=1.25,
        )  # fmt: skip
        place -= (len(lines) * size * 1.3 / 72 + 0.03) / figure.get_figheight()


def source_line(made_by: Mapping[str, str]) -> str:
    """E.g. `embedded · seeds 1-6 · config a5465738deea · commit 7b8e5f55f1c4`."""
    seeds = spans_of([int(seed) for seed in made_by["seeds"].split()]) if made_by.get("seeds") else ""
    words = [made_by.get("study", ""), f"seeds {seeds}" if seeds else ""]
    words += [f"{key} {made_by[key]}" for key in ("config", "hypotheses", "commit") if made_by.get(key)]
    return " · ".join(filter(None, words))


def spans_of(numbers: Iterable[int]) -> str:
    """E.g. `1-6, 9` of 1 to 6 and 9."""
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and number == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    return ", ".join("-".join(map(str, span)) for span in spans)
