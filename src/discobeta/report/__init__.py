"""Many runs -> what a paper prints: tables and figures, and a page to read, from whatever runs are there and count."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from discobeta.report.results import Results


def write(results: Results) -> None:
    """Everything: tables and figures, in folders of these names in the study's directory, and report.html beside."""
    from discobeta.report import figures, page, tables

    tables.write(results)
    figures.write(results)
    page.write(results, drawn=True)
