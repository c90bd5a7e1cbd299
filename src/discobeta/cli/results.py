"""Commands that set results side by side: runs, studies."""

from __future__ import annotations

import argparse
from pathlib import Path

from discobeta.cli.words import command
from discobeta.errors import UserError


def add_to(commands) -> None:
    sub = command(
        commands, "compare", compare,
        "set runs side by side: settings, metrics and, of two, files byte for byte (exit status 1 if they differ); "
        "or two studies, cell by cell and seed by seed",
    )  # fmt: skip
    sub.add_argument("directories", type=Path, nargs="*", metavar="RUN_DIR", help="two runs, or more")
    sub.add_argument(
        "--studies", type=Path, nargs=2, metavar="DIR",
        help="two studies instead: folders of results/, or of published numbers (metrics.csv, config.yaml)",
    )  # fmt: skip
    sub.add_argument(
        "--metrics", nargs="+", default=[], metavar="NAME",
        help="of two studies: these metrics of metrics.csv, all tested; else those by which arms are compared",
    )  # fmt: skip
    sub.add_argument(
        "--output", type=Path, metavar="DIR", help="of two studies: also write studies.csv, .md and .tex there"
    )
    sub.add_argument("--json", action="store_true", help="everything, as one object")


def compare(arguments: argparse.Namespace) -> int:
    if arguments.studies:
        if arguments.directories:
            raise UserError("compare takes run directories, or two studies behind --studies, not both")
        return _compare_studies(arguments)
    if len(arguments.directories) < 2:
        raise UserError("compare needs two run directories or more, or --studies and two folders of studies")
    if arguments.metrics or arguments.output:
        raise UserError("--metrics and --output are for two studies: --studies DIR DIR")
    from discobeta.report.side_by_side import side_by_side

    found = side_by_side(arguments.directories)
    print(found.json() + "\n" if arguments.json else found.text(), end="")
    return found.status


def _compare_studies(arguments: argparse.Namespace) -> int:
    from discobeta.report import studies, tables

    found = studies.pair(tuple(arguments.studies), arguments.metrics)
    table = found.table()
    print(found.json() + "\n" if arguments.json else table.markdown(), end="")
    if arguments.output:
        tables.write_one(table, arguments.output, "studies", "discobeta compare")
    return 0
