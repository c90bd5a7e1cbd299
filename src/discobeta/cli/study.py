"""Commands of a study: its plan, its cost, what it needs, its tables, figures and page."""

from __future__ import annotations

import argparse
import json
import re
from contextlib import suppress
from pathlib import Path

from discobeta.cli.words import read_study, study_command
from discobeta.errors import UserError, shorten


def add_to(commands) -> None:
    study_command(commands, "plan", plan, "say what a study needs and whether it is here, and list its runs")
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
    study_command(commands, "headline", headline, "print the means of a study that has run, and where its tables are")
    sub = study_command(commands, "status", status, "say what of a study is done, runs, waits or has failed")
    sub.add_argument("--watch", nargs="?", type=_seconds, const=2.0, metavar="SECONDS", help="look again and again")
    sub.add_argument(
        "--json", action="store_true", help="as JSON, every job with its state; with --watch one line a look"
    )
    study_command(commands, "fetch", fetch, "download model and data of a study, for nodes without a network")
    for name, function, help in (
        ("report", report, "write tables, figures and the page to read of a study, from the runs that count"),
        ("tables", tables, "write the tables of a study"),
        ("figures", figures, "write the figures of a study"),
        ("page", page, "write the page of a study alone: report.html, with tables and figures in it"),
    ):
        sub = study_command(commands, name, function, help)
        sub.add_argument("--strict", action="store_true", help="write nothing unless every run counts")
    sub.add_argument("--drawn", action="store_true", help="take the figures of the study as they stand, draw none")


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
    from discobeta.data import counts
    from discobeta.design import cost as study_cost

    card = study_cost.bytes_of(arguments.memory) if arguments.memory else None
    study = read_study(arguments)
    rows = counts.rows_given(arguments.rows) or _counted(study)
    guess, unable = None, ""
    if rows and not study.sft and (study.environment == "cuda" or arguments.card):
        from discobeta.run.flops import Arithmetic

        try:
            guess = Arithmetic(study, arguments.card or "A100", rows)
        except UserError as error:  # what was measured is known all the same
            if arguments.card:
                raise
            unable = str(error)
    print(study_cost.report(study, arguments.measured, rows, guess, unable))
    if arguments.memory is not None:
        from discobeta.run import memory

        print("\n".join(memory.report(study, card)))


def _counted(study):
    """The rows of the study's pairs, and of the prompts if it has others, as far as they can be counted from here."""
    from discobeta.data import counts
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
    return counts.Count(pairs.train, pairs.held_out, pairs.why, prompts and prompts.train)


def headline(arguments: argparse.Namespace) -> None:
    from discobeta.report import headline as study_headline

    print(study_headline.headline(read_study(arguments)))


def status(arguments: argparse.Namespace) -> None:
    from discobeta.report import status as study_status

    with suppress(KeyboardInterrupt):  # there is nothing to lose
        watched = study_status.Watched(read_study(arguments), arguments.configfile, arguments.set)
        if arguments.watch is not None:
            study_status.watch(watched, arguments.watch, arguments.json)
        elif arguments.json:
            print(json.dumps(study_status.as_mapping(watched.look()), indent=1, ensure_ascii=False))
        else:
            print(study_status.text(watched.look()))


def _seconds(text: str) -> float:
    seconds = float(text) if re.fullmatch(r"[0-9]{1,6}(\.[0-9]+)?", text) else 0.0
    if seconds <= 0:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} should be a number of seconds above 0")
    return seconds


def fetch(arguments: argparse.Namespace) -> None:
    from discobeta.inputs import fetch as study_fetch

    study_fetch.fetch(read_study(arguments))


def report(arguments: argparse.Namespace) -> None:
    from discobeta import report as study_report

    results = _results(arguments, curves=True)
    study_report.write(results)
    study = results.study
    print(f"tables: {study.tables_directory}   figures: {study.figures_directory}")
    print(f"to read, in a browser: {study.directory / 'report.html'}")


def tables(arguments: argparse.Namespace) -> None:
    from discobeta.report import tables as study_tables

    study_tables.write(_results(arguments, curves=False))


def figures(arguments: argparse.Namespace) -> None:
    from discobeta.report import figures as study_figures

    study_figures.write(_results(arguments, curves=True))


def page(arguments: argparse.Namespace) -> None:
    from discobeta.report import page as study_page

    print(study_page.write(_results(arguments, curves=True), drawn=arguments.drawn))


def _results(arguments: argparse.Namespace, *, curves: bool):
    from discobeta.report.results import Results

    results = Results(read_study(arguments), curves=curves, weights=arguments.strict)
    if arguments.strict:
        results.require_all()
    return results
