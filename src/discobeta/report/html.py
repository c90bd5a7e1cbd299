"""HTML as a tree: what is in it is escaped where it is written, and every element that is opened is closed."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from discobeta.report.measures import one_line
from discobeta.report.render import NOTHING, Table

Element: TypeAlias = ET.Element
Content: TypeAlias = "str | Element | None | Iterable[Content]"


def tag(name: str, /, *content: Content, **attributes: str | bool | None) -> Element:
    """<name>: attributes are written with a trailing underscore where they are words of Python (`class_`), and with
    underscores for hyphens; None and False leave one out, True makes it one without a value."""
    found = ET.Element(name)
    for key, value in attributes.items():
        if value not in (None, False):
            found.set(key.rstrip("_").replace("_", "-"), "" if value is True else str(value))
    add(found, *content)
    return found


def add(parent: Element, *content: Content) -> None:
    """Texts and elements behind what is already in the parent."""
    for part in content:
        if part is None:
            continue
        if isinstance(part, str):
            text = visible(part)
            if len(parent):
                parent[-1].tail = (parent[-1].tail or "") + text
            else:
                parent.text = (parent.text or "") + text
        elif isinstance(part, ET.Element):
            parent.append(part)
        else:
            add(parent, *part)


def document(root: Element) -> str:
    return "<!DOCTYPE html>\n" + ET.tostring(root, encoding="unicode", method="html") + "\n"


def visible(text: str) -> str:
    """The text without what HTML cannot hold: control characters but line breaks and tabs, and lone surrogates."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", text.replace("\r\n", "\n"))


# --- tables


def boxed(table: Element, label: str) -> Element:
    """In a box of its own, which scrolls where the screen is narrower than the table."""
    return tag("div", table, class_="scroll", tabindex="0", role="region", aria_label=label)


def grid(
    header: Sequence[Content],
    rows: Iterable[Sequence[Content]],
    numbers: Sequence[bool],
    *,
    caption: Content = None,
    starts: frozenset[int] = frozenset(),
    class_: str = "",
) -> Element:
    """A table that a reader may sort by any column.

    numbers: which columns hold numbers; starts: rows before which there is a gap.
    """

    def kind(place: int) -> str | None:
        return "number" if numbers[place] else None

    head = [tag("th", *_words(cell), scope="col", class_=kind(place)) for place, cell in enumerate(header)]
    body = []
    for number, row in enumerate(rows):
        cells = [
            tag("th", cell, scope="row", class_=kind(place)) if place == 0 else tag("td", cell, class_=kind(place))
            for place, cell in enumerate(row)
        ]
        body.append(tag("tr", cells, class_="start" if number in starts else None))
    return tag(
        "table",
        tag("caption", caption) if caption else None,
        tag("thead", tag("tr", head)),
        tag("tbody", body),
        class_=f"sortable {class_}".strip(),
    )


def _words(cell: Content) -> list[Content]:
    """A line break of a header is a place to break it, which a wide column need not."""
    return [one_line(cell)] if isinstance(cell, str) else [cell]


def table_of(table: Table) -> list[Element]:
    """The panels of a table of the study, one below the other, and its notes; the same cells as in its Markdown."""
    parts: list[Element] = []
    for panel in table.panels:
        header, rows = panel.cells()
        groups = [[row.get(name) for name in table.group] for row in panel.rows]
        starts = frozenset(place for place in range(1, len(rows)) if groups[place] != groups[place - 1])
        made = grid(
            header,
            [[cell_of(text) for text in cells] for cells in rows],
            [column.is_number for column in panel.columns],
            caption=panel.caption,
            starts=starts,
        )
        parts.append(boxed(made, panel.caption))
    if table.notes:
        parts.append(tag("ul", [tag("li", _note(note)) for note in table.notes], class_="notes"))
    return parts


LONGEST_NOTE = 700
"""Characters: of a longer note, which names many runs, the beginning is shown."""


def _note(note: str) -> Content:
    if len(note) <= LONGEST_NOTE:
        return note
    return folded(f"{note[:100].rsplit(' ', 1)[0]} …", note)


def cell_of(text: str) -> Content:
    """A cell of a table; the half-width of an interval in smaller print, and no break within a number."""
    if text == NOTHING:
        return tag("span", text, class_="nothing")
    number, sign, half_width = text.partition(" ± ")
    return [number, tag("span", f"\u00a0± {half_width}", class_="interval")] if sign else text


# --- texts beside tables and figures


def paragraphs(text: str) -> list[Element]:
    """The paragraphs of reStructuredText that has no other markup than **strong**, *emphasis* and ``code``."""
    blocks = [" ".join(block.split()) for block in re.split(r"\n\s*\n", text) if block.strip()]
    return [tag("p", _inline(block)) for block in blocks]


INLINE = {"**": "strong", "*": "em", "``": "code"}


def _inline(text: str) -> list[Content]:
    found: list[Content] = []
    for part in re.split(r"(\*\*.+?\*\*|\*[^*\s].*?\*|``.+?``)", text):
        mark = next((mark for mark in INLINE if len(part) > 2 * len(mark) and part[: len(mark)] == mark), None)
        found.append(tag(INLINE[mark], part[len(mark) : -len(mark)]) if mark else part)
    return found


def plain(text: str) -> str:
    """The first sentence of such a text, without markup."""
    words = re.sub(r"\*\*|``|\*", "", " ".join(text.split()))
    return re.split(r"(?<=[.:])\s", words, maxsplit=1)[0]


def folded(summary: Content, *content: Content, class_: str | None = None, id: str | None = None) -> Element:
    """What is shown on demand."""
    return tag("details", tag("summary", summary), *content, class_=class_, id=id)
