"""Commands in forked processes, that can be killed at any file operation; and what a folder holds.

A command takes seconds to import what it needs. So this process imports it once, computes nothing itself (no thread
of torch ever starts in it), and forks for each command. The kernel then gives every command a clean process.
"""

from __future__ import annotations

import faulthandler
import fcntl
import hashlib
import importlib
import json
import os
import resource
import select
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from discobeta import cli, lock, record

NEEDED = (
    "accelerate datasets matplotlib.pyplot pandas peft pyarrow.parquet torch transformers.models.qwen3.modeling_qwen3 "
    "trl discobeta.design.cost discobeta.inputs.base discobeta.inputs.fetch discobeta.inputs.world discobeta.launch "
    "discobeta.method.dpo discobeta.method.ppo discobeta.method.rm discobeta.report discobeta.run.evaluate "
    "discobeta.run.train"
)


def load() -> None:
    """Import what commands need: to be called once, before the first of them."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"MPLBACKEND": "agg", "COLUMNS": "80"}
    for name in NEEDED.split():
        importlib.import_module(name)
    from tqdm import tqdm
    from trl import SFTConfig, SFTTrainer  # noqa: F401, loaded when they are asked for

    # its own is shared by all forks, so that one that was killed in the middle of a bar would hold it for ever
    tqdm.set_lock(threading.RLock())

    for stage in ("sft", "rm", "dpo", "ppo"):  # of files that somebody may be editing: once, and the same for all
        record.code_hash(stage)
    record.package_hash()
    state = record.source_state()
    record.source_state = lambda: state


CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate")
MEMORY = 6 << 30
"""Bytes that a command may take beyond what this process has; what asks for more is an error of its input."""


@dataclass(frozen=True)
class Fault:
    """What befalls a command when it is about to do file operation `at`: a signal, or an error of the system."""

    at: int
    signal: int = 0
    error: int = 0
    torn: bool = False  # the file that was written last has got only half of its bytes


@dataclass(frozen=True)
class Outcome:
    status: int  # the exit status; minus the signal that ended it
    output: str
    seconds: float
    operations: list[str]  # the file operations in the working directory
    hung: bool = False


def run(
    words: list[str] | Callable[[], int | None],
    folder: Path,
    fault: Fault | None = None,
    *,
    limit: float = 60.0,
    kill_after: tuple[float, int] | None = None,
    largest_file: int | None = None,
) -> Outcome:
    """`discobeta WORDS` (or a function) in `folder`. limit: seconds, after which it is said to hang.

    kill_after: (seconds, signal).
    """
    return start(words, folder, fault, largest_file=largest_file).wait(limit, kill_after)


class Child:
    """A command that runs. What it prints and does goes through pipes: a limit on its files is none on them."""

    def __init__(self, number: int, printed: int, done: int, started: float):
        self.number, self.printed, self.done, self.started = number, printed, done, started
        self.handle = os.pidfd_open(number)

    def wait(self, limit: float, kill_after: tuple[float, int] | None = None) -> Outcome:
        hung = False
        if kill_after and not self.ends_within(kill_after[0]):
            os.kill(self.number, kill_after[1])
        if not self.ends_within(limit):
            hung = True
            os.kill(self.number, signal.SIGUSR1)  # say where
            time.sleep(0.5)
            os.kill(self.number, signal.SIGKILL)
        _, code = os.waitpid(self.number, 0)
        os.close(self.handle)
        seconds = time.monotonic() - self.started
        output, operations = (_drained(pipe) for pipe in (self.printed, self.done))
        return Outcome(os.waitstatus_to_exitcode(code), output, seconds, operations.splitlines(), hung)

    def ends_within(self, seconds: float) -> bool:
        ready, _, _ = select.select([self.handle], [], [], max(0.0, self.started + seconds - time.monotonic()))
        return bool(ready)


def _pipe() -> tuple[int, int]:
    """Both ends of a pipe that holds all that a well-behaved command has to say."""
    ends = os.pipe()
    fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, 1 << 20)
    return ends


def _drained(pipe: int) -> str:
    os.set_blocking(pipe, False)
    content = b""
    with suppress(BlockingIOError):  # somebody whom the command has left behind holds the other end
        while part := os.read(pipe, 1 << 20):
            content += part
    os.close(pipe)
    return content.decode(errors="replace")


def start(
    words: list[str] | Callable[[], int | None],
    folder: Path,
    fault: Fault | None = None,
    *,
    largest_file: int | None = None,
) -> Child:
    printed, done, started = _pipe(), _pipe(), time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        os.close(printed[1])
        os.close(done[1])
        return Child(child, printed[0], done[0], started)
    status = 70
    try:
        _become(folder, printed[1], done[1], fault, largest_file)
        record.STARTED = time.monotonic()
        try:
            status = (cli.main(words) if isinstance(words, list) else words()) or 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1 if end.code else 0
        except BaseException:
            import traceback

            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _become(folder: Path, printed: int, done: int, fault: Fault | None, largest_file: int | None) -> None:
    """A process like one that a shell has started in `folder`, whose file operations are counted."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(folder)
    os.umask(0o022)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (1, 2):
        os.dup2(printed, number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False, buffering=1) for n in (1, 2))  # noqa: SIM115
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    lock.BEAT = 0.2
    faulthandler.register(signal.SIGUSR1, 2)
    _count_operations(str(folder), done, fault)


