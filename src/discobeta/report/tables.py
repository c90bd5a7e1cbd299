"""The files of a study's tables."""

from __future__ import annotations

from pathlib import Path

from discobeta.files import write_text
from discobeta.folders import claim
from discobeta.report import outputs
from discobeta.report.collect import config_text
from discobeta.report.render import Table
from discobeta.report.results import Results


def write(results: Results) -> None:
    """The tables that `outputs` names, and the config of the digest, into `study.directory`/tables."""
    study = results.study
    directory = study.tables_directory
    tables = [(output, output.make(results)) for output in outputs.tables(study)]
    claim(directory, "discobeta tables", ["config.yaml", *(name for output, _ in tables for name in output.files)])
    write_text(directory / "config.yaml", config_text(study))
    for output, table in tables:
        for ending in output.row.endings:
            write_text(directory / f"{output.name}.{ending}", table.text(ending, output.name))


def write_one(table: Table, directory: Path, name: str, made_by: str) -> None:
    """A table of more than one study. name: stem of its files."""
    endings = ("csv", "md", "tex")
    claim(directory, made_by, [f"{name}.{ending}" for ending in endings])
    for ending in endings:
        write_text(directory / f"{name}.{ending}", table.text(ending, name))
