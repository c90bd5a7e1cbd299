"""Which processes are alive, for files that a process leaves behind when it is killed; and which end with which."""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
from contextlib import suppress
from pathlib import Path


def namespace() -> str:
    """Where process numbers mean what they mean here: this boot, this container. Empty where it cannot be told."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def tag() -> str:
    """This process in a file name: 8 digits of its namespace, and its number."""
    return f"{_digits(namespace())}-{os.getpid()}"


def tag_is_dead(text: str) -> bool:
    """Whether `tag` was that of a process of this very machine that is no more."""
    place, _, number = text.partition("-")
    return bool(namespace()) and place == _digits(namespace()) and not is_alive(int(number))


def is_alive(number: int) -> bool:
    """Whether a process of this number runs here; True where that cannot be told."""
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def end_with(parent: int) -> bool:
    """From now on this process gets SIGTERM when `parent`, which has started it, ends. False: it has ended already."""
    with suppress(OSError, AttributeError):  # only Linux has it
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    return os.getppid() == parent


def _digits(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
