"""Warm starts: a fork does what a started process does, ends as it ends, and ends with whoever asked for it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml

from discobeta import warm

PYTHON = [sys.executable, "-m"]
DISCOBETA = [*PYTHON, "discobeta"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("SLURM_JOB_ID", "DISCOBETA_WARM")}
ENVIRONMENT |= dict.fromkeys(
    ("OMP_NUM_THREADS", "GOTO_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS",
     "NUMEXPR_NUM_THREADS"), "1",
)  # fmt: skip
"""That of a job of Snakemake with one thread."""
TIMES = ("cost.json", "speed.jsonl", "evaluation_cost.json", "provenance.json", ".finished.json", "evaluation.json")
"""Files that hold times, or checksums of those."""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="warm starts are Linux's")


@contextmanager
def warm_process(*command, **options):
    """(the process, its socket's folder) of `python -m discobeta.warm`; its command waits for the end of its input."""
    command = command or ("sh", "-c", "echo $DISCOBETA_WARM; exec cat")
    process = subprocess.Popen(
        [*PYTHON, "discobeta.warm", *command], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options
    )
    try:
        yield process, process.stdout.readline().decode().strip()
    finally:
        process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server():
    with warm_process() as found:
        assert run(["--version"], found[1]).returncode == 0  # it has imported what it needs
        yield found


def environment(folder, **changes):
    return ENVIRONMENT | {"DISCOBETA_WARM": str(folder)} | changes


def run(words, folder=None, **options):
    variables = environment(folder) if folder else ENVIRONMENT
    return subprocess.run([*DISCOBETA, *words], env=variables, capture_output=True, text=True, timeout=120, **options)


def children(number):
    with suppress(FileNotFoundError):
        return [int(word) for word in Path(f"/proc/{number}/task/{number}/children").read_text().split()]
    return []


def wait_for(condition, seconds=60.0):
    latest = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < latest, "waited in vain"
        time.sleep(0.01)
    return found


def is_gone(number):
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def is_warm(server, **options):
    """Whether a command is done by a fork: while it waits for its input, either a fork is there, or it has itself
    loaded the package's reader of YAML, which one that only asks never does."""
    process, folder = server
    variables = environment(folder) | options.pop("variables", {})
    before = children(process.pid)
    asking = subprocess.Popen(
        [*options.pop("prefix", ()), *DISCOBETA, "train", "-"], env=variables, stdin=subprocess.PIPE,
        stderr=subprocess.PIPE, **options,
    )  # fmt: skip

    def where():
        if set(children(process.pid)) - set(before):
            return "warm"
        return "cold" if "_yaml" in Path(f"/proc/{asking.pid}/maps").read_text() else None

    found = wait_for(where)
    assert b"stage is missing" in asking.communicate(b"{}", timeout=60)[1] and asking.returncode == 2
    return found == "warm"


def long_run(settings, tmp_path, **changes):
    """(settings file, directory) of a run that takes minutes."""
    made = settings("rm", max_steps=100_000, save_steps=10, logging_steps=1, **changes)
    path = tmp_path / "long.yaml"
    path.write_text(yaml.safe_dump(made))
    return path, Path(made["output_dir"])


def start_long(settings, tmp_path, folder):
    """A long run under way: (the process that asked, the number of the one that does it, its directory)."""
    path, directory = long_run(settings, tmp_path)
    asking = subprocess.Popen(
        [*DISCOBETA, "train", str(path)], env=environment(folder) if folder else ENVIRONMENT,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for(lambda: list(directory.glob("checkpoints/step-*.pt")) or asking.poll() is not None)
    assert asking.poll() is None, asking.stderr.read()
    return asking, json.loads((directory / ".running.json").read_text())["pid"], directory


# --- what a command does


@pytest.mark.numeric
def test_a_fork_writes_the_bytes_of_a_started_process(server, settings, tmp_path):
    """Training and measuring: rm with both kinds of rows, dpo with sampled responses, ppo with a judge."""
    used = {"add_disco_head": True, "disco_pref": True}
    sampled = {"num_eval_generations": 6, "max_new_tokens": 5}
    runs = {
        "rm": settings("rm", name="rm", lora_dropout=0.1, eval_strategy="steps", eval_steps=2, **used),
        "dpo": settings("dpo", name="dpo", add_beta_head=True, use_dynamic_beta=True, **used, **sampled),
        "ppo": settings("ppo", name="ppo", reward_model=str(tmp_path / "rm"), max_steps=2, **used, **sampled),
    }
    found = {}
    for how in ("cold", "warm"):
        for name, made in runs.items():
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(made))
            done = run(["train", f"{name}.yaml"], server[1] if how == "warm" else None, cwd=tmp_path)
            assert done.returncode == 0, done.stderr[-2000:]
            printed = done.stdout, [line for line in done.stderr.splitlines() if " left" not in line]
            assert "\r" not in done.stderr  # of a bar: nobody looks
            found[how, name] = {
                str(path.relative_to(tmp_path)): path.read_bytes()
                for path in sorted((tmp_path / name).rglob("*"))
                if path.is_file() and path.name not in TIMES
            } | {"printed": printed, "names": sorted(os.listdir(tmp_path / name))}
        for name in runs:
            shutil.move(tmp_path / name, tmp_path / f"{how}-{name}")
    for name in runs:
        assert found["cold", name] == found["warm", name]
        assert len(found["warm", name]) > 6
    start = {
        how: json.loads((tmp_path / f"{how}-rm" / "cost.json").read_text())["startup_seconds"]
        for how in ("cold", "warm")
    }
    assert 0 < start["warm"] < start["cold"]  # its own, and not the age of what it is forked from


def test_a_fork_sees_the_gpu_that_its_job_has_claimed(server, settings, tmp_path):
    """The list of devices makes no start cold; torch has been imported before, and is asked for GPUs after."""
    device = f"warm-{os.getpid()}"
    assert is_warm(server, variables={"DISCOBETA_DEVICES": device})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings("rm", max_steps=1)))
    variables = environment(server[1], DISCOBETA_DEVICES=device)
    words = [*DISCOBETA, "train", str(tmp_path / "run.yaml"), "--no-evaluate"]
    done = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"GPU {device} was granted, and torch sees none" in done.stdout + done.stderr


