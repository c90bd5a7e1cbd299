"""Commands of a study: its plan, its cost, what it needs, its tables and figures."""

from __future__ import annotations

import argparse
from pathlib import Path

from discobeta.cli.words import read_study, study_command
from discobeta.errors import UserError, shorten


def add_to(commands) -> None:
    study_command(commands, "plan", plan, "say what a study needs and whether it is here, and list its runs")
    sub = study_command(commands, "cost", cost, "estimate jobs, device-hours and memory of a study from measured rates")
    sub.add_argument("--measured", type=Path, metavar="TABLES", help="tables of a study that has run")
    sub.add_argument(
        "--memory", nargs="?", const="", metavar="SIZE",
        help="also work out the peak of a GPU's memory from the shapes, and whether it fits a card of SIZE (24GB)",
    )  # fmt: skip
    study_command(commands, "fetch", fetch, "download model and data of a study, for nodes without a network")
    for name, function, help in (
        ("report", report, "write tables and figures of a study from the runs that are there and count"),
        ("tables", tables, "write the tables of a study"),
        ("figures", figures, "write the figures of a study"),
    ):
        sub = study_command(commands, name, function, help)
        sub.add_argument("--strict", action="store_true", help="write nothing unless every run counts")


def plan(arguments: argparse.Namespace) -> None:
    from discobeta.design import study as studies
    from discobeta.inputs import ready

    study = read_study(arguments)
    found = ready.needs(study)
    for need in found:
        print(need.line)
    print(studies.plan(study))
    if missing := [need.text for need in found if need.state == "missing"]:
        raise UserError(f"the study needs what is not here: {shorten('; '.join(missing), 1000)}")


def cost(arguments: argparse.Namespace) -> None:
    from discobeta.design import cost as study_cost

    card = study_cost.bytes_of(arguments.memory) if arguments.memory else None
    study = read_study(arguments)
    print(study_cost.report(study, arguments.measured))
    if arguments.memory is not None:
        from discobeta.run import memory

        print("\n".join(memory.report(study, card)))


def fetch(arguments: argparse.Namespace) -> None:
    from discobeta.inputs import fetch as study_fetch

    study_fetch.fetch(read_study(arguments))


def report(arguments: argparse.Namespace) -> None:
    from discobeta import report as study_report

    results = _results(arguments, curves=True)
    study_report.write(results)
    print(f"tables: {results.study.tables_directory}   figures: {results.study.figures_directory}")


def tables(arguments: argparse.Namespace) -> None:
    from discobeta.report import tables as study_tables

    study_tables.write(_results(arguments, curves=False))


def figures(arguments: argparse.Namespace) -> None:
    from discobeta.report import figures as study_figures

    study_figures.write(_results(arguments, curves=True))


def _results(arguments: argparse.Namespace, *, curves: bool):
    from discobeta.report.results import Results

    results = Results(read_study(arguments), curves=curves, weights=arguments.strict)
    if arguments.strict:
        results.require_all()
    return results
