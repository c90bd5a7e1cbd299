"""`discobeta <command>`: every command is files in, files out.

Bad input ends with one or two lines on standard error and exit status 2, without a traceback.
Heavy libraries are imported by the command that needs them.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

from discobeta import __version__
from discobeta.cli import lookup, published, results, run, study, world
from discobeta.cli.words import Parser, is_main_process
from discobeta.errors import UserError, first_line, lack_of_memory, shorten

EXTRAS = {"trl": "sft"}
"""Packages that the installation has only with an extra of pyproject.toml: package -> extra."""


def main(words: list[str] | None = None) -> int:
    mend_streams()
    settle_libraries()
    try:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that what is held is let go
        arguments = parser().parse_args(words)
        status = arguments.command(arguments) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `discobeta grid | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("discobeta: interrupted; a run goes on from its last checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        _say(error)
    return 2


def settle_libraries() -> None:
    """What libraries are told before they are imported."""
    # compute nodes often have no network: never let an import wait for one
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # peft still calls what transformers has renamed; nothing that a user could act on
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _say(error: Exception) -> None:
    """One line for whatever went wrong. What is no UserError was not foreseen, and its traceback can be asked for."""
    if os.environ.get("DISCOBETA_TRACEBACK"):
        traceback.print_exception(error)
    is_main = is_main_process()
    if "RANK" in os.environ and not (is_main and isinstance(error, UserError)):
        time.sleep(1.5 if is_main else 3)  # another process has this to say, and what started them ends the others
    if isinstance(error, UserError):
        text = str(error)
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        text = f"no space left on the device ({error.filename or 'while writing'})"
    elif (amount := lack_of_memory(error)) is not None:
        text = f"out of memory{amount}"
    elif isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        text = f"{error.name} is not installed: pip install -c constraints.txt -e '.[{EXTRAS[error.name]}]'"
    elif isinstance(error, OSError) and error.errno:
        text = first_line(error)
    else:
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {shorten(' '.join(str(error).split()))}"
        text = f"{what} ({Path(place.filename).name}:{place.lineno}; DISCOBETA_TRACEBACK=1 shows the way there)"
    print(f"discobeta: {text}", file=sys.stderr)


def mend_streams() -> None:
    """Let no print fail: closed streams lead nowhere, and what a terminal cannot show becomes a question mark.

    A closed one must be opened again, or the next file that is opened would get its number and what libraries print.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8"))  # noqa: SIM115
        elif number and hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="replace")


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="discobeta",
        description="Ablation of Gaussian rewards and dynamic beta.",
        epilog="`discobeta keys WORD` finds a key by its name, its meaning or another program's name of it; "
        "`discobeta show RUN.yaml` says what a run would be. Documents: docs/README.md.",
    )
    top.add_argument("--version", action="version", version=f"discobeta {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for part in (lookup, run, world, study, results, published):
        part.add_to(commands)
    return top