@pytest.mark.parametrize(
    "words, status",
    [
        (["train", "nowhere.yaml"], 2),
        (["no-such-command"], 2),
        (["grid", "--stage", "rm"], 0),
        (["compare", "a", "b"], 2),
        (["train", *["--set", "=" * 100_000] * 15], 2),  # more than a socket's message, less than Linux' limit
    ],
    ids=lambda value: value[0] if isinstance(value, list) else str(value),
)
def test_status_and_words_are_those_of_a_started_process(server, words, status, tmp_path):
    cold, hot = (run(words, folder, cwd=tmp_path) for folder in (None, server[1]))
    assert cold.returncode == hot.returncode == status
    assert (cold.stdout, cold.stderr) == (hot.stdout, hot.stderr) and cold.stdout + cold.stderr


def test_input_output_and_directory_are_those_of_who_asks(server, settings, tmp_path):
    """As in a rule: printf … | python -m discobeta … &> log, in the directory that snakemake was started in."""
    made = settings("rm", tokenized_path="tokens") | {"output_dir": ""}
    (tmp_path / "in.yaml").write_text(yaml.safe_dump(made))
    line = f"cat in.yaml | {sys.executable} -m discobeta prepare - > log 2>&1; echo $? > status"
    subprocess.run(["sh", "-c", line], cwd=tmp_path, env=environment(server[1]), check=True)
    assert (tmp_path / "status").read_text() == "0\n"
    assert "40 training rows, 12 held-out rows" in (tmp_path / "log").read_text()
    assert (tmp_path / "tokens" / "tokens.json").is_file()


def test_a_reader_that_has_gone_ends_the_command_as_ever(server):
    line = f"{sys.executable} -m discobeta grid | head -n 1; echo ${{PIPESTATUS[0]}} >&2"
    for folder in (None, server[1]):
        variables = environment(folder) if folder else ENVIRONMENT
        done = subprocess.run(["bash", "-c", line], env=variables, capture_output=True, text=True)
        assert done.stdout.startswith("stage") and done.stderr.strip() in ("0", "141")


