"""Several processes by one command: what goes wrong is said once, and no process stays behind."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from discobeta import launch

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def command(settings, tmp_path):
    """command(**changes): the command line of a run in two processes."""

    def make(**changes):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(settings("rm", per_device_train_batch_size=4, **changes)))
        return [sys.executable, "-m", "discobeta", "train", str(path), "--no-evaluate", "--processes", "2"]

    return make


def children(process: subprocess.Popen) -> list[int]:
    """The processes that one has started, in their order."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        if int(fields[1]) == process.pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return sorted(found)


def is_running(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def training(command, tmp_path):
    """A run in two processes that has begun to train, and its two processes."""
    process = subprocess.Popen(
        command(max_steps=100_000, save_steps=5), env=ENVIRONMENT, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    while not list(tmp_path.glob("run/checkpoints/step-*.pt")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    both = children(process)
    assert len(both) == 2
    yield process, both
    for number in (process.pid, *both):
        if is_running(number):
            os.kill(number, signal.SIGKILL)
    process.wait()


def ended(process: subprocess.Popen, both: list[int]) -> tuple[int, str]:
    """(status, what it said) of the command, after which nobody is left."""
    _, said = process.communicate(timeout=60)
    assert not any(map(is_running, both))
    return process.returncode, said


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dataset": "rows.jsonl"}, "rows.jsonl is neither one JSON array nor JSON objects"),  # of the first process
        ({"lora_target": "nothing"}, "lora_target: the model has no linear layer called nothing"),  # of both
    ],
)
def test_bad_input_is_said_once(command, tmp_path, changes, says):
    (tmp_path / "rows.jsonl").write_text("{\nnot json\n")
    done = subprocess.run(command(**changes), env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and says in lines[0], done.stderr
    assert lines[0].startswith("discobeta: ") and all(line.startswith("  ") for line in lines[1:]), done.stderr
    assert not list(tmp_path.glob("run/.*")) and not list(tmp_path.glob("run/log.jsonl"))


def test_when_a_process_is_killed_the_other_ends_too(training):
    process, both = training
    os.kill(both[1], signal.SIGKILL)
    status, said = ended(process, both)
    assert status == 137 and "Traceback" not in said
    assert said.endswith("discobeta: process 1 of 2 was killed (Killed: out of memory?); the others were ended\n")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_command_ends_both_processes(training, number, status):
    process, both = training
    process.send_signal(number)
    found, said = ended(process, both)
    assert found == status and "Traceback" not in said and said.count("discobeta: ") == (number == signal.SIGINT)


def test_a_command_that_is_killed_leaves_no_process(training):
    process, both = training
    process.kill()
    process.wait()
    latest = time.monotonic() + 30
    while any(map(is_running, both)) and time.monotonic() < latest:
        time.sleep(0.1)
    assert not any(map(is_running, both))


def script(tmp_path, text):
    path = tmp_path / "script.py"
    path.write_text("import os, sys, time\nrank = int(os.environ['RANK'])\n" + text)
    return [sys.executable, str(path)]


def test_what_another_process_than_the_first_says_is_shown_if_it_fails(tmp_path, capfd):
    text = "if rank == 2:\n print('discobeta: it is me', file=sys.stderr); sys.exit(2)\ntime.sleep(60)"
    start = time.monotonic()
    assert launch.run_processes(script(tmp_path, text), 3, {}, tmp_path) == 2
    assert capfd.readouterr().err == "discobeta: it is me\n" and time.monotonic() - start < 20


def test_what_others_say_is_not_shown_if_the_first_fails_or_all_end_well(tmp_path, capfd):
    text = "print(rank, file=sys.stderr)\nif rank == 0:\n time.sleep(0.5); sys.exit(3)\ntime.sleep(60)"
    assert launch.run_processes(script(tmp_path, text), 3, {}, tmp_path) == 3
    assert capfd.readouterr().err == "0\n"
    assert launch.run_processes(script(tmp_path, "print(rank, file=sys.stderr)"), 3, {}, tmp_path) == 0
    assert capfd.readouterr().err == "0\n"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("text", "status", "name"),
    [
        ("os.kill(os.getpid(), 9)", 137, "Killed: out of memory?"),
        ("os.abort()", 134, "Aborted"),
        ("sys.exit(143)", 143, "Terminated"),
    ],
)
def test_a_killed_process_is_named(tmp_path, capfd, rank, text, status, name):
    text = f"if rank == {rank}: {text}\nprint(rank, file=sys.stderr)\ntime.sleep(60)"
    assert launch.run_processes(script(tmp_path, text), 2, {}, tmp_path) == status
    assert capfd.readouterr().err.endswith(
        f"discobeta: process {rank} of 2 was killed ({name}); the others were ended\n"
    )


def test_a_process_that_does_not_end_itself_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "PATIENCE", 0.5)
    text = (
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "open(f'pid-{rank}', 'w').write(str(os.getpid()))\n"
        "while not os.path.exists('pid-1'): time.sleep(0.01)\n"
        "if rank == 0: time.sleep(0.5); sys.exit(2)\ntime.sleep(600)"
    )
    monkeypatch.chdir(tmp_path)
    assert launch.run_processes(script(tmp_path, text), 2, {}, tmp_path) == 2
    assert not is_running(int((tmp_path / "pid-1").read_text()))


@pytest.mark.parametrize("text", ["0", "-3", "abc", "", "1.5", "1e3", " 2", "1_0", "٣", "65", "1000000000", "9" * 5000])
def test_counts_that_make_no_sense_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="should be a whole number from 1 to 64") as caught:
        launch.process_count(text)
    assert len(str(caught.value)) < 100


def test_counts_that_make_sense():
    assert [launch.process_count(text) for text in ("1", "2", "64")] == [1, 2, 64]
