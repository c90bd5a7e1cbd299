"""One live writer per run directory, also when the other one is on another node of a cluster.

The holder's file is touched every few seconds, so a waiting process needs no common clock and no
locks of a network file system: it watches whether the file changes. A holder on this machine whose
process is gone is recognised at once. A holder that has stood still makes sure, before it writes,
that nobody has taken its place (`Hold.confirm`).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from discobeta import files, processes
from discobeta.errors import UserError

BEAT = 5.0
"""Seconds between two touches of the file; a file that is still for four of them has no living holder."""

NAME = ".running.json"


class Hold:
    """A directory that this process holds, while the thread that `holding` starts keeps touching its file."""

    def __init__(self, path: Path, me: dict, waited: bool):
        self.path, self.me = path, me
        self.waited = waited  # somebody else held it first
        self.seen = _now()  # when the file was last known to be ours
        self.stop = threading.Event()

    def confirm(self) -> None:
        """Return when the directory is ours for certain: to be called before anything in it is replaced.

        At once, unless this process has stood still (was suspended, say) for so long that another may
        have taken its place; then not before `beat` has looked, and not at all if another has.
        """
        while _now() - self.seen > 2 * BEAT:
            time.sleep(BEAT / 50)

    def beat(self) -> None:
        while not self.stop.wait(BEAT):
            now = _now()
            try:
                os.utime(self.path)
                holder = read_holder(self.path)
            except FileNotFoundError:
                holder = None
            except OSError:  # the file system is away; as long as it is, nothing is confirmed
                continue
            if holder is None:  # gone, or put aside for an instant by `take_away`, which puts back what is not dead
                time.sleep(BEAT / 10)
                holder = read_holder(self.path)
            if holder == {}:  # damaged: no process leaves it so (see `_create`), and we have just touched it
                with suppress(OSError):
                    files.write_text(self.path, json.dumps(self.me))
            elif holder == self.me:
                self.seen = now
            else:  # somebody holds it, or has held it meanwhile
                self.give_way()

    def give_way(self) -> None:
        """End this process."""
        directory = self.path.parent
        print(f"{directory} was taken over by another process, so this one stops", file=sys.stderr, flush=True)
        if (directory / "provenance.json").exists():
            os._exit(0)  # its work is done; if this failed now, Snakemake would remove that file
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def holding(directory: Path) -> Iterator[Hold]:
    """Hold `directory` for the block.

    Waits, and says so once, while another live process holds it. A process that has been still for
    so long that another took its place (a suspended one, say) ends itself when it moves again.
    """
    path, me = directory / NAME, this_holder()
    created = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        hold = Hold(path, me, acquire(path, me))
        files.sweep_all(directory)  # nobody else is writing here
    except OSError as error:
        raise files.writing_error(path, error) from error
    beating = threading.Thread(target=hold.beat, daemon=True)
    beating.start()
    try:
        yield hold
    finally:
        hold.stop.set()
        beating.join()
        with suppress(OSError):  # of a file system that has become read-only: what is held is then seen to be dead
            if read_holder(path) == me:
                path.unlink(missing_ok=True)
            if created and not any(directory.iterdir()):
                directory.rmdir()


def acquire(path: Path, me: dict) -> bool:
    waited = announced = False
    while not _create(path, me):
        path.parent.mkdir(parents=True, exist_ok=True)  # whoever held it may have taken an empty one away
        holder = read_holder(path)
        if holder is None:  # gone meanwhile
            continue
        if path.is_dir():
            raise UserError(f"{path} is a directory, where a run says by whom it is being written; move it away")
        if is_dead(holder):
            take_away(path, holder)
            continue
        if not announced:
            print(f"{path.parent} {_words_of(holder)}: waiting", file=sys.stderr, flush=True)
            announced = True
        if _changes(path):
            waited = True
        else:
            take_away(path, holder)
    return waited


def _words_of(holder: dict) -> str:
    if not holder:
        return f"holds a {NAME} that names no process; if nobody touches it, it is taken away"
    return f"is being written by {said_of(holder)}"


def said_of(holder: dict) -> str:
    """E.g. `process 12 on node-1, Slurm job 7`."""
    job = f", Slurm job {holder['job']}" if holder.get("job") else ""
    return f"process {holder.get('pid')} on {holder.get('host')}{job}"


def _create(path: Path, me: dict) -> bool:
    """Whether the file is ours now. It appears with its content, so nobody ever reads a half of it."""
    mine = files.beside(path, "partial")
    try:
        mine.write_text(json.dumps(me), encoding="utf-8")
        try:
            os.link(mine, path)
        except FileExistsError:
            return False
        except OSError:  # a file system that has no links
            with path.open("x", encoding="utf-8") as stream:
                stream.write(json.dumps(me))
        return True
    except FileExistsError:
        return False
    except FileNotFoundError:
        if path.parent.is_dir():  # one in which nothing can be created, such as /proc
            raise
        return False
    finally:
        mine.unlink(missing_ok=True)


def this_holder() -> dict[str, str | int | None]:
    return {
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "namespace": processes.namespace(),
        "job": os.environ.get("SLURM_JOB_ID"),
    }


def read_holder(path: Path) -> dict | None:
    """The holder; None if there is none, empty if what stands there names none."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) and isinstance(holder.get("id"), str) else {}


def is_dead(holder: dict) -> bool:
    """Whether the holder was a process of this very machine that is no more."""
    here, number = processes.namespace(), holder.get("pid")
    is_ours = bool(here) and holder.get("namespace") == here and type(number) is int and number > 0
    return is_ours and not processes.is_alive(number)


def _changes(path: Path) -> bool:
    """Whether the file is touched, or goes, while we watch."""
    try:
        before = path.stat().st_mtime_ns
        for _ in range(8):
            time.sleep(BEAT / 2)
            if path.stat().st_mtime_ns != before:
                return True
    except FileNotFoundError:
        return True
    return False


def take_away(path: Path, holder: dict) -> None:
    """Remove the file of a dead holder. Of several processes that try one succeeds; a file that a living
    one has put there meanwhile goes back to its place."""
    aside = files.beside(path, "partial")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    if read_holder(aside) == holder:
        aside.unlink()
    else:
        os.rename(aside, path)


def _now() -> float:
    """Seconds, those included during which the machine slept."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
