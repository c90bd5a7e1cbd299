"""Many runs -> what a paper prints: tables and figures, from whatever runs are there."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from discobeta.study import Study


def write(study: Study) -> None:
    """Everything: `study.directory`/tables and `study.directory`/figures."""
    from discobeta.report import figures, tables

    tables.write(study)
    figures.write(study)
