"""Two live copies of one run never write the same directory."""

import json
import operator
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from discobeta import lock
from discobeta.errors import UserError
from discobeta.processes import namespace
from discobeta.run.loop import Log

HOLD = """
import sys, time
from pathlib import Path
from discobeta import lock
lock.BEAT = 0.2
with lock.holding(Path(sys.argv[1])) as hold:
    print("waited" if hold.waited else "held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.2)


def holder(directory: Path, seconds: float) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(directory), str(seconds)], stdout=subprocess.PIPE)
    assert process.stdout.readline()
    return process


def test_a_second_process_waits_for_the_first(tmp_path, capsys):
    first = holder(tmp_path, 3)
    started = time.monotonic()
    with lock.holding(tmp_path) as hold:
        assert hold.waited and first.poll() is not None or time.monotonic() - started > 2
    assert f"is being written by process {first.pid} on" in capsys.readouterr().err
    first.wait()
    assert not any(tmp_path.iterdir())


def test_a_killed_holder_is_recognised_at_once(tmp_path):
    first = holder(tmp_path, 60)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (tmp_path / lock.NAME).exists()
    started = time.monotonic()
    with lock.holding(tmp_path) as hold:
        assert not hold.waited and time.monotonic() - started < 0.7  # to see that a file is still takes 0.8


def test_a_holder_elsewhere_counts_as_dead_only_when_its_file_is_still(tmp_path):
    """Another machine's process numbers say nothing here: what counts is whether the file is touched."""
    elsewhere = {"id": "x", "host": "node7", "pid": os.getpid(), "namespace": "another boot", "job": "12"}
    path = tmp_path / lock.NAME
    path.write_text(json.dumps(elsewhere))
    other = lock.Hold(path, elsewhere, waited=False)
    beating = threading.Thread(target=other.beat)
    beating.start()
    threading.Timer(2, lambda: (other.stop.set(), beating.join())).start()  # then it is dead, and leaves its file
    started = time.monotonic()
    with lock.holding(tmp_path) as hold:
        took = time.monotonic() - started
    assert hold.waited and 2 < took < 5


def test_of_many_processes_one_writes_at_a_time(tmp_path):
    """Six processes that come at once, in front of a dead holder's file, never overlap."""
    program = (
        "import sys, time, os\nfrom pathlib import Path\nfrom discobeta import lock\nlock.BEAT = 0.1\n"
        "d = Path(sys.argv[1])\n"
        "with lock.holding(d / 'run'):\n"
        "    mark = d / 'inside'\n    mark.touch(exist_ok=False)\n    time.sleep(0.1)\n    mark.unlink()\n"
    )
    (tmp_path / "run").mkdir()
    dead = {"id": "x", "host": "here", "pid": 2**22 + 1, "namespace": namespace(), "job": None}
    (tmp_path / "run" / lock.NAME).write_text(json.dumps(dead))
    processes = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)]) for _ in range(6)]
    assert [process.wait() for process in processes] == [0] * 6
    assert not any((tmp_path / "run").iterdir())


def test_a_directory_that_went_away_meanwhile_is_made_again(tmp_path):
    """Its holder had made it, and took it away empty while another one waited."""
    assert not lock.acquire(tmp_path / "gone" / lock.NAME, lock.this_holder())
    assert (tmp_path / "gone" / lock.NAME).exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_a_directory_in_which_nothing_can_be_created_is_said():
    says = r"cannot write /proc/\.running\.json: No such file"
    with pytest.raises(UserError, match=says), lock.holding(Path("/proc")):
        pass


def test_only_the_dead_holders_file_is_taken_away(tmp_path):
    """A living process may have put its own file there since the dead one's was read."""
    path, living = tmp_path / lock.NAME, {"id": "living"}
    path.write_text(json.dumps(living))
    lock.take_away(path, {"id": "dead"})
    assert json.loads(path.read_text()) == living and len(list(tmp_path.iterdir())) == 1
    lock.take_away(path, living)
    assert not any(tmp_path.iterdir())


def test_a_living_holder_outlasts_its_file_being_put_aside(tmp_path, monkeypatch):
    """What `take_away` does for an instant when the dead holder's file has been replaced by a living one's."""
    me, ended = {"id": "me"}, []
    read = iter([None, me, me])
    monkeypatch.setattr(lock, "read_holder", lambda path: next(read, me))
    monkeypatch.setattr(os, "kill", lambda pid, number: ended.append(number))
    (tmp_path / lock.NAME).touch()
    hold = lock.Hold(tmp_path / lock.NAME, me, waited=False)
    beating = threading.Thread(target=hold.beat)
    beating.start()
    deadline = time.monotonic() + 10
    while (left := operator.length_hint(read)) and time.monotonic() < deadline:
        time.sleep(0.05)
    hold.stop.set()
    beating.join()
    assert ended == [] and not left  # it was looked at, more than once


