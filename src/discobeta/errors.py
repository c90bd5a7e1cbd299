"""The one exception that is a message to the user and not a bug, and how other exceptions become one."""

from __future__ import annotations

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

    what: a name for them, before the one that is meant; likeness: from 0 to 1, the share of letters that must be right.
    """
    near: dict[float, list[str]] = {}
    for other in dict.fromkeys(names):
        if (slips := _slips_between(name[:100], other, 1 - likeness)) is not None:
            near.setdefault(slips, []).append(other)
    best = near[min(near)] if near else []
    if not best or len(best) > 2:  # of three that are alike none is near
        return ""
    return f"; did you mean {what}{' or '.join(map(repr, best))}?"


def _slips_between(name: str, other: str, share: float) -> float | None:
    """How many slips make one name of the other; None if they are two names.

    Names are words. A slip is a wrong, missing, additional or swapped letter *within* a word, of which `share` of the
    letters may have one, and of a word, or a name of four letters, one; another word is another name (`batch_size` is
    no `val_size`). Words in another order, or joined otherwise, are the same name, and one word more or less is a slip
    beyond all others, if the rest is long enough to be meant (`dynamic_beta` is `use_dynamic_beta`).
    """
    words, others = (re.sub(r"[\s.-]", "_", text.lower()).split("_") for text in (name, other))
    joined, theirs = "".join(words), "".join(others)
    if joined == theirs or sorted(words) == sorted(others):
        return 0

    def most(length: int, least: int) -> int:
        return max(length >= least, int(share * length + 1e-9))

    if len(words) == len(others):
        slips = [edits(*pair) for pair in zip(words, others, strict=True)]
        lengths = [max(map(len, pair)) for pair in zip(words, others, strict=True)]
        if any(count > most(length, 3) for count, length in zip(slips, lengths, strict=True)):
            return None
        total = sum(slips)
    else:
        total = edits(joined, theirs)
    if total <= most(max(len(joined), len(theirs)), 4):
        return total
    shorter, longer = sorted((words, others), key=len)
    rest = iter(longer)
    if len(longer) - len(shorter) == 1 and len("".join(shorter)) >= 8 and all(word in rest for word in shorter):
        return len(name) + len(other)
    return None


def edits(one: str, other: str) -> int:
    """The fewest letters to change, leave out, put in or swap with their neighbour, each once, that make `other` of
    `one` (Damerau 1964, in the restricted form)."""
    before: list[int] = []
    last = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        row = [i]
        for j, wanted in enumerate(other, 1):
            best = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != wanted))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                best = min(best, before[j - 2] + 1)
            row.append(best)
        before, last = last, row
    return last[-1]


def say(line: str) -> None:
    """One line to the user, of the process that speaks for all."""
    if os.environ.get("RANK", "0") == "0":
        print(f"discobeta: {line}", file=sys.stderr)


def and_more(names: list[str]) -> str:
    """What follows the first of several names: " (and 2 more)"."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
