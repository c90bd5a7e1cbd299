"""GPUs that jobs share: each claims its own, on devices that are only pretended."""

import os
import select
import subprocess
import sys
import time

import pytest

from discobeta import devices
from discobeta.errors import UserError

JOB = """
import os, sys
from discobeta import devices
devices.claim(int(sys.argv[1]))
print(os.environ["CUDA_VISIBLE_DEVICES"], os.environ.get("DISCOBETA_DEVICES"), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def names():
    """Of devices that no other test and nobody else on this machine has."""
    return [f"test-{os.getpid()}-{time.monotonic_ns()}-{number}" for number in range(3)]


@pytest.fixture
def start(names):
    """Starts a job that claims so many of the devices, and keeps them until its input ends or it is killed."""
    started = []

    def begin(count=1, listed=None):
        variables = os.environ | {"DISCOBETA_DEVICES": ",".join(names if listed is None else listed)}
        process = subprocess.Popen(
            [sys.executable, "-c", JOB, str(count)], env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def line_of(stream):
    assert select.select([stream], [], [], 60)[0], "nothing was said"
    return stream.readline()


def granted(process):
    """The devices that a job has got; it waits for them."""
    seen, listed = line_of(process.stdout).split()
    assert listed == "None"  # what it starts claims nothing anew
    return seen.split(",")


def waits(process):
    """That a job says so; it has not got any."""
    said = line_of(process.stderr)
    assert not select.select([process.stdout], [], [], 3 * devices.PATIENCE)[0]
    return said


def test_no_two_jobs_share_a_device(start, names):
    jobs = [start() for _ in range(3)]
    assert sorted(device for job in jobs for device in granted(job)) == names


def test_one_more_job_waits_and_gets_the_device_of_one_that_ends(start, names):
    jobs = [start() for _ in range(3)]
    taken = {granted(job)[0]: job for job in jobs}
    late = start()
    assert waits(late) == f"waiting for 1 of GPU {', '.join(names)}: other jobs have them\n"
    taken[names[1]].communicate()
    assert granted(late) == [names[1]]


def test_a_killed_job_frees_its_device(start, names):
    jobs = [start() for _ in range(3)]
    taken = {granted(job)[0]: job for job in jobs}
    late = start()
    waits(late)
    taken[names[2]].kill()
    assert granted(late) == [names[2]]


def test_who_waits_for_several_keeps_none_meanwhile(start, names):
    assert len(granted(first := start(2))) == 2
    second = start(2)
    waits(second)
    assert granted(third := start(1)) == [names[2]]  # which the second could have kept
    first.communicate()
    assert granted(second) == names[:2]
    third.kill()


def test_more_than_there_are_is_refused(monkeypatch, names):
    monkeypatch.setenv("DISCOBETA_DEVICES", ",".join(names))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match="4 processes, and DISCOBETA_DEVICES lists 3: .*`--resources gpu=4`"):
        devices.claim(4)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_where_none_are_listed_nothing_is_changed(monkeypatch):
    """As in a job of Slurm, which has been given its device."""
    monkeypatch.delenv("DISCOBETA_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    devices.claim(2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3" and not devices._claims
