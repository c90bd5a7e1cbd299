"""One dataframe, three files: CSV (all digits), Markdown (to read), LaTeX (to print)."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from discobeta.report.measures import one_line

Row = Mapping[str, Any]

NOTHING = "–"
MATHS = {
    "±": r"\pm", "−": "-", "×": r"\times", "‖": r"\|", "↑": r"\uparrow", "↓": r"\downarrow", "→": r"\to",
    "≤": r"\leq", "≥": r"\geq", "≈": r"\approx", "√": r"\surd", "∞": r"\infty", "·": r"\cdot", "<": "<", ">": ">",
    "½": r"\frac{1}{2}",
    "α": r"\alpha", "β": r"\beta", "γ": r"\gamma", "δ": r"\delta", "ε": r"\varepsilon", "λ": r"\lambda",
    "µ": r"\mu", "μ": r"\mu", "π": r"\pi", "ρ": r"\rho", "σ": r"\sigma", "τ": r"\tau", "Φ": r"\Phi", "Σ": r"\Sigma",
} | {digit: f"_{number}" for number, digit in enumerate("₀₁₂₃₄₅₆₇₈₉")} | {
    digit: f"^{number}" for number, digit in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")
}  # fmt: skip
LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}"}
    | {"\u00a0": "~", "–": "--", "’": "'", "…": r"\ldots{}"}
    | {character: f"${formula}$" for character, formula in MATHS.items()}
)


@dataclass(frozen=True)
class Column:
    """A printed column. A line break in `header` is kept in LaTeX, where width is scarce."""

    header: str
    text: Callable[[Row], str]
    is_number: bool = True
    widest: float = 0.3  # share of LaTeX's text width; words that are longer are wrapped


@dataclass(frozen=True)
class Panel:
    """Columns that are printed side by side. Its first `keys` columns say what a row is of.

    rows: of the table's frame those that it prints, by `Table`: of the first panel all of which `of` is true, of
    another those that have anything in it.
    """

    caption: str
    columns: list[Column]
    label: str = ""
    keys: int = 1
    of: Callable[[Row], bool] = lambda row: True
    rows: list[Row] = field(default_factory=list)

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Headers on one line, and the texts of each row."""
        header = [one_line(column.header) for column in self.columns]
        return header, [[column.text(row) for column in self.columns] for row in self.rows]


