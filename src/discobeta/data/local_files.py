"""The rows of a local .json, .jsonl or .parquet file, each with where it stands; a broken one costs only itself."""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from discobeta.data.examples import Reason, Unusable
from discobeta.errors import UserError, shown, telling

Row = tuple[str, dict[str, Any] | Unusable]
"""(where it stands, the row or why it could not be read)."""


def file_rows(path: Path) -> Iterator[Row]:
    """The rows of a local file, each with "file:line" (parquet: "file:row"), counted from 1.

    Raises UserError for whatever the readers raise.
    """
    try:
        with telling(f"cannot read {path}"):
            if path.suffix == ".parquet":
                yield from _parquet_rows(path)
                return
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
                start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
                file.seek(0)
                if start.startswith(b"[") and path.name.endswith((".json", ".json.gz")):
                    yield from _array_rows(file.read(), path)
                elif re.match(rb"\[\s*\{", start) and _is_array(content := file.read()):
                    yield from _array_rows(content, path)
                else:
                    file.seek(0)
                    yield from _line_rows(file, path)
    except UserError as error:
        if isinstance(error.__cause__, gzip.BadGzipFile | EOFError | zlib.error):
            raise UserError(f"{path} is not a whole gzip file") from None
        raise


def beginning(path: Path) -> str:
    """The first characters of a file that is no JSON, which say what it is: a table, a page, a pointer of Git LFS."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        return shown(file.read(40).decode(errors="replace"))


def _is_array(content: bytes) -> bool:
    """Whether a .jsonl file is one JSON array, and not lines of which the first one is (or should be) a list."""
    first, _, rest = content.strip().partition(b"\n")
    return content.rstrip().endswith(b"]") and not (rest and first.rstrip().endswith(b"]"))


def _line_rows(file: Any, path: Path) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.strip():
            yield f"{path.name}:{number}", _parsed(line)


def _parsed(line: bytes) -> dict[str, Any] | Unusable:
    try:
        row = DECODER.decode(line.decode())
    except UnicodeDecodeError:
        return Unusable(Reason.NOT_UTF8)
    except (ValueError, RecursionError):
        return Unusable(Reason.NOT_JSON)
    return _row(row)


def _row(value: Any) -> dict[str, Any] | Unusable:
    return value if isinstance(value, dict | Unusable) else Unusable(Reason.WRONG_TYPES)


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Unusable:
    """A JSON object. One in which a key stands twice says two things, of which Python would keep the last."""
    mapping = dict(pairs)
    return mapping if len(mapping) == len(pairs) else Unusable(Reason.KEY_TWICE)


def _integer(digits: str) -> int | float:
    """Python reads integers of up to 4,300 digits; what is longer is beyond all numbers that can be kept."""
    return int(digits) if len(digits) <= 4300 else math.inf


DECODER = json.JSONDecoder(object_pairs_hook=_mapping, parse_int=_integer)


def _array_rows(content: bytes, path: Path) -> Iterator[Row]:
    """The elements of one JSON array. Bytes that are not UTF-8 cost their row, broken syntax the file.

    The decoder takes one element at a time, so that each row's line is known. Bytes that are not UTF-8
    become halves of surrogate pairs, which `read_example` refuses.
    """
    text = content.decode("utf-8-sig", errors="surrogateescape")
    decode, blank = DECODER.raw_decode, re.compile(r"[ \t\r\n]*")
    place, line, counted = text.index("[") + 1, 1, 0
    try:
        place = blank.match(text, place).end()
        while text[place] != "]":
            line, counted = line + text.count("\n", counted, place), place
            row, place = decode(text, place)
            yield f"{path.name}:{line}", _row(row)
            place = blank.match(text, place).end()
            if text[place] == ",":
                place = blank.match(text, place + 1).end()
            elif text[place] != "]":
                raise ValueError
        if text[place + 1 :].strip():
            raise ValueError
    except (ValueError, IndexError, RecursionError):
        line = 1 + text.count("\n", 0, place)
        raise UserError(
            f"{path} is not valid JSON after line {line}; a broken row of a .jsonl file would cost only that row"
        ) from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow.parquet as pq

    number = 0
    with telling(f"{path} is not a readable parquet file"), pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"{path} has two columns {twice!r}")
        for batch in file.iter_batches(batch_size=1000):
            for values in zip(*map(cells, batch.columns), strict=True):
                number += 1
                yield f"{path.name}:{number}", dict(zip(names, values, strict=True))


def cells(column: Any) -> list[Any]:
    """The values of a parquet column. One that Python cannot hold (bytes that are not UTF-8, a date of the year
    300,000) costs its cell, and so no row if nobody reads that column."""
    try:
        return column.to_pylist()
    except Exception:  # Arrow raises what the Python type's constructor does: look cell by cell
        return [_cell(value) for value in column]


def _cell(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return Unusable(Reason.NOT_UTF8)
    except Exception:
        return Unusable(Reason.UNREADABLE)
