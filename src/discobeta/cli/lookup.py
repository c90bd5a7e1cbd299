"""Commands that look something up: the grid, the keys."""

from __future__ import annotations

import argparse
import json

from discobeta.cli.words import command
from discobeta.design.arms import FLAGS, grid
from discobeta.design.stages import BASE_STAGE, STAGES


def add_to(commands) -> None:
    sub = command(
        commands, "grid", show_grid, "show the 48 cells: which are trained, which stand for another, which are refused"
    )
    sub.add_argument("--json", action="store_true", help="as a list of objects")
    sub.add_argument("--stage", choices=STAGES, help="only one stage")

    sub = command(
        commands, "keys", show_keys, "explain the keys of a run, those that one stage reads, or those of a study"
    )
    sub.add_argument("of", nargs="?", choices=(BASE_STAGE, *STAGES, "study"), help="a stage, or study")
    sub.add_argument("--json", action="store_true", help="as a list of objects")


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

    found = keys.study_keys() if arguments.of == "study" else keys.run_keys(arguments.of)
    print(json.dumps([vars(key) for key in found], indent=1) if arguments.json else keys.as_lines(found))
