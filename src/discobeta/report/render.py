"""One dataframe, three files: CSV (all digits), Markdown (to read), LaTeX (to print)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

Row = Mapping[str, Any]

NOTHING = "–"
LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": "$<$", ">": "$>$", "|": r"\textbar{}", "\u00a0": "~"}
    | {"±": r"$\pm$", "−": "$-$", "×": r"$\times$", "‖": r"$\|$", "↑": r"$\uparrow$", "↓": r"$\downarrow$"}
    | {"≤": r"$\leq$", "µ": r"$\mu$", "–": "--", "β": r"$\beta$", "ρ": r"$\rho$", "σ": r"$\sigma$", "₀": r"$_0$"}
)


@dataclass(frozen=True)
class Column:
    """A printed column. A line break in `header` is kept in LaTeX, where width is scarce."""

    header: str
    text: Callable[[Row], str]
    is_number: bool = True


@dataclass(frozen=True)
class Panel:
    """Columns that are printed side by side; every panel of a table has the same rows."""

    caption: str
    columns: list[Column]
    label: str = ""


@dataclass
class Table:
    """A dataframe and how it is printed."""

    frame: pd.DataFrame  # what the CSV holds, unrounded
    panels: list[Panel]
    notes: list[str]  # printed under the table
    provenance: dict[str, str]  # further columns of the CSV
    group: list[str] = field(default_factory=list)  # columns at whose change LaTeX leaves a gap
    printed: pd.DataFrame | None = None  # what Markdown and LaTeX print, where that is not the frame itself

    def text(self, ending: str, name: str) -> str:
        """What stands in the file with this ending. name: stem of the files, and of the LaTeX labels."""
        return {"csv": self.csv, "md": self.markdown, "tex": lambda: self.latex(name)}[ending]()

    @property
    def rows(self) -> list[dict[str, Any]]:
        return (self.frame if self.printed is None else self.printed).to_dict("records")

    def csv(self) -> str:
        """Provenance stands in columns and not in a comment, which most readers of CSV stumble over."""
        clash = self.frame.columns.intersection(list(self.provenance))
        assert clash.empty, f"{list(clash)} both data and provenance"
        return self.frame.assign(**self.provenance).to_csv(index=False)

    def markdown(self) -> str:
        """Texts are escaped here, where they become Markdown: what came with a run is no markup."""
        parts = []
        for panel in self.panels:
            header = [markdown(" ".join(column.header.split())) for column in panel.columns]
            body = [[markdown(column.text(row)) for column in panel.columns] for row in self.rows]
            widths = [max(map(len, cells)) for cells in zip(header, *body, strict=True)]
            ends = [":" if column.is_number else "-" for column in panel.columns]
            rule = [end.rjust(width, "-") for end, width in zip(ends, widths, strict=True)]
            lines = ["| " + " | ".join(map(str.ljust, cells, widths)) + " |" for cells in (header, rule, *body)]
            parts.append(f"**{markdown(panel.caption)}**\n\n" + "\n".join(lines) + "\n")
        return "\n".join([*parts, *(f"- {markdown(note)}" for note in self.notes)]) + "\n"

    def latex(self, name: str) -> str:
        panels = (self._latex_panel(panel, name) for panel in self.panels)
        return "% needs \\usepackage{booktabs,graphicx}\n" + "\n".join(panels)

    def _latex_panel(self, panel: Panel, name: str) -> str:
        header = " & ".join(_stacked(column.header) for column in panel.columns)
        alignment = "".join("r" if column.is_number else "l" for column in panel.columns)
        lines, last = [], None
        for row in self.rows:
            group = [row[name] for name in self.group]
            if last is not None and group != last:
                lines.append(r"\addlinespace")
            last = group
            lines.append(" & ".join(_cell(column.text(row)) for column in panel.columns) + r" \\")
        label, first = _label(name, panel), _label(name, self.panels[0])
        notes = " ".join(map(escape, self.notes)) if label == first else rf"See the notes of Table~\ref{{{first}}}."
        return "\n".join(
            [
                r"\begin{table*}",
                r"\centering\scriptsize\setlength{\tabcolsep}{3pt}",
                rf"\caption{{{escape(panel.caption)}}}",
                rf"\label{{{label}}}",
                rf"\sbox0{{\begin{{tabular}}{{{alignment}}}",
                r"\toprule",
                rf"{header} \\",
                r"\midrule",
                *lines,
                r"\bottomrule",
                r"\end{tabular}}%",
                r"\ifdim\wd0>\textwidth\resizebox{\textwidth}{!}{\usebox0}\else\usebox0\fi",
                r"\par\smallskip\raggedright " + notes,
                r"\end{table*}",
                "",
            ]
        )


def _label(name: str, panel: Panel) -> str:
    return f"tab:{name}-{panel.label}" if panel.label else f"tab:{name}"


def printable(text: str) -> str:
    """The text on one line, with nothing in it that cannot be seen."""
    return "".join(character if character.isprintable() or character == "\u00a0" else " " for character in text)


def markdown(text: str) -> str:
    """Text that Markdown prints as it stands here: no markup, HTML, formula or end of a cell in it."""
    words = re.sub(r"[\t\n\r ]+", " ", printable(text)).strip(" ")
    words = re.sub(r"[\\`*\[\]|~$]", r"\\\g<0>", words)
    words = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", words)  # within a word it is a character like any other
    return re.sub(r"&(?=#?\w+;)", "&amp;", words).replace("<", "&lt;").replace(">", "&gt;")


def escape(text: str) -> str:
    """Text that LaTeX prints as it stands here, with no package loaded; ? for letters that need one."""
    return printable(text).translate(LATEX).encode("ascii", "replace").decode()


def _cell(text: str) -> str:
    """Half-widths in small print, so that more columns fit on a page."""
    return re.sub(r" \$\\pm\$ (\S+)", r"{\\tiny\\,$\\pm$\\,\1}", escape(text))


def _stacked(header: str) -> str:
    """A header over several lines: broken at line breaks and after underscores."""
    lines = [escape(line) for line in header.replace("_", "_\n").split("\n")]
    return lines[0] if len(lines) == 1 else r"\shortstack{" + r"\\".join(lines) + "}"


def number(value: float, decimals: int) -> str:
    """Fixed decimals with thousands separated, a true minus sign and no negative zero."""
    if value is None or math.isnan(value):
        return NOTHING
    return f"{value:z,.{decimals}f}".replace("-", "−")


def count(n: int, expected: int) -> str:
    """How many of those that should be there are."""
    return NOTHING if expected == 0 else str(n) if n == expected else f"{n} of {expected}"


def yes_no(value: bool) -> str:
    return "yes" if value else "no"
