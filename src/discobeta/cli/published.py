"""Commands that read committed numbers of studies, and nothing else."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from discobeta.cli.words import command
from discobeta.errors import UserError


def add_to(commands) -> None:
    sub = _published_command(commands, "verdicts", verdicts, "judge registered hypotheses by the committed numbers")
    sub.add_argument("--json", action="store_true", help="as a list of objects")
    sub.add_argument("--output", type=Path, metavar="DIR", help="also write verdicts.csv, .md and .tex there")
    sub.add_argument(
        "--simulate", type=int, metavar="N",
        help="instead, how often N simulated studies in which there is nothing to find are judged wrongly",
    )  # fmt: skip
    sub = _published_command(
        commands, "paper", paper, "write every table, figure and number of a paper from committed numbers"
    )
    sub.add_argument("--output", type=Path, default=Path("results/published/world/paper"), metavar="DIR")


def _published_command(commands, name: str, function, help: str) -> argparse.ArgumentParser:
    sub = command(commands, name, function, help)
    sub.add_argument(
        "--hypotheses", type=Path, default=Path("config/hypotheses.yaml"), metavar="FILE", help="what is registered"
    )
    sub.add_argument(
        "--results", type=Path, default=Path("results/published/world"), metavar="DIR",
        help="holds a folder with metrics.csv and config.yaml of each study",
    )  # fmt: skip
    return sub


def verdicts(arguments: argparse.Namespace) -> None:
    from discobeta.report import error_rates, hypotheses, tables

    registered = hypotheses.read(arguments.hypotheses)
    made_by = {"hypotheses": hypotheses.digest(arguments.hypotheses)}
    if arguments.simulate is not None:
        if arguments.simulate < 1:
            raise UserError(f"--simulate {arguments.simulate} should be at least 1")
        name, table = "error-rates", error_rates.error_rates(registered, arguments.simulate, made_by)
        rows = table.frame.to_dict("records")
    else:
        found = hypotheses.judge(registered, hypotheses.from_folder(arguments.results))
        name, table = "verdicts", hypotheses.verdicts_table(registered, found, made_by)
        rows = hypotheses.json_rows(registered, found)
    print(json.dumps(rows, indent=1, ensure_ascii=False) if arguments.json else table.markdown(), end="")
    if arguments.output:
        tables.write_one(table, arguments.output, name, f"discobeta {name}")


def paper(arguments: argparse.Namespace) -> None:
    from discobeta.report import hypotheses
    from discobeta.report import paper as study_paper

    registered, digest = hypotheses.read(arguments.hypotheses), hypotheses.digest(arguments.hypotheses)
    made = study_paper.write(arguments.results, registered, digest, arguments.output)
    counts = {"studies": made.studies, "tables": made.tables, "figures": made.figures, "numbers": made.macros}
    print(f"{', '.join(f'{len(of)} {name}' for name, of in counts.items())}: {arguments.output}")
    for name, ids in sorted(made.absent.items()):
        print(f"not there: {name}, asked for by {', '.join(ids)}")
