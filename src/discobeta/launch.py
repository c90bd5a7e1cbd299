"""One run on several devices of a machine: one process each.

The variables are torchrun's, so every library below sees what it sees there; for CPUs `accelerate launch` starts
one process only, so tests would not run what clusters run. What goes wrong is said once, and all processes end.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from discobeta.design.config import RunConfig
from discobeta.design.yaml_text import write_yaml
from discobeta.errors import UserError

MOST = 64
"""Processes: one per GPU of one machine."""
PATIENCE = 10.0
"""Seconds that a process has for letting go of what it holds, before it is killed."""


def process_count(text: str) -> int:
    """The value of --processes. Raises ArgumentTypeError."""
    count = int(text) if re.fullmatch("[0-9]{1,9}", text) else 0
    if not 1 <= count <= MOST:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} should be a whole number from 1 to {MOST}")
    return count


def train(config: RunConfig, processes: int, *, evaluate: bool) -> int:
    """`discobeta train` of `config` in `processes` processes, on GPUs if there are any. Returns the exit status.

    0 if all have ended well; else that of the first process that failed, 128 + signal if it was killed.
    Raises UserError if fewer GPUs than processes were granted.
    """
    import torch
    from torch.distributed import TCPStore

    granted = torch.cuda.device_count()
    if 0 < granted < processes:
        raise UserError(
            f"{processes} processes, and {granted} GPU{'s' * (granted > 1)} granted: ask for {processes} "
            "(`gpu:` in the Slurm profile), or lower gpus_per_run"
        )
    # where the processes meet; hosted here, so that its port is free, and that none of them ends with another
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),  # else it warns of lost connections
        **({} if granted else {"ACCELERATE_USE_CPU": "true"}),
    }
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "run.yaml"
        write_yaml(config.resolved(), settings)
        command = [sys.executable, "-m", "discobeta.worker", str(os.getpid()), "train", str(settings)]
        return run_processes([*command, *([] if evaluate else ["--no-evaluate"])], processes, shared, Path(folder))


def run_processes(command: list[str], processes: int, shared: dict[str, str], folder: Path) -> int:
    """The command in each process, until all have ended well or one has not; then the others are ended too."""
    children: list[subprocess.Popen] = []
    with ExitStack() as stack:
        stack.callback(_end, children)  # also when a signal ends this process
        for rank in range(processes):
            # the first process speaks for all; what another says is shown if it is the one that fails
            aside = stack.enter_context((folder / str(rank)).open("wb")) if rank else None
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            environment = os.environ | shared | own
            children.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stderr=aside))
        failed: list[int] = []
        while not failed and any(child.returncode is None for child in children):
            time.sleep(0.02)
            failed = [rank for rank, child in enumerate(children) if child.poll()]
    if not failed:
        return 0
    killed = {rank: abs(status) % 128 for rank in failed if not 0 <= (status := children[rank].returncode) <= 128}
    rank = next(iter(killed or failed))
    if killed:
        name = signal.strsignal(killed[rank]) or f"signal {killed[rank]}"
        if killed[rank] == signal.SIGKILL:
            name += ": out of memory?"
        print(f"discobeta: process {rank} of {processes} was killed ({name}); the others were ended", file=sys.stderr)
        return 128 + killed[rank]
    if rank:
        with (folder / str(rank)).open(encoding="utf-8", errors="replace") as messages:
            shutil.copyfileobj(messages, sys.stderr)
    return children[rank].returncode


def _end(children: list[subprocess.Popen]) -> None:
    """Let all children that still run end themselves, and kill those that do not."""
    running = [child for child in children if child.poll() is None]
    for child in running:
        child.terminate()
    latest = time.monotonic() + PATIENCE
    for child in running:
        try:
            child.wait(max(0.0, latest - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