def _count_operations(folder: str, done: int, fault: Fault | None) -> None:
    count, written = 0, ""

    def watch(event: str, values: tuple) -> None:
        nonlocal count, written
        if event == "open":
            path, mode, flags = values
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
            place = -1
        elif event in CHANGES:
            path, place = values[0], values[1 if event in ("os.remove", "os.rmdir") else -1]
        else:
            return
        if isinstance(path, int) or threading.current_thread() is not threading.main_thread():
            return
        path = os.fsdecode(path)
        if not path.startswith("/"):
            path = f"{os.readlink(f'/proc/self/fd/{place}') if place > 2 else os.getcwd()}/{path}"
        is_idle = {"os.mkdir": os.path.lexists(path), "os.remove": not os.path.lexists(path)}
        if not path.startswith(f"{folder}/") or is_idle.get(event):
            return
        count += 1
        os.write(done, f"{event} {path[len(folder) + 1 :]}\n".encode(errors="surrogateescape"))
        if fault and count == fault.at:
            if fault.torn and written and os.path.isfile(written):
                os.truncate(written, os.path.getsize(written) // 2)
            if fault.error:
                raise OSError(fault.error, os.strerror(fault.error), path)
            os.kill(os.getpid(), fault.signal)
        if event == "os.chmod":
            written = path

    sys.addaudithook(watch)


# --- what a folder holds

RECORDS = ("provenance.json", ".finished.json", "evaluation.json", ".discobeta.json", "reference.json", "answers.json")
TIMES = ("cost.json", "evaluation_cost.json", "speed.jsonl", "loss.png")
"""Files that hold times, or their own date: only that they are there is compared."""


def snapshot(folder: Path, *, times: bool = False) -> dict[str, tuple[str, str]]:
    """Everything in `folder`: relative path -> (mode, sha256), links and folders too.

    times: False leaves out of the hashes what differs between two equal runs.
    """
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            found[os.path.relpath(path, folder)] = _state(path, times)
    return found


def _state(path: Path, times: bool) -> tuple[str, str]:
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return "link", os.readlink(path)
    if not stat.S_ISREG(mode):
        return oct(mode), ""
    content = path.read_bytes()
    if not times and path.name in TIMES:
        content = b""
    if not times and path.name in RECORDS:
        with suppress(ValueError, RecursionError):  # of a record that is damaged
            content = json.dumps(_timeless(json.loads(content)), sort_keys=True).encode()
    return oct(mode), hashlib.sha256(content).hexdigest()


def _timeless(value):
    """A record without the commit, the checksums of files that hold times, and the seal over them."""
    if isinstance(value, dict):
        left_out = {*TIMES, "seal", "run", "commit", "dirty"}
        return {name: _timeless(part) for name, part in value.items() if name not in left_out}
    return value


def differences(before: dict, after: dict) -> list[str]:
    """What has come, gone or changed."""
    return [
        f"{name}: {'new' if name not in before else 'gone' if name not in after else 'changed'}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]
