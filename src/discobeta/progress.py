"""How far something has got: a bar on a terminal, and elsewhere, as in the log of a job, a plain line now and then."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

EVERY = 30.0
"""Seconds between two lines; what takes less than that leaves none."""


def bar(total: int, what: str, unit: str, *, done: int = 0, shown: bool = True) -> tqdm | Lines:
    """Something with `update(n)` and `set_postfix(mapping)`, to be closed at the end or used as a context.

    what, unit: its label, and what is counted; done: how many of these, of `total`, at the start.
    """
    is_terminal = getattr(sys.stderr, "isatty", lambda: False)()
    if shown and not is_terminal:
        return Lines(total, what, unit, done)
    return tqdm(total=total, desc=what, unit=unit, initial=done, mininterval=0.5, disable=not shown)


class Lines:
    """What tqdm's bar is, in lines of their own: no carriage return, nothing that is drawn over."""

    def __init__(self, total: int, what: str, unit: str, done: int):
        self.total, self.what, self.unit = total, what, unit
        self.begun_at = self.done = done
        self.begun = self.said = time.monotonic()
        self.values = ""

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def set_postfix(self, values: dict[str, str]) -> None:
        self.values = ", ".join(f"{name} {value}" for name, value in values.items())

    def update(self, count: int = 1) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.said < EVERY:
            return
        self.said = now
        each = (now - self.begun) / (self.done - self.begun_at)
        left = f", about {duration(each * (self.total - self.done))} left" if self.done < self.total else ""
        values = f"; {self.values}" if self.values else ""
        print(f"{self.what}: {self.unit} {self.done} of {self.total}{left}{values}", file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


def duration(seconds: float) -> str:
    """In two units at most: 8 s, 2 min 5 s, 3 h 20 min, 2 d 4 h."""
    seconds = round(seconds)
    for size, name, smaller, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            parts = [f"{seconds // size} {name}", f"{rest} {small}" if (rest := seconds % size // smaller) else ""]
            return " ".join(filter(None, parts))
    return f"{seconds} s"
