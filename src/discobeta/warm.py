"""Starts that have been made already: `python -m discobeta.warm COMMAND ...` runs COMMAND, and serves it.

To import torch, transformers and peft takes seconds, and a study of small runs starts hundreds of processes. So this
process imports what trainings and evaluations need, once, computes nothing, and is forked for every
`python -m discobeta ...` that COMMAND starts. Each is still a process of its own, with its own arguments, streams,
working directory, environment, lock, exit status and end; it writes the bytes that it would have written.

A command starts by itself, as if this were not there, where its process could differ from a fork: other code or
Python, another environment (thread counts too), other limits, rights or processors, open files beyond the standard
streams; so also in a job of Slurm, whose environment is another one. In a job of Slurm, and on systems other than
Linux, COMMAND itself is all that is started. It ends with COMMAND, and COMMAND and all forks with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

VARIABLE = "DISCOBETA_WARM"
"""The environment variable that names the folder of the socket. The socket's own name is `likeness`."""

ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "GOTO_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS",
     "NUMEXPR_NUM_THREADS"), "1",
)  # fmt: skip
"""What Snakemake sets for a job of one thread. Libraries read it when they are imported."""

PLACES = frozenset(
    ["PATH", "PYTHONPATH", "PWD", "OLDPWD", "SHLVL", "_", "TMPDIR", "TMP", "TEMPDIR", "TEMP", "DISCOBETA_TRACEBACK",
     "DISCOBETA_DEVICES"]
)  # fmt: skip
"""Variables that no library reads when it is imported. What PYTHONPATH says is in sys.path, which is compared."""

RIGHTS = (
    "Umask", "Uid", "Gid", "Groups", "CapEff", "Seccomp", "NoNewPrivs", "Cpus_allowed", "Mems_allowed", "SigBlk",
)  # fmt: skip
"""Lines of /proc/self/status that a fork would have from here."""

NEEDED = (
    "accelerate pandas pyarrow.pandas_compat pyarrow.parquet peft.utils.transformers_weight_conversion "
    "torch.utils.serialization.config transformers.optimization transformers.models.auto.modeling_auto "
    "transformers.models.auto.tokenization_auto transformers.models.qwen3.modeling_qwen3 discobeta.run.train "
    "discobeta.run.loop discobeta.run.evaluate discobeta.method.rm discobeta.method.dpo discobeta.method.ppo "
    "discobeta.model.lora discobeta.inputs.world discobeta.inputs.reference discobeta.cli"
)
"""What is imported here; a fork imports the rest itself."""


def likeness(variables: dict[str, str]) -> str:
    """Digest of what a fork has from the process that it is forked from: equal ones do the same in the same files.

    variables: the environment. Raises OSError where it cannot be told.
    """
    sources = {str(path): path.stat() for path in Path(__file__).parent.rglob("*.py")}
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    parts = [
        [sys.version, sys.prefix, sys.flags, sys.warnoptions, sys._xoptions],
        sorted({os.path.realpath(folder) for folder in sys.path[1:]}),  # the first is where the command was started
        sorted((path, found.st_mtime_ns, found.st_size) for path, found in sources.items()),
        sorted((name, value) for name, value in variables.items() if name not in PLACES | {VARIABLE}),
        rights(status),
        [
            os.getpriority(os.PRIO_PROCESS, 0),
            Path("/proc/self/limits").read_text(),
            Path("/proc/self/cgroup").read_text(),
        ],
        [os.readlink(f"/proc/self/ns/{name}") for name in ("pid", "mnt", "net")],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def rights(status: dict[str, str]) -> list[str | int | None]:
    """`RIGHTS` of a process. Of ignored signals only those below 32: the C library has the next two for itself, and
    whoever inherits from a process without one may seem to ignore them."""
    found: list[str | int | None] = [status.get(name) for name in RIGHTS]
    return [*found, int(status.get("SigIgn", "0"), 16) & 0x7FFFFFFF]


# --- the process that is started


def ask(words: list[str]) -> int | None:
    """Exit status of `discobeta WORDS`, done by a fork of the warm process; None if it is to be done here."""
    begun = time.monotonic()
    folder = os.environ.get(VARIABLE)
    if not folder:
        return None
    try:
        if len(os.listdir("/proc/self/fd")) != 4:  # the standard streams, and the listing itself
            return None
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(f"{folder}/{likeness(dict(os.environ))}")
        request = {"words": words, "argv": sys.argv, "path": sys.path, "variables": dict(os.environ), "begun": begun}
        letter = os.memfd_create("request")  # of any length
        with open(letter, "w", closefd=False) as stream:
            json.dump(request, stream)
        here = os.open(".", os.O_PATH)
        socket.send_fds(connection, [b"run"], [0, 1, 2, here, letter])
        if not connection.recv(1):  # sent when the fork is there
            return None
    except OSError:
        return None

    def forward(number: int, frame: object) -> None:
        with suppress(OSError):
            connection.send(bytes([number]))

    for number in (signal.SIGINT, signal.SIGTERM):  # of any other one this process dies, and the fork with it
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, forward)
    try:
        answer = connection.recv(8)
    except OSError:
        answer = b""
    return _end_like(int(answer) if answer else -signal.SIGTERM)  # the warm process has ended, and with it the fork


