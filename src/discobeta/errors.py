"""The one exception that is a message to the user and not a bug, and how other exceptions become one."""

from __future__ import annotations

import difflib
import errno
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

LONGEST = 300
"""Characters of a library's message, or of a value, that are shown."""


class UserError(Exception):
    """Bad input: one or two lines that say what is wrong, where, and what would be right.

    The command line prints it without a traceback and exits with status 2.
    """


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Whatever a library raises in the block becomes `UserError("WHAT: first line of it")`.

    For calls that read what a user has given: what a library raises there is one of dozens of classes.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":  # of what is written in Rust
            amount = lack_of_memory(error)
            reason = first_line(error) if amount is None else f"out of memory{amount}"
            raise UserError(f"{what}: {reason}") from error
        raise


TRAINING_MEMORY = "tokens_per_pass or cutoff_len, or set gradient_checkpointing: true"
"""What a training step needs memory for."""


@contextmanager
def enough_memory(step: str, lower: str) -> Iterator[None]:
    """Running out of memory in the block, or in the function that this decorates, becomes a `UserError`.

    step: what was being done; lower: the settings that it takes its memory for.
    """
    try:
        yield
    except Exception as error:
        if (amount := lack_of_memory(error)) is None:
            raise
        raise UserError(f"out of memory in {step}{amount}: lower {lower}") from error


def lack_of_memory(error: BaseException) -> str | None:
    """How much was asked for, as words in brackets, or "" where that is not said; None if it is another error."""
    text = str(error)
    is_one = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if not is_one and not (isinstance(error, RuntimeError) and re.search(NO_MEMORY, text, re.IGNORECASE)):
        return None
    amount = re.search(r"allocate ([\d.,]+ ?[A-Za-z]+)", text)
    return f" ({amount[1]} were asked for)" if amount else ""


NO_MEMORY = r"out of memory|can(no|')t allocate memory|bad_alloc|_ALLOC_FAILED"
"""In what torch, CUDA and C++ say."""


def first_line(error: BaseException) -> str:
    """The first line of the message, with the class where the message alone says too little."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, OSError) and error.strerror:
        return shorten(f"{error.strerror}: {error.filename}" if error.filename else error.strerror)
    if not lines or isinstance(error, KeyError | RecursionError | AttributeError | TypeError | MemoryError):
        return shorten(": ".join([type(error).__name__, *lines[:1]]))
    return shorten(" ".join(lines[:2] if lines[0].endswith(":") else lines[:1]))


def shown(value: Any) -> str:
    """`repr`, cut where it is long, also of what has none (a number of 5,000 digits, a list in itself)."""
    try:
        return shorten(repr(value), 80)
    except (ValueError, RecursionError):
        return f"a very large {type(value).__name__}"


def shorten(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def did_you_mean(name: str, names: Iterable[str], what: str = "", likeness: float = 0.8) -> str:
    """A question after the one of `names` that `name` may be a slip of; "" if it merely has some letters in common.

    what: a name for them, before the one that is meant; likeness: from 0 to 1 (difflib's ratio), the least.
    """
    near = difflib.get_close_matches(name[:100], list(names), n=1, cutoff=likeness)
    return f"; did you mean {what}{near[0]!r}?" if near else ""


def say(line: str) -> None:
    """One line to the user, of the process that speaks for all."""
    if os.environ.get("RANK", "0") == "0":
        print(f"discobeta: {line}", file=sys.stderr)


def and_more(names: list[str]) -> str:
    """What follows the first of several names: " (and 2 more)"."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
