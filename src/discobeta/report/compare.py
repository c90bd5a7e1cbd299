"""Idle = absent, byte for byte: the comparison of two runs.

Compared is what a run computed: weights, log, metrics and per-example predictions. Not compared is
what names the arm or the hour: config.yaml, heads.*, provenance.json and the costs.
"""

from __future__ import annotations

import os
from pathlib import Path

from discobeta.errors import UserError

OUTCOMES = {
    "weights": ("adapter/*.safetensors", "model/*.safetensors"),
    "log": ("log.jsonl",),
    "metrics": ("metrics.json",),
    "examples": ("examples.parquet",),
}
"""What is compared, and the files (as patterns in a run directory) that hold it."""

EQUAL = "equal"


def compare(a: Path, b: Path) -> dict[str, str]:
    """File -> verdict, for every file of OUTCOMES that either run directory holds.

    A verdict is "equal", "differs at byte N (of m, of n bytes)" with N counted from 0, or
    "missing in <directory>".
    """
    a, b = Path(a), Path(b)
    names = dict.fromkeys(name for outcome in OUTCOMES for name in files_of(outcome, a, b))
    return {name: verdict(a / name, b / name) for name in names}


def files_of(outcome: str, *directories: Path) -> list[str]:
    """The files of one outcome that at least one of the run directories holds, as relative paths."""
    found = {
        path.relative_to(directory).as_posix()
        for directory in directories
        for pattern in OUTCOMES[outcome]
        for path in directory.glob(pattern)
    }
    return sorted(found)


def verdict(a: Path, b: Path) -> str:
    for path in (a, b):
        if not path.is_file():
            return f"missing in {path.parent}"
    position = first_difference(a, b)
    return EQUAL if position is None else f"differs at byte {position} (of {_size(a)}, of {_size(b)} bytes)"


def first_difference(a: Path, b: Path, chunk: int = 1 << 20) -> int | None:
    """Offset from 0 of the first byte that differs, or at which the shorter file ends; None if equal."""
    offset = 0
    try:
        with a.open("rb") as left, b.open("rb") as right:
            while True:
                x, y = left.read(chunk), right.read(chunk)
                if x != y:
                    return offset + len(os.path.commonprefix([x, y]))
                if not x:
                    return None
                offset += len(x)
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None


def _size(path: Path) -> str:
    return f"{path.stat().st_size:,}"
