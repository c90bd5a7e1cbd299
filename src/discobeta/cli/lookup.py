"""Commands that look something up: the grid, the keys, one run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from discobeta.cli.words import command, overridable, read_run
from discobeta.design.arms import FLAGS, grid
from discobeta.design.stages import BASE_STAGE, STAGES
from discobeta.errors import UserError


def add_to(commands) -> None:
    sub = command(
        commands, "grid", show_grid, "show the 48 cells: which are trained, which stand for another, which are refused"
    )
    sub.add_argument("--json", action="store_true", help="as a list of objects")
    sub.add_argument("--stage", choices=STAGES, help="only one stage")

    sub = command(
        commands,
        "keys",
        show_keys,
        "list the keys of runs and studies, or explain those that a word finds",
        f"E.g. `keys dpo`, `keys pref_beta`, `keys ppo kl`, `keys template`. The same as pages: {PAGES}.",
    )
    sub.add_argument(
        "words", nargs="*", metavar="WORD",
        help=f"first, if wanted, whose keys ({', '.join(WHOSE)}); then a name, also another program's, or words of the "
        "meaning",
    )  # fmt: skip
    sub.add_argument("--json", action="store_true", help="as a list of objects")

    sub = command(
        commands,
        "show",
        show_run,
        "say what a run is or would be: arm, settings, state, results, what it reads, how to take it on",
        "Nothing is written, trained or downloaded.",
    )
    sub.add_argument("run", metavar="RUN.yaml|RUN_DIR", help="a run's YAML (- reads standard input) or its directory")
    overridable(sub, "override keys of the YAML")
    sub.add_argument("--json", action="store_true", help="as one object")


WHOSE = ("run", BASE_STAGE, *STAGES, "study")
PAGES = "docs/reference/run.md, study.md and names.md"


def show_grid(arguments: argparse.Namespace) -> None:
    cells = grid((arguments.stage,) if arguments.stage else STAGES)
    if arguments.json:
        print(json.dumps([cell.row() for cell in cells], indent=1))
        return
    print("  ".join(("stage", *FLAGS)), " status", sep="")
    for cell in cells:
        switches = "  ".join(("yes" if cell.flags[name] else "-").center(len(name)) for name in FLAGS)
        shown = {"run": cell.arm, "same-as": f"same as {cell.arm}", "refused": f"refused: {cell.reason}"}[cell.status]
        status = f"run ({shown})" if cell.status == "run" else shown
        print(f"{cell.stage:5}  {switches}  {status}")


def show_keys(arguments: argparse.Namespace) -> None:
    from discobeta.design import keys

    of, *words = arguments.words if arguments.words[:1] and arguments.words[0] in WHOSE else [None, *arguments.words]
    named, rest = keys.find(words, of) if words else ([], keys.listed(of))
    if arguments.json:
        print(json.dumps([vars(key) for key in named + rest], indent=1, ensure_ascii=False))
        return
    if not named and len(rest) == 1:
        named, rest = rest, []
    parts = [keys.in_full(key) for key in named]
    if rest:
        parts.append("\n".join([*(["also:"] if named else []), keys.as_lines(rest)]))
    print("\n\n".join(parts))


def show_run(arguments: argparse.Namespace) -> None:
    from discobeta.report import show

    if Path(arguments.run).is_dir():
        if arguments.set:
            raise UserError(
                f"--set {arguments.set[0]}: a run directory is shown as it is; with a YAML it says what would be"
            )
        sheet = show.of_directory(Path(arguments.run))
    else:
        config, notes = read_run(arguments)
        words = [arguments.run, *(["--set", *arguments.set] if arguments.set else [])]
        sheet = show.of_config(config, notes, arguments.run, words)
    print(json.dumps(sheet.as_json(), indent=1, ensure_ascii=False) if arguments.json else sheet.text())