def _end_like(status: int) -> int:
    """The exit status of a process; of one that a signal has ended (minus its number), end by that too."""
    if status < 0:
        with suppress(OSError):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
        return 128 - status
    return status


# --- the warm process


@dataclass
class Job:
    """A process that asks, and the fork that does its work."""

    connection: socket.socket
    number: int = 0
    handle: int = -1  # readable when the fork has ended


def main(words: list[str]) -> int:
    """COMMAND with warm starts. Returns its exit status, or minus the signal that ended it."""
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if words else 2
    if sys.platform != "linux" or "SLURM_JOB_ID" in os.environ:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        return _begin(words[0], lambda: os.execvp(words[0], words)) or 127
    import shutil
    import subprocess
    import tempfile

    from discobeta import cli, processes

    cli.mend_streams()
    me, interrupt, folder = os.getpid(), signal.getsignal(signal.SIGINT), tempfile.mkdtemp(prefix="discobeta-")
    try:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with suppress(OSError):  # of a path too long for a socket, or without /proc: nobody comes
            listener.bind(f"{folder}/{likeness(dict(os.environ) | ONE_THREAD)}")
            listener.listen(128)
        environment = dict(os.environ) | {VARIABLE: folder}
        start = partial(subprocess.Popen, words, env=environment, preexec_fn=lambda: processes.end_with(me))
        if (command := _begin(words[0], start)) is None:
            return 127
        # the terminal's interrupt goes to the command too, which knows what to do; it does not inherit a handler
        if interrupt != signal.SIG_IGN:
            signal.signal(signal.SIGINT, lambda number, frame: None)
        signal.signal(signal.SIGTERM, lambda number, frame: command.send_signal(number))
        if _is_ready(command):
            status = serve(listener, os.pidfd_open(command.pid), interrupt)
            if os.getpid() != me:
                return status
        listener.close()
        return command.wait()
    finally:
        if os.getpid() == me:
            shutil.rmtree(folder, ignore_errors=True)


def _begin(name: str, start: Callable[[], Any]) -> Any:
    """What `start` returns; None, which is said, if the system has no such command."""
    try:
        return start()
    except OSError as error:
        print(f"discobeta.warm: {name}: {error.strerror}", file=sys.stderr)
        return None


