"""Writing so that nothing is ever half-written: to a temporary name, then rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from discobeta import processes
from discobeta.errors import UserError, first_line, shorten


@contextmanager
def replacing(path: str | Path, check: Callable[[], None] | None = None) -> Iterator[Path]:
    """A temporary path beside `path` (same ending) that takes its place when the block ends well.

    File or directory; a link stays, and what it points to is replaced. If the block fails, the temporary is
    removed and `path` is as it was; what killed processes of this machine have left beside `path` is swept away
    first. An old directory is moved aside as a whole before it is removed, so nobody ever reads a half of it.

    check: called right before anything is replaced; it refuses by raising.
    """
    path = Path(os.path.realpath(path) if os.path.islink(path) else os.path.abspath(path))  # a link stays one
    temporary = beside(path, "partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        yield temporary
        _open_to_readers(temporary)
        if check is not None:
            check()
        if temporary.is_dir() and path.is_dir():
            before = beside(path, "before")
            os.rename(path, before)
            try:
                os.rename(temporary, path)
            except OSError:  # somebody else's has come meanwhile
                if not path.exists():
                    os.rename(before, path)
                raise
            remove(before)
        else:
            os.replace(temporary, path)
    except OSError as error:
        raise writing_error(path, error) from error
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))  # how safetensors, written in Rust, reports an OSError
        if number is None:
            raise
        raise writing_error(path, OSError(int(number[1]), os.strerror(int(number[1])))) from error
    finally:
        with suppress(OSError):  # of a read-only file system, say, which has been said
            remove(temporary)


def beside(path: Path, kind: str) -> Path:
    """A new name beside `path` that `sweep` knows; kind: partial, or before for what it replaces."""
    return path.with_name(f".{path.stem}.{kind}-{processes.tag()}-{uuid.uuid4().hex[:8]}{path.suffix}")


def sweep(path: Path) -> None:
    """Clear away what `replacing(path)` has left behind in processes of this machine that were killed.

    One that was killed between its two renamings has left the old directory aside, which goes back.
    """
    if not path.parent.is_dir():
        return
    for leftover, kind in _leftovers(path.parent, re.escape(path.stem), re.escape(path.suffix)):
        with suppress(OSError):
            if kind == "before" and not path.exists():
                os.rename(leftover, path)
            else:
                remove(leftover)


def sweep_all(folder: Path) -> None:
    """Remove what was being written into `folder` by processes that were killed."""
    for leftover, _ in _leftovers(folder, ".+", r"(?:\.\w+)?"):
        with suppress(OSError):
            remove(leftover)


def _leftovers(folder: Path, stem: str, suffix: str) -> list[tuple[Path, str]]:
    name = re.compile(rf"\.{stem}\.(partial|before)-([0-9a-f]{{8}}-\d+)-[0-9a-f]{{8}}{suffix}")
    matches = [(path, name.fullmatch(path.name)) for path in folder.iterdir()]
    return [(path, match[1]) for path, match in matches if match and processes.tag_is_dead(match[2])]


def remove(path: Path) -> None:
    """A file, a link or a whole directory; nothing if there is none. What a link points to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _open_to_readers(path: Path) -> None:
    """Modes as the umask has them: some libraries write files that only their owner may read."""
    mask = os.umask(0)
    os.umask(mask)
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(0o666 & ~mask)


def writing_error(path: str | Path, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"no space left on the device while writing {path}; nothing was half-written")
    return UserError(f"cannot write {path}: {error.strerror or error}")


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Sorted keys, so that equal values give equal bytes. NaN is refused: it is not JSON."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """What `write_json` writes."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def write_sealed(path: str | Path, value: dict[str, Any]) -> None:
    """`write_json` of a mapping with a `seal` over its content: a record of ours that `read_sealed` trusts."""
    write_json(path, {**value, "seal": _seal(value)})


def read_sealed(path: str | Path) -> dict[str, Any]:
    """What `write_sealed` wrote. Raises UserError for what somebody else wrote, or what was changed since."""
    value = read_mapping(path)
    seal = value.pop("seal", None)
    if seal is None:
        raise UserError(f"{path} was not written by this version of discobeta (it has no seal)")
    if seal != _seal(value):
        raise UserError(f"{path} was changed after it was written (its seal does not fit)")
    return value


def _seal(value: dict[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def read_mapping(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object, not {type(value).__name__}")
    return value


def sha256(path: str | Path) -> str:
    """sha256 of a file's content, in hexadecimal."""
    check_regular(path)
    try:
        with Path(path).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def check_regular(path: str | Path) -> None:
    """Refuse what is there and is no file with an end: a directory, a pipe, a device."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: not even a name
        return
    except OSError as error:
        raise UserError(f"cannot read {shorten(str(path), 80)}: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is not a regular file")


def read_json(path: str | Path) -> Any:
    check_regular(path)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {first_line(error)}") from None
    except (ValueError, RecursionError):  # also a number of 5,000 digits, and what is not UTF-8
        raise UserError(f"{path} is not valid JSON") from None
