"""One run on several devices of a machine: one process each.

Started by torch.distributed.run, which is what `accelerate launch` calls for GPUs; for CPUs that
starts one process only, so tests would not run what clusters run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from discobeta.config import RunConfig, write_yaml
from discobeta.errors import UserError


def train(config: RunConfig, processes: int, *, evaluate: bool) -> int:
    """`discobeta train` of `config` in `processes` processes, on GPUs if there are any. Returns the exit status.

    Raises UserError if fewer GPUs than processes were granted.
    """
    import torch

    granted = torch.cuda.device_count()
    if 0 < granted < processes:
        raise UserError(
            f"{processes} processes, and {granted} GPU{'s' * (granted > 1)} granted: ask for {processes} "
            "(`gpu:` in the Slurm profile), or lower gpus_per_run"
        )
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "run.yaml"
        write_yaml(config.resolved(), settings)
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)),
            *("-m", "discobeta", "train", str(settings), *([] if evaluate else ["--no-evaluate"])),
        ]
        child = subprocess.Popen(command, env=os.environ if granted else os.environ | {"ACCELERATE_USE_CPU": "true"})
        try:
            return child.wait()
        except BaseException:  # a signal to this process alone must not leave the others behind
            child.terminate()
            child.wait()
            raise