def test_a_process_whose_place_was_taken_ends_itself(tmp_path):
    first = holder(tmp_path, 60)
    (tmp_path / lock.NAME).write_text(json.dumps({"id": "another"}))
    assert first.wait(timeout=5) == -signal.SIGTERM
    assert json.loads((tmp_path / lock.NAME).read_text()) == {"id": "another"}
    (tmp_path / lock.NAME).unlink()
    second = holder(tmp_path, 60)
    (tmp_path / lock.NAME).unlink()  # another held it meanwhile, and has done its work
    assert second.wait(timeout=5) == -signal.SIGTERM
    third = holder(tmp_path, 60)
    (tmp_path / "provenance.json").touch()
    (tmp_path / lock.NAME).unlink()  # the same, and the run is whole: that is no failure
    assert third.wait(timeout=5) == 0


WRITE = """
import sys, time
from pathlib import Path
from discobeta import lock
lock.BEAT = 0.2
with lock.holding(Path(sys.argv[1])) as hold:
    while True:
        hold.confirm()
        with (Path(sys.argv[1]) / "written").open("a") as stream:
            print("x", file=stream, flush=True)
        time.sleep(0.001)
"""


def test_a_process_whose_place_was_taken_writes_nothing_more(tmp_path):
    """It is suspended; another holds the directory meanwhile, and has gone when it wakes."""
    first = subprocess.Popen([sys.executable, "-c", WRITE, str(tmp_path)])
    while not (tmp_path / "written").exists():
        assert first.poll() is None
        time.sleep(0.01)
    time.sleep(1)  # some beats, all of which it writes through
    first.send_signal(signal.SIGSTOP)
    before = (tmp_path / "written").read_bytes()
    assert len(before) > 200
    with lock.holding(tmp_path):
        pass
    first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=5) == -signal.SIGTERM
    assert (tmp_path / "written").read_bytes() in (before, before + b"x\n")  # one write may have begun


def test_nothing_is_confirmed_while_the_file_system_is_away(tmp_path, monkeypatch):
    with lock.holding(tmp_path) as hold:
        hold.confirm()
        utime = os.utime
        monkeypatch.setattr(os, "utime", lambda path: (_ for _ in ()).throw(OSError("stale file handle")))
        time.sleep(1)
        threading.Timer(1, lambda: monkeypatch.setattr(os, "utime", utime)).start()
        started = time.monotonic()
        hold.confirm()
        assert 0.5 < time.monotonic() - started < 3


def test_what_an_earlier_copy_logs_is_not_in_the_log_of_its_successor(tmp_path):
    path = tmp_path / "log.jsonl"
    first = Log(path, 0, enabled=True)
    for step in (10, 20):
        first.write({"step": step})
    second = Log(path, 10, enabled=True)
    first.write({"step": 30})
    second.write({"step": 20, "by": "second"})
    first.close()
    second.close()
    assert [json.loads(line) for line in path.open()] == [{"step": 10}, {"step": 20, "by": "second"}]


def test_the_second_copy_of_a_run_finds_it_finished(settings, tmp_path):
    """As after `kill -9 snakemake`: the first copy runs on, and a restart starts a second one."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings("dpo", max_steps=3000, overwrite_output_dir=True)))
    command = [sys.executable, "-m", "discobeta", "train", str(path), "--no-evaluate"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment)
    while not (tmp_path / "run" / lock.NAME).exists():
        assert first.poll() is None
        time.sleep(0.02)
    second = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert first.wait() == 0 and second.returncode == 0
    assert "is being written by process" in second.stderr and "holds this run, finished" in second.stderr
    assert not (tmp_path / "run" / lock.NAME).exists()


def test_a_terminated_run_lets_go(settings, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings("dpo", max_steps=5000, save_steps=10)))
    command = [sys.executable, "-m", "discobeta", "train", str(path)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not list((tmp_path / "run").glob("checkpoints/step-*.pt")):
        assert process.poll() is None
        time.sleep(0.02)
    assert (tmp_path / "run" / lock.NAME).exists()
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    assert not (tmp_path / "run" / lock.NAME).exists()