def _is_ready(command) -> bool:
    """Import what is needed. False if nothing is to be served: the command has ended, or a fork would not be safe."""
    import gc
    import importlib

    from discobeta import cli, closure
    from discobeta.design.stages import STAGES

    os.environ |= ONE_THREAD
    os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")  # pyarrow's allocator would start one
    cli.settle_libraries()
    for name in NEEDED.split():
        if command.poll() is not None:
            return False
        with suppress(ImportError):  # whoever needs it will say so
            importlib.import_module(name)
    for stage in STAGES:  # read from the sources, which are those of whoever comes: `likeness`
        closure.code_hash(stage)
    gc.freeze()  # no fork goes through what is here, and copies it by that
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1 or "libcuda.so" in Path("/proc/self/maps").read_text():
        found = f"{threads} threads" if threads > 1 else "the driver of a GPU"
        print(f"discobeta.warm: no warm starts, for importing has started {found}", file=sys.stderr)
        return False
    return command.poll() is None


def serve(listener: socket.socket, command: int, interrupt: object) -> int | None:
    """Fork for whoever asks until the command (its pidfd) has ended, then None; in a fork the status of its work."""
    me, jobs = os.getpid(), []
    while True:
        connections = {job.connection: job for job in jobs if job.connection.fileno() >= 0}
        handles = {job.handle: job for job in jobs if job.number}
        ready = select.select([listener, command, *connections, *handles], [], [])[0]
        if command in ready:
            return None
        for job in [handles[one] for one in ready if one in handles]:  # first: its number means nothing from here on
            _, status = os.waitpid(job.number, 0)
            with suppress(OSError):
                job.connection.send(str(os.waitstatus_to_exitcode(status)).encode())
            job.connection.close()
            os.close(job.handle)
            jobs.remove(job)
        for job in [connections[one] for one in ready if one in connections and connections[one] in jobs]:
            try:
                word, received, *_ = socket.recv_fds(job.connection, 16, 8)
            except OSError:
                word, received = b"", []
            if job.number:
                os.kill(job.number, word[0] if word else signal.SIGKILL)  # killed like the process that has asked
                if not word:
                    job.connection.close()
            elif len(received) == 5:
                signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
                try:
                    job.number = os.fork()
                except OSError:  # no memory, or too many processes: it starts by itself, or says so
                    job.number = -1
                if not job.number:
                    for other in jobs:
                        other.connection.close()
                        if other.number:
                            os.close(other.handle)
                    listener.close()
                    os.close(command)
                    return _work(received, interrupt, me)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
                if job.number > 0:
                    job.handle = os.pidfd_open(job.number)
                    with suppress(OSError):
                        job.connection.send(b"!")
            if job.number <= 0:
                job.connection.close()
                jobs.remove(job)
            for handle in received:
                os.close(handle)
        if listener in ready:
            jobs.append(Job(listener.accept()[0]))


def _work(received: list[int], interrupt: object, server: int) -> int:
    """Become the process that has asked, and do what it was asked for. Returns only if the server has ended already."""
    import atexit
    import tempfile
    import threading

    import numpy as np
    import torch

    from discobeta import cli, processes, record

    *streams, here, letter = received
    os.setpgid(0, 0)  # what a terminal sends comes through the process that asks, once
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, interrupt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    with open(letter) as stream:
        stream.seek(0)
        request = json.load(stream)
    if not processes.end_with(server):
        return 128 + signal.SIGTERM
    os.fchdir(here)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for handle in (*streams, here):
        os.close(handle)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        old = getattr(sys, name)
        buffering = 1 if number == 2 or old.write_through else -1
        new = open(number, "w" if number else "r", buffering, old.encoding, old.errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    os.environ.clear()
    os.environ.update(request["variables"])
    sys.argv, sys.path = request["argv"], request["path"]
    record.STARTED, tempfile.tempdir = request["begun"], None
    np.random.seed()  # as in a new process; nothing of ours draws from these
    torch.default_generator.seed()
    try:
        status = cli.main(request["words"])
    except SystemExit as end:  # of a signal, or of words that are no command
        status = int(end.code or 0)
    # what an interpreter does at its end, without taking all modules apart, which takes a third of a second
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(_end_like(main(sys.argv[1:])))