def test_many_at_once(server, tmp_path):
    processes = [
        subprocess.Popen(
            [*DISCOBETA, "train", f"{number}.yaml"], env=environment(server[1]), cwd=tmp_path, stderr=subprocess.PIPE
        )
        for number in range(64)
    ]
    for number, process in enumerate(processes):
        _, said = process.communicate(timeout=120)
        assert (process.returncode, said.decode()) == (
            2,
            f"discobeta: cannot read {number}.yaml: No such file or directory\n",
        )
    wait_for(lambda: len(children(server[0].pid)) == 1)  # its command: no fork is left, dead or alive


# --- how it ends


@pytest.mark.parametrize("how", ["cold", "warm"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_work_and_its_hold(server, settings, tmp_path, how, number, status):
    asking, worker, directory = start_long(settings, tmp_path, server[1] if how == "warm" else None)
    assert (worker == asking.pid) == (how == "cold")
    asking.send_signal(number)
    _, said = asking.communicate(timeout=30)
    assert asking.returncode == status
    assert ("interrupted" in said.decode()) == (number == signal.SIGINT) and b"Traceback" not in said
    assert is_gone(worker)
    assert not (directory / ".running.json").exists() and not (directory / "provenance.json").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_what_is_killed_is_dead_at_once_and_somebody_goes_on(server, settings, tmp_path, number):
    """As when the process that works is killed itself: its claim stays, and the next one takes it."""
    asking, worker, directory = start_long(settings, tmp_path, server[1])
    asking.send_signal(number)
    asking.communicate(timeout=30)
    assert asking.returncode == -number
    wait_for(lambda: is_gone(worker), seconds=5)
    wait_for(lambda: worker not in children(server[0].pid), seconds=5)  # no zombie, so the claim is seen to be dead
    assert json.loads((directory / ".running.json").read_text())["pid"] == worker
    made = yaml.safe_load((tmp_path / "long.yaml").read_text()) | {"max_steps": 1, "overwrite_output_dir": True}
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(made))
    done = run(["train", str(tmp_path / "short.yaml")], server[1])
    assert done.returncode == 0 and "waiting" not in done.stderr
    assert (directory / "provenance.json").exists() and not (directory / ".running.json").exists()


def test_a_fork_that_is_killed_is_a_process_that_was_killed(server, settings, tmp_path):
    asking, worker, _ = start_long(settings, tmp_path, server[1])
    os.kill(worker, signal.SIGKILL)
    asking.communicate(timeout=30)
    assert asking.returncode == -signal.SIGKILL
    assert run(["--version"], server[1]).returncode == 0 and is_warm(server)


# --- when there is none


def test_it_is_warm_where_nothing_differs(server):
    assert is_warm(server)
    assert is_warm(server, variables={"PWD": "/", "TMPDIR": "/var/tmp", "DISCOBETA_TRACEBACK": ""})


@pytest.mark.parametrize(
    "variables", [{"SLURM_JOB_ID": "7"}, {"OMP_NUM_THREADS": "2"}, {"HF_HOME": "/elsewhere"}, {"RANK": "0"}], ids=str
)
def test_another_environment_starts_by_itself(server, variables):
    assert not is_warm(server, variables=variables)


def test_other_rights_limits_files_and_options_start_by_themselves(server):
    assert not is_warm(server, preexec_fn=lambda: os.umask(0o027))
    assert not is_warm(server, prefix=["nice", "-n", "3"])
    assert not is_warm(server, prefix=["sh", "-c", 'ulimit -n 200; exec "$@"', "sh"])
    assert not is_warm(server, prefix=["bash", "-c", 'exec "$@" 7</dev/null', "bash"])
    assert not is_warm(server, variables={"PYTHONOPTIMIZE": "1"})


def test_other_code_starts_by_itself(tmp_path, monkeypatch):
    """A source that is edited meanwhile is not what has been imported."""
    shutil.copytree(Path(warm.__file__).parent, tmp_path / "package")
    monkeypatch.setattr(warm, "__file__", str(tmp_path / "package" / "warm.py"))
    before = warm.likeness({})
    assert warm.likeness({}) == before
    os.utime(tmp_path / "package" / "method" / "dpo.py", ns=(1, 1))
    assert warm.likeness({}) != before


def test_where_nobody_answers_a_command_starts_by_itself():
    folder = Path("/tmp", f"discobeta-test-{os.getpid()}")  # a socket's path is short
    folder.mkdir(mode=0o700)
    try:
        assert run(["--version"], folder / "none").returncode == 0
        place = run_likeness()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(folder / place))
        assert run(["--version"], folder).stdout.startswith("discobeta ")  # nobody listens
        (folder / place).unlink()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(folder / place))
            listener.listen()
            asking = subprocess.Popen([*DISCOBETA, "--version"], env=environment(folder), stdout=subprocess.PIPE)
            listener.accept()[0].close()  # somebody who hangs up
            assert asking.communicate(timeout=60)[0].startswith(b"discobeta ")
    finally:
        shutil.rmtree(folder)


