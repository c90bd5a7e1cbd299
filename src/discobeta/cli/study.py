"""Commands of a study: its plan, its cost, what it needs, its tables and figures."""

from __future__ import annotations

import argparse
from pathlib import Path

from discobeta.cli.words import read_study, study_command
from discobeta.errors import UserError


def add_to(commands) -> None:
    study_command(commands, "plan", plan, "list the runs of a study")
    sub = study_command(commands, "cost", cost, "estimate jobs, device-hours and memory of a study from measured rates")
    sub.add_argument(
        "--rows", nargs="+", default=[], action="extend", metavar="NAME=N",
        help="rows, where they are not here to be counted: train=N eval=N, prompts=N of ppo, tokens=N of a row",
    )  # fmt: skip
    sub.add_argument("--card", metavar="NAME", help="the GPU for which what was not measured is estimated (A100)")
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
    from discobeta.design import study

    print(study.plan(read_study(arguments)))


def cost(arguments: argparse.Namespace) -> None:
    from discobeta.design import cost as study_cost

    card = study_cost.bytes_of(arguments.memory) if arguments.memory else None
    study = read_study(arguments)
    rows = study_cost.rows_given(arguments.rows) or _counted(study)
    guess = None
    if rows and not study.sft and (study.environment == "cuda" or arguments.card):
        from discobeta.run.flops import Arithmetic

        guess = Arithmetic(study, arguments.card or "A100", rows)
    print(study_cost.report(study, arguments.measured, rows, guess))
    if arguments.memory is not None:
        from discobeta.run import memory

        print("\n".join(memory.report(study, card)))


def _counted(study):
    """The rows of the study's pairs, and of the prompts if it has others, as far as they can be counted from here."""
    from discobeta.data import counts
    from discobeta.design.cost import Rows
    from discobeta.design.stages import STAGES

    if study.world:
        return None
    found = {}
    for run in study.runs():
        config = study.config(run)
        kind = STAGES[run.stage].rows
        if kind in found:
            continue
        try:
            found[kind] = counts.rows_of(config)
        except UserError:  # of data that is not there, which does not matter where the rows need no counting
            if config.max_steps < 0 and not (study.rows_of(run) / "tokens.json").exists():
                raise
            found[kind] = None
    pairs, prompts = found.get("pairs") or found.get("prompts"), found.get("prompts")
    if pairs is None or ("prompts" in found and prompts is None):
        return None
    return Rows(pairs.train, pairs.held_out, pairs.why, prompts and prompts.train)


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
