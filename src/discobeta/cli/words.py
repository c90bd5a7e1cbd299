"""What commands have in common: how a run and a study are named and read, and what is said of a wrong option."""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import NoReturn

from discobeta.design.config import RunConfig
from discobeta.design.yaml_text import parse_overrides, read_yaml
from discobeta.errors import UserError, did_you_mean, shorten


class Parser(argparse.ArgumentParser):
    """Options in full, since a cut one may be another program's (`--config` is no `--configfile`), and one line of
    what would be right where they are not."""

    def __init__(self, *args, **keywords):
        super().__init__(*args, **{"allow_abbrev": False} | keywords)
        self.words: list[str] = []

    def parse_known_args(self, args=None, namespace=None):
        self.words = list(sys.argv[1:] if args is None else args)
        if self._subparsers is None:
            for word in self.words[: self.words.index("--")] if "--" in self.words else self.words:
                option = word.partition("=")[0]
                if re.match("--[A-Za-z]", option) and option not in self._option_string_actions:
                    self._refuse(f"unknown option {shorten(option, 80)}{self._option_like(option)}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """One line on standard error, and exit status 2."""
        if chosen := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", message, re.DOTALL):
            names = [name.strip(" '") for name in chosen[2].split(",")]
            near = did_you_mean(chosen[1], names) or f"; it may be {', '.join(names)}"
            message = f"{message[: chosen.start()]}{shorten(chosen[1], 80)!r} is none{near}"
        self._refuse(message + self._mended())

    def _refuse(self, message: str) -> NoReturn:
        message = " ".join(message.split())
        print(f"{self.prog}: {message} (`{self.prog} --help` explains)", file=sys.stderr)
        sys.exit(2)

    def _option_like(self, option: str) -> str:
        """Which option may be meant by one that is none."""
        known = [name for name in self._option_string_actions if name.startswith("--")]
        if option == "--config" and "--configfile" in known:
            mended = self._mended()
            return mended or ": --configfile STUDY.yaml names a study, and --set KEY=VALUE changes keys of it"
        if option == "--configfile" and "--set" in known:
            return ": this command takes a run; `discobeta plan --configfile STUDY.yaml` lists those of a study"
        begun = [name for name in known if name.startswith(option)]
        if len(begun) == 1:
            return f"; did you mean {begun[0]!r}?"
        return did_you_mean(option.strip("-"), [name.strip("-") for name in known], "--").replace("--'", "'--")

    def _mended(self) -> str:
        """What else the words were meant for."""
        free = [word for word in self.words if not word.startswith("-")]
        files = [word for word in free if re.search(r"\.(ya?ml|json)$", word)]
        if "--configfile" in self._option_string_actions and "--configfile" not in self.words and files:
            return f"; did you mean --configfile {shorten(files[0], 80)}?"
        if "--set" in self._option_string_actions and "--set" in self.words and files:
            return "; --set takes all words after it: name the file before it"
        if (pairs := [word for word in free if re.match(r"\w[\w.]*=", word)]) and "--set" not in self.words:
            return f"; did you mean --set {shorten(pairs[0], 80)}?"
        return ""


def command(commands, name: str, function, help: str, more: str | None = None) -> argparse.ArgumentParser:
    """The parser of one command; `function(arguments)` carries it out and returns its exit status, or None for 0.

    more: what stands below its options.
    """
    sub = commands.add_parser(name, help=help, description=help, epilog=more)
    sub.set_defaults(command=function)
    return sub


def overridable(sub: argparse.ArgumentParser, help: str = "override keys") -> None:
    sub.add_argument("--set", nargs="+", default=[], action="extend", metavar="KEY=VALUE", help=help)


KEYS_OF_A_RUN = "All keys: `discobeta keys` or docs/reference/run.md; for editors workflow/schemas/run.schema.json."
KEYS_OF_A_STUDY = (
    "All keys: `discobeta keys study` or docs/reference/study.md; for editors workflow/schemas/study.schema.json."
)


def run_command(commands, name: str, function, help: str) -> argparse.ArgumentParser:
    """A command that takes a run's YAML."""
    sub = command(commands, name, function, help, KEYS_OF_A_RUN)
    sub.add_argument("run", metavar="RUN.yaml", help="flat run config; - reads standard input")
    overridable(sub)
    return sub


def study_command(commands, name: str, function, help: str) -> argparse.ArgumentParser:
    """A command that takes a study's YAML."""
    sub = command(commands, name, function, help, KEYS_OF_A_STUDY)
    sub.add_argument("--configfile", nargs="+", required=True, metavar="STUDY.yaml", help="later files override")
    overridable(sub)
    return sub


def run_config(arguments: argparse.Namespace) -> RunConfig:
    config, notes = read_run(arguments)
    for note in notes if is_main_process() else ():
        print(f"discobeta: {note}", file=sys.stderr)
    return config


def read_run(arguments: argparse.Namespace) -> tuple[RunConfig, list[str]]:
    """The checked config of a run's YAML, and a line for each setting that means nothing."""
    settings = read_yaml(arguments.run)
    if "study" in settings and "stage" not in settings:
        raise UserError(
            f"{arguments.run} is a study and no run: `snakemake --cores all --configfile {arguments.run}` trains its "
            "runs, `discobeta plan --configfile` lists them"
        )
    return RunConfig.from_mapping(settings | parse_overrides(arguments.set), str(arguments.run))


def read_study(arguments: argparse.Namespace):
    from discobeta.design.study import Study

    for name in arguments.configfile:
        if re.match(r"\w[\w.]*=", name) and not os.path.exists(name):
            raise UserError(f"--configfile: there is no file {shorten(name, 80)}; --set {shorten(name, 80)} sets a key")
    return Study.read(arguments.configfile, arguments.set)


def is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
