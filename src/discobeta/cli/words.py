"""What commands have in common: how a run and a study are named and read."""

from __future__ import annotations

import argparse
import os
import sys

from discobeta.design.config import RunConfig


def command(commands, name: str, function, help: str) -> argparse.ArgumentParser:
    """The parser of one command; `function(arguments)` carries it out and returns its exit status, or None for 0."""
    sub = commands.add_parser(name, help=help, description=help)
    sub.set_defaults(command=function)
    return sub


def overridable(sub: argparse.ArgumentParser, help: str = "override keys") -> None:
    sub.add_argument("--set", nargs="+", default=[], action="extend", metavar="KEY=VALUE", help=help)


def run_command(commands, name: str, function, help: str) -> argparse.ArgumentParser:
    """A command that takes a run's YAML."""
    sub = command(commands, name, function, help)
    sub.add_argument("run", metavar="RUN.yaml", help="flat run config; - reads standard input")
    overridable(sub)
    return sub


def study_command(commands, name: str, function, help: str) -> argparse.ArgumentParser:
    """A command that takes a study's YAML."""
    sub = command(commands, name, function, help)
    sub.add_argument("--configfile", nargs="+", required=True, metavar="STUDY.yaml", help="later files override")
    overridable(sub)
    return sub


def run_config(arguments: argparse.Namespace) -> RunConfig:
    config, notes = RunConfig.read(arguments.run, arguments.set)
    for note in notes if is_main_process() else ():
        print(f"discobeta: {note}", file=sys.stderr)
    return config


def read_study(arguments: argparse.Namespace):
    from discobeta.design.study import Study

    return Study.read(arguments.configfile, arguments.set)


def is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