def run_likeness():
    """The name of the socket that a command asks for."""
    line = "import os; from discobeta import warm; print(warm.likeness(dict(os.environ)))"
    return subprocess.run(
        [sys.executable, "-c", line], env=ENVIRONMENT, capture_output=True, text=True, check=True
    ).stdout.strip()


# --- the wrapper


def test_the_status_is_the_commands():
    for line, status in (("exit 0", 0), ("exit 7", 7), ("kill -9 $$", -9)):
        assert subprocess.run([*PYTHON, "discobeta.warm", "sh", "-c", line], env=ENVIRONMENT).returncode == status
    done = subprocess.run([*PYTHON, "discobeta.warm", "./nothing"], env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (127, "discobeta.warm: ./nothing: No such file or directory\n")


def test_in_a_job_of_slurm_there_is_only_the_command():
    line = 'echo "$PPID ${DISCOBETA_WARM:-none}"'
    words = [*PYTHON, "discobeta.warm", "sh", "-c", line]
    done = subprocess.run(words, env=ENVIRONMENT | {"SLURM_JOB_ID": "7"}, capture_output=True, text=True)
    assert done.stdout == f"{os.getpid()} none\n"


@pytest.mark.parametrize("end", ["input", "SIGTERM", "SIGKILL"])
def test_nothing_is_left_when_it_ends(settings, tmp_path, end):
    with warm_process() as (process, folder):
        command = children(process.pid)
        asking, worker, directory = start_long(settings, tmp_path, folder)
        assert worker in children(process.pid)
        if end == "input":  # the command ends of itself
            process.stdin.close()
        else:
            process.send_signal(getattr(signal, end))
        status = {"input": 0, "SIGTERM": -signal.SIGTERM, "SIGKILL": -signal.SIGKILL}[end]
        assert process.wait(20) == status
        wait_for(lambda: all(map(is_gone, (*command, worker))), seconds=10)
        asking.communicate(timeout=10)
        assert asking.returncode == -signal.SIGTERM
        assert not (directory / ".running.json").exists()
        assert end == "SIGKILL" or not Path(folder).exists()
        shutil.rmtree(folder, ignore_errors=True)


def test_an_interrupt_is_the_commands_affair():
    """The terminal's interrupt reaches all; the wrapper waits for what the command makes of it."""
    line = "trap 'sleep .5; exit 3' INT; echo ready; while :; do sleep .05; done"
    with warm_process("sh", "-c", line, start_new_session=True) as (process, said):
        assert said == "ready"
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(20) == 3


def test_signals_of_the_c_library_do_not_count():
    """33 may stand among the ignored signals of what a shell has started in the background."""
    here = warm.rights({"SigIgn": "0000000081001002"})
    assert warm.rights({"SigIgn": "0000000181001002"}) == here
    assert warm.rights({"SigIgn": "0000000081001000"}) != here  # SIGINT