@dataclass
class Table:
    """A dataframe and how it is printed: no column without a value, no panel without one, no row of another's."""

    frame: pd.DataFrame  # what the CSV holds, unrounded
    panels: list[Panel]
    notes: list[str]  # printed under the table
    provenance: dict[str, str]  # further columns of the CSV
    group: list[str] = field(default_factory=list)  # columns at whose change LaTeX leaves a gap
    printed: pd.DataFrame | None = None  # what Markdown and LaTeX print, where that is not the frame itself
    title: str = ""  # what it is called in a list of tables

    def __post_init__(self) -> None:
        if self.panels:
            rows = (self.frame if self.printed is None else self.printed).to_dict("records")
            panels = [_pruned(panel, rows, place == 0) for place, panel in enumerate(self.panels)]
            self.panels = [panel for place, panel in enumerate(panels) if place == 0 or panel.rows]

    def text(self, ending: str, name: str) -> str:
        """What stands in the file with this ending. name: stem of the files, and of the LaTeX labels."""
        return {"csv": self.csv, "md": self.markdown, "tex": lambda: self.latex(name)}[ending]()

    def csv(self) -> str:
        """Provenance stands in columns and not in a comment, which most readers of CSV stumble over."""
        clash = self.frame.columns.intersection(list(self.provenance))
        assert clash.empty, f"{list(clash)} both data and provenance"
        return self.frame.assign(**self.provenance).to_csv(index=False)

    def markdown(self) -> str:
        """Texts are escaped here, where they become Markdown: what came with a run is no markup."""
        parts = []
        for panel in self.panels:
            head, rows = panel.cells()
            header, *body = [list(map(markdown, cells)) for cells in (head, *rows)]
            widths = [max(map(len, cells)) for cells in zip(header, *body, strict=True)]
            ends = [":" if column.is_number else "-" for column in panel.columns]
            rule = [end.rjust(max(width, 3), "-") for end, width in zip(ends, widths, strict=True)]
            lines = ["| " + " | ".join(map(str.ljust, cells, map(len, rule))) + " |" for cells in (header, rule, *body)]
            parts.append(f"**{markdown(panel.caption)}**\n\n" + "\n".join(lines) + "\n")
        return "\n".join([*parts, *(f"- {markdown(note)}" for note in self.notes)]) + "\n"

    def latex(self, name: str) -> str:
        """Floats that fit a page of LaTeX's article class; a wide panel is continued below itself, a long one after."""
        floats = []
        for panel in self.panels:
            label, first = _label(name, panel), _label(name, self.panels[0])
            notes = [*map(escape, textwrap.wrap(" ".join(self.notes), NOTE_LINE * TEXT_HEIGHT // 2))]
            said = notes if label == first else [rf"See the notes of Table~\ref{{{first}}}."]
            of_notes = [(1 + math.ceil(len(text) / NOTE_LINE), rf"\raggedright {text}\par") for text in said]
            parts = [*_tabulars(panel, self.group), *of_notes]
            floats += _floats(panel.caption, label, parts)
        return "% needs \\usepackage{booktabs}\n" + "\n".join(floats)


def _pruned(panel: Panel, rows: list[dict[str, Any]], is_first: bool) -> Panel:
    """The panel with its rows, without the columns, and (but of the first) the rows, that have nothing in it."""
    rows = [row for row in rows if panel.of(row)]
    keys, columns = panel.columns[: panel.keys], panel.columns[panel.keys :]
    columns = [column for column in columns if not rows or any(column.text(row) != NOTHING for row in rows)]
    if not is_first:
        rows = [row for row in rows if any(column.text(row) != NOTHING for column in columns)]
    return replace(panel, columns=[*keys, *columns], rows=rows)


# --- LaTeX

TEXT_WIDTH, TEXT_HEIGHT = 345.0, 50
"""Points, and lines of \\footnotesize, of a page of LaTeX's article: no paper's is narrower."""
NOTE_LINE = 92  # characters of a note on such a line
EM, TINY_EM, SEPARATION = 8.5, 6.8, 3.0  # points: of Computer Modern at 8 and 5 points; \tabcolsep
STACKED = 3  # values of seeds on one line

WIDTHS = {
    character: width / 1000
    for characters, width in (
        ("ijl.,:;'!", 278), ("\u00a0 f|[]", 333), ("t()sr-", 392), ("cez", 444), ("agoyqvxk0123456789–/₀", 528),
        ("bdhnpu", 556), ("I", 361), ("J?", 514), ("FLPSZ", 653), ("ABCDEKNRTUVXYwσβρµ", 750), ("GHOQ=+<>±−×‖", 785),
        ("mMW", 1028), ("%_", 833),
    )
    for character in characters
}  # fmt: skip
"""In em, rounded up, of Computer Modern: what a cell takes is known without LaTeX."""


def _label(name: str, panel: Panel) -> str:
    return f"tab:{name}-{panel.label}" if panel.label else f"tab:{name}"


def _points(text: str, em: float = EM) -> float:
    return em * sum(WIDTHS.get(character, 0.8) for character in text)


@dataclass(frozen=True)
class _Cell:
    """What stands in a cell: `tex` is `lines` high and `width` points wide."""

    tex: str
    width: float
    lines: float = 1


def _cell(text: str, column: Column, squeeze: float = 1.0) -> _Cell:
    """Half-widths and seeds in small print; words that are too long for the column in several lines."""
    if not column.is_number:
        share = column.widest * squeeze
        width, widest = _points(text), share * TEXT_WIDTH
        if width <= widest:
            return _Cell(escape(text), width)
        words = escape(text).replace(r"\_", r"\_\hspace{0pt}").replace("/", r"/\hspace{0pt}")
        tex = rf"\parbox[t]{{{share:.3f}\textwidth}}{{\raggedright {words}\strut}}"
        return _Cell(tex, widest, math.ceil(1.15 * width / widest))
    if found := re.fullmatch(r"(\S+) \(([^()]*, [^()]*)\)", text):
        mean, seeds = found[1], found[2].split(", ")
        lines = [", ".join(seeds[start : start + STACKED]) for start in range(0, len(seeds), STACKED)]
        stack = r"\\[-3pt]".join(rf"{{\tiny {escape(line)}}}" for line in lines)
        tex = rf"\begin{{tabular}}[t]{{@{{}}r@{{}}}}{escape(mean)}\\[-3pt]{stack}\end{{tabular}}"
        return _Cell(tex, max(_points(mean), *(_points(line, TINY_EM) for line in lines)), 1 + 0.7 * len(lines))
    value, *small = re.split(r" (?=±|\()", text)
    tex = "".join([escape(value), *(rf"{{\tiny\,{escape(part).replace('$ ', '$')}}}" for part in small)])
    return _Cell(tex, _points(value) + sum(2 + _points(part, TINY_EM) for part in small))


def _header(column: Column) -> _Cell:
    """Over several lines: broken at line breaks and after underscores."""
    lines = column.header.replace("_", "_\n").split("\n")
    tex = escape(lines[0]) if len(lines) == 1 else r"\shortstack{" + r"\\".join(map(escape, lines)) + "}"
    return _Cell(tex, max(map(_points, lines)), len(lines))


def _tabulars(panel: Panel, group: list[str]) -> Iterator[tuple[float, str]]:
    """(lines, LaTeX) of what the panel is cut into: columns that fit side by side, of these rows that fit a page."""
    headers = [_header(column) for column in panel.columns]
    for squeeze in (1.0, 0.8, 0.6, 0.4):
        cells = [[_cell(column.text(row), column, squeeze) for column in panel.columns] for row in panel.rows]
        widths = [2 * SEPARATION + max(cell.width for cell in of) for of in zip(headers, *cells, strict=True)]
        if sum(widths[: panel.keys]) + max(widths[panel.keys :], default=0) <= TEXT_WIDTH:
            break
    blocks: list[list[int]] = []
    for place in range(panel.keys, len(panel.columns)):
        if blocks and sum(widths[: panel.keys]) + sum(widths[i] for i in blocks[-1]) + widths[place] <= TEXT_WIDTH:
            blocks[-1].append(place)
        else:
            blocks.append([place])
    for block in blocks or [[]]:
        columns, top = [*range(panel.keys), *block], max((headers[i].lines for i in block), default=1) + 1.5
        start, used = 0, top
        for place, row in enumerate(cells):
            lines = max(row[i].lines for i in columns)
            if used + lines > TEXT_HEIGHT - 4:
                yield used, _tabular(panel, headers, cells, columns, range(start, place), group)
                start, used = place, top
            used += lines + (0.4 if place > start and _differ(panel.rows[place], panel.rows[place - 1], group) else 0)
        yield used, _tabular(panel, headers, cells, columns, range(start, len(cells)), group)


def _differ(row: Row, other: Row, group: list[str]) -> bool:
    return any(row[name] != other[name] for name in group)


def _tabular(
    panel: Panel, headers: list[_Cell], cells: list[list[_Cell]], columns: list[int], rows: range, group: list[str]
) -> str:
    """Keys that are those of the row above are not repeated, but for the last; of a panel of keys alone, all are."""
    alignment = "".join("r" if panel.columns[i].is_number else "l" for i in columns)
    lines = [rf"\begin{{tabular}}{{{alignment}}}", r"\toprule", " & ".join(headers[i].tex for i in columns) + r" \\"]
    lines.append(r"\midrule")
    for place in rows:
        texts = [cells[place][i].tex for i in columns]
        if place > rows.start:
            if _differ(panel.rows[place], panel.rows[place - 1], group):
                lines.append(r"\addlinespace")
            for key in range(panel.keys - 1 if len(columns) > panel.keys else 0):
                if cells[place][key].tex != cells[place - 1][key].tex:
                    break
                texts[key] = ""
        lines.append(" & ".join(texts) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _floats(caption: str, label: str, parts: list[tuple[float, str]]) -> Iterator[str]:
    """Parts that stand below each other, as many in a float as a page holds."""
    height = 3 + 1.4 * len(caption) / NOTE_LINE
    pages, used = [[]], height
    for lines, tex in parts:
        if pages[-1] and used + lines > TEXT_HEIGHT:
            pages.append([])
            used = height
        pages[-1].append(tex)
        used += lines + 1
    for place, page in enumerate(pages):
        named = rf"\caption{{{escape(caption)}}}" + "\n" + rf"\label{{{label}}}"
        yield "\n".join(
            [
                r"\begin{table*}",
                rf"\centering\footnotesize\setlength{{\tabcolsep}}{{{SEPARATION:g}pt}}",
                named if place == 0 else rf"\addtocounter{{table}}{{-1}}\caption{{{escape(caption)} (Continued.)}}",
                "\n\n\\medskip\n".join(page),
                r"\end{table*}",
                "",
            ]
        )


# --- texts


def capitalised(text: str) -> str:
    """With a capital first letter, and the others as they are."""
    return text[:1].upper() + text[1:]


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


def number(value: float, decimals: int) -> str:
    """Fixed decimals with thousands separated, a true minus sign and no negative zero."""
    if value is None or math.isnan(value):
        return NOTHING
    return f"{value:z,.{decimals}f}".replace("-", "−")


def count(n: int, expected: int) -> str:
    """How many of those that should be there are."""
    return NOTHING if expected == 0 else str(n) if n == expected else f"{n} of {expected}"


def seeds_column() -> Column:
    return Column("Seeds", lambda row: count(row["n_seeds"], row["n_expected"]))
