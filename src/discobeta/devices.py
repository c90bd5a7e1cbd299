"""Which GPU a job computes on, where several jobs share those of one machine.

`DISCOBETA_DEVICES` lists them, named as in CUDA_VISIBLE_DEVICES; the workflow sets it where Snakemake is given
`--resources gpu=N`, and nobody in a job of Slurm, to which the scheduler gives its GPUs. A claim is a name of Linux'
abstract sockets: two processes of a machine cannot hold the same one, there is no file of it that could be left behind,
and the system frees it when the process ends, however it ends.
"""

from __future__ import annotations

import os
import socket
import sys
import time

from discobeta.errors import UserError

VARIABLE = "DISCOBETA_DEVICES"

PATIENCE = 0.2
"""Seconds between two looks at devices that are all taken."""

_claims: list[socket.socket] = []  # of this process, until it ends


def claim(count: int = 1) -> None:
    """Wait for `count` of the listed devices to be free, and let this process and its children see these alone.

    To be called before a GPU is first used. Nothing happens where none are listed. Raises UserError if there are fewer.
    """
    names = [name.strip() for name in os.environ.pop(VARIABLE, "").split(",") if name.strip()]
    if not names:
        return
    if count > len(names):
        raise UserError(
            f"{count} processes, and {VARIABLE} lists {len(names)}: {', '.join(names)}; "
            f"give Snakemake `--resources gpu={count}`, or lower gpus_per_run"
        )
    has_said = False
    while not (taken := _take(names, count)):
        if not has_said:
            print(f"waiting for {count} of GPU {', '.join(names)}: other jobs have them", file=sys.stderr, flush=True)
            has_said = True
        time.sleep(PATIENCE)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(taken)


def _take(names: list[str], count: int) -> list[str]:
    """`count` of the devices, or none: jobs that kept some while they wait for more would wait for each other."""
    taken: dict[str, socket.socket] = {}
    for name in names:
        place = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            place.bind(f"\0discobeta-device-{name}")
            taken[name] = place
        except OSError:  # another process has it
            place.close()
        if len(taken) == count:
            _claims.extend(taken.values())
            return list(taken)
    for place in taken.values():
        place.close()
    return []
