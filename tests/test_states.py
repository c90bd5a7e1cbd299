"""How far a run is, and a study: from directories that were made by hand as each kind of end leaves them."""

import io
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from discobeta import cli, files, lock, processes, record
from discobeta.design.study import Study
from discobeta.report import states, status
from discobeta.report.states import Job, State, state_of

STUDY = {
    "study": "hand",
    "seeds": [1, 2],
    "stages": ["rm"],
    "arms": ["baseline", "disco-used_beta-absent"],
    "data": {"dataset": "rows.jsonl", "eval_dataset": "held-out.jsonl"},
    "base": {"model_name_or_path": "a/model"},
    "common": {"max_steps": 100, "logging_steps": 10},
}
RUNS = Path("results/hand/runs/rm")
LOGS = Path("results/hand/logs/rm")
BASELINE, DISCO = "baseline", "disco-used_beta-absent"


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text(yaml.safe_dump(STUDY))
    return Study(STUDY)


def config_of(study, arm=BASELINE, seed=1):
    return study.config(study.run("rm", arm, seed))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def log_lines(directory, steps, seconds=2.0):
    """log.jsonl and speed.jsonl up to `steps`, a line every 10; `seconds` for each of these."""
    lines = range(10, steps + 1, 10)
    write(directory / "log.jsonl", "".join(json.dumps({"step": n, "epoch": n / 50, "loss": 1.0}) + "\n" for n in lines))
    write(directory / "speed.jsonl", "".join(json.dumps({"step": n, "seconds": seconds}) + "\n" for n in lines))


def hold(directory, **changes):
    """A claim of this very process, or of what the changes say."""
    write(directory / lock.NAME, json.dumps(lock.this_holder() | changes))


def dead():
    """The number of a process of this machine that is no more."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def finish(study, arm=BASELINE, seed=1, seconds=50.0, **settings):
    """A finished run of the study, or of other settings."""
    config = config_of(study, arm, seed).replace(**settings)
    directory = RUNS / arm / f"seed-{seed}"
    log_lines(directory, 100)
    write(directory / "config.yaml", yaml.safe_dump(config.resolved()))
    files.write_json(directory / "cost.json", {"seconds": seconds, "startup_seconds": 4.0})
    files.write_sealed(directory / "provenance.json", {"settings": record.settings_hash(config), "files": {}})
    return directory


def measure(study, directory, seconds=6.0, **settings):
    config = config_of(study)
    facts = {"run": files.sha256(directory / "provenance.json")}
    facts |= {"settings": config.settings_of("evaluation") | settings, "files": {}}
    files.write_sealed(directory / "evaluation.json", facts)
    files.write_json(directory / "metrics.json", {})
    files.write_json(directory / "evaluation_cost.json", {"seconds": seconds})


# --- one run


def test_a_run_that_nobody_has_begun_waits(study):
    found = state_of(RUNS / BASELINE / "seed-1", config_of(study), log=LOGS / BASELINE / "seed-1.log")
    assert found == State("waiting", None, 100)
    assert not RUNS.exists()  # nothing is made by looking


def test_a_run_is_running_while_its_process_lives(study):
    """Its step is that of its log, its pace that of the last five lines: 10 steps in 2 s each."""
    directory = RUNS / BASELINE / "seed-1"
    log_lines(directory, 70)
    hold(directory)
    found = state_of(directory, config_of(study))
    said = f"process {os.getpid()} on {socket.gethostname()}"
    assert found == State("running", 70, 100, pytest.approx(0.2), said)


def test_a_pace_is_that_of_the_last_lines_also_where_lines_are_written_between(study):
    directory = RUNS / BASELINE / "seed-1"
    log_lines(directory, 20, seconds=100.0)
    with (directory / "speed.jsonl").open("a") as stream:
        for step, seconds in ((30, 1.0), (40, 2.0), (50, 3.0), (60, 4.0), (70, 5.0)):
            stream.write(json.dumps({"step": step, "seconds": seconds}) + "\n")
        stream.write('{"step": 80, "sec')  # being written
    hold(directory)
    assert state_of(directory, config_of(study)).pace == pytest.approx(15 / 50)


def test_a_run_whose_process_is_gone_is_interrupted_and_goes_on_from_its_checkpoint(study):
    directory = RUNS / BASELINE / "seed-1"
    log_lines(directory, 70)
    for step in (9, 40):
        write(directory / "checkpoints" / f"step-{step}.pt", "")
    hold(directory, pid=dead())
    found = state_of(directory, config_of(study))
    assert (found.kind, found.step, found.steps, found.detail) == ("interrupted", 40, 100, "goes on from step 40")


@pytest.mark.parametrize(("silent", "kind"), [(10, "running"), (70, "running"), (85, "interrupted")])
def test_a_process_of_another_machine_lives_by_its_signs_of_life(study, silent, kind):
    """It touches its file every 5 seconds; another may take its place after 20, and a minute is for clocks."""
    directory = RUNS / BASELINE / "seed-1"
    log_lines(directory, 30)
    hold(directory, host="node-7", namespace="another", pid=1, job="4711")
    then = time.time() - silent
    os.utime(directory / lock.NAME, (then, then))
    found = state_of(directory, config_of(study))
    assert found.kind == kind
    if kind == "running":
        assert found.detail == "process 1 on node-7, Slurm job 4711"


def test_a_run_that_has_refused_its_input_has_failed_with_its_last_line(study):
    log = write(LOGS / BASELINE / "seed-1.log", "9600 rows\ndiscobeta: training diverged at step 20 (loss inf)\n\n")
    log_lines(RUNS / BASELINE / "seed-1", 20)
    found = state_of(RUNS / BASELINE / "seed-1", config_of(study), log=log)
    assert (found.kind, found.step) == ("failed", 20)
    assert found.detail == "discobeta: training diverged at step 20 (loss inf)"


@pytest.mark.parametrize(
    ("last", "kind"),
    [
        ("discobeta: interrupted; a run goes on from its last checkpoint", "interrupted"),
        ("\rdpo: 10%|█| 30/300 loss\r", "interrupted"),
        ("bash: line 1:  9 Killed   python -m discobeta train -", "failed"),
        ("ModuleNotFoundError: No module named 'torch'", "failed"),
        ("slurmstepd: error: *** JOB 7 ON a CANCELLED AT 2026 DUE TO TIME LIMIT ***", "failed"),
    ],
)
def test_what_the_last_line_of_a_log_says(study, last, kind):
    log_lines(RUNS / BASELINE / "seed-1", 20)
    log = write(LOGS / BASELINE / "seed-1.log", f"9600 rows\n{last}\n")
    assert state_of(RUNS / BASELINE / "seed-1", config_of(study), log=log).kind == kind


def test_a_job_that_has_just_begun_is_running_and_an_old_log_says_nothing(study):
    log = write(LOGS / BASELINE / "seed-1.log", "")
    directory = RUNS / BASELINE / "seed-1"
    assert state_of(directory, config_of(study), log=log) == State("running", 0, 100, None, "starting")
    then = time.time() - 130
    os.utime(log, (then, then))
    assert state_of(directory, config_of(study), log=log).kind == "waiting"  # its results were removed, say


def test_a_finished_run_is_done_if_it_is_the_one_that_is_asked_for(study):
    directory = finish(study)
    assert state_of(directory, config_of(study)) == State("done", 100, 100)
    other = config_of(study).replace(learning_rate=0.5)
    found = state_of(directory, other)
    there = config_of(study).learning_rate
    assert found.kind == "waiting"
    assert found.detail == f"trained with other settings (learning_rate: {there} there, 0.5 here)"
    assert state_of(directory) == State("done", 100, 100)  # by itself it is what it is


def test_a_run_of_before_a_key_was_there_is_done_if_it_had_what_is_the_default_now(study):
    """Its hash is of fewer keys, and its config does not name the new one."""
    directory = finish(study)
    settings = yaml.safe_load((directory / "config.yaml").read_text())
    del settings["lora_dropout"]
    write(directory / "config.yaml", yaml.safe_dump(settings))
    files.write_sealed(directory / "provenance.json", {"settings": "0123", "files": {}})
    assert state_of(directory, config_of(study)).kind == "done"
    assert state_of(directory, config_of(study).replace(lora_dropout=0.3)).kind == "waiting"


def test_a_finished_run_whose_record_was_changed_is_not_done(study):
    directory = finish(study)
    text = (directory / "provenance.json").read_text()
    (directory / "provenance.json").write_text(text.replace('"settings": "', '"settings": "0'))
    found = state_of(directory, config_of(study))
    assert found.kind == "waiting" and found.detail.startswith("damaged: ")


def test_steps_of_a_run_of_epochs_are_counted_by_its_log(study):
    """50 steps an epoch by its log, 2.5 epochs: 125 steps, of which a proof makes the first 20."""
    directory = RUNS / BASELINE / "seed-1"
    log_lines(directory, 30)
    config = config_of(study).replace(max_steps=-1, num_train_epochs=2.5)
    assert state_of(directory, config).steps == 125
    assert state_of(directory, config.replace(stop_after_steps=20)).steps == 20
    held_out = "".join(json.dumps({"step": n, "eval_loss": 1.0}) + "\n" for n in range(31, 71))  # which say no epoch
    write(directory / "log.jsonl", (directory / "log.jsonl").read_text() + held_out)
    assert state_of(directory, config).steps == 125 and state_of(directory, config).kind == "interrupted"
    write(directory / "log.jsonl", "")
    assert state_of(directory, config).steps is None


def test_no_weight_is_read(study):
    """A pipe in their place would make whoever reads it wait for ever."""
    directory = finish(study)
    (directory / "adapter").mkdir()
    os.mkfifo(directory / "adapter" / "adapter_model.safetensors")
    measure(study, directory)
    found = status.Watched(study, ["study.yaml"], []).look()
    assert found.count("done") == 2


# --- a study


def look(study):
    return status.Watched(study, ["study.yaml"], []).look()


def kinds(found, kind="rm"):
    return {job.name: state.kind for job, state in found.states.items() if job.kind == kind}


def test_a_study_is_counted_by_what_its_runs_left(study):
    measure(study, finish(study, BASELINE, 1))
    finish(study, BASELINE, 2)
    log_lines(RUNS / DISCO / "seed-1", 40)
    hold(RUNS / DISCO / "seed-1")
    write(LOGS / DISCO / "seed-2.log", "discobeta: out of memory\n")
    found = look(study)
    assert kinds(found) == {
        "baseline, seed 1": "done",
        "baseline, seed 2": "done",
        "disco-used_beta-absent, seed 1": "running",
        "disco-used_beta-absent, seed 2": "failed",
    }
    assert kinds(found, "evaluate") == {
        "rm, baseline, seed 1": "done",
        "rm, baseline, seed 2": "waiting",
        "rm, disco-used_beta-absent, seed 1": "waiting",
        "rm, disco-used_beta-absent, seed 2": "waiting",
    }
    assert kinds(found, "tokens") == {"all": "waiting"}


def test_an_evaluation_is_done_if_it_is_of_this_run_and_of_these_settings(study):
    directory = finish(study)
    measure(study, directory)
    assert kinds(look(study), "evaluate")["rm, baseline, seed 1"] == "done"
    measure(study, directory, per_device_eval_batch_size=3)
    found = look(study)
    (why,) = [state.detail for job, state in found.states.items() if job.name == "rm, baseline, seed 1"]
    assert kinds(found, "evaluate")["rm, baseline, seed 1"] == "waiting" and "per_device_eval_batch_size: 3" in why
    measure(study, directory)
    finish(study, seconds=51.0)  # trained again: another record
    facts = files.read_sealed(directory / "provenance.json") | {"commit": "another"}
    files.write_sealed(directory / "provenance.json", facts)
    assert kinds(look(study), "evaluate")["rm, baseline, seed 1"] == "waiting"
    hold(directory)
    found = look(study)
    assert kinds(found, "evaluate")["rm, baseline, seed 1"] == "running"
    assert kinds(found)["baseline, seed 1"] == "done"


def test_a_shared_step_is_running_while_it_is_written_beside(study):
    folder = Path("results/hand/shared/data/all/tokens")
    (folder.parent / f".tokens.partial-{processes.tag()}-0123abcd").mkdir(parents=True)
    assert kinds(look(study), "tokens") == {"all": "running"}
    (folder.parent / f".tokens.partial-{processes.tag()}-0123abcd").rmdir()
    place = processes.tag().partition("-")[0]
    (folder.parent / f".tokens.partial-{place}-{dead()}-0123abcd").mkdir()
    assert kinds(look(study), "tokens") == {"all": "waiting"}
    write(LOGS.parent / "prepare" / "all.log", "discobeta: dataset rows.jsonl: no such file\n")
    assert kinds(look(study), "tokens") == {"all": "failed"}
    write(folder / "tokens.json", "{}")
    assert kinds(look(study), "tokens") == {"all": "done"}


def test_the_time_left_is_that_of_the_studys_own_runs_by_the_step(study):
    """By hand: baseline takes 50 s for 100 steps and Disco 80 s, 4 s before the first; measuring 6 s.

    Disco of seed 2 is at step 40 with 1 s a step: 60 s are left. Baseline of seed 2 waits: 4 + 50. Two evaluations are
    left of runs that are done or not: seed 2 of both arms, 6 s each, and seed 1 of Disco. 60 + 54 + 3 * 6 = 132.
    """
    measure(study, finish(study, BASELINE, 1, seconds=50.0))
    finish(study, DISCO, 1, seconds=80.0)
    log_lines(RUNS / DISCO / "seed-2", 40, seconds=10.0)
    hold(RUNS / DISCO / "seed-2")
    found = look(study)
    assert found.unmeasured == [] and found.at_once == 1
    assert found.seconds_left == pytest.approx(132)
    log_lines(RUNS / BASELINE / "seed-2", 50, seconds=5.0)  # 25 s instead of 54, and two at once
    hold(RUNS / BASELINE / "seed-2")
    assert look(study).seconds_left == pytest.approx((60 + 25 + 18) / 2)
    assert "About 52 s left, with 2 jobs at once, as now." in status.text(look(study))


def test_what_is_not_measured_is_in_no_sum_and_is_named(study):
    """A failed run is made anew as a whole; an arm that has not run takes what its stage does."""
    finish(study, BASELINE, 1, seconds=50.0)
    log_lines(RUNS / BASELINE / "seed-2", 90)
    write(LOGS / BASELINE / "seed-2.log", "discobeta: out of memory\n")
    found = look(study)
    assert found.unmeasured == ["evaluate"]
    assert found.seconds_left == pytest.approx(3 * 54)
    assert "At least 2 min 42 s left, one job at a time.\nNot measured yet, and in no sum: evaluate." in status.text(
        found
    )
    shown = status.text(look(Study(STUDY | {"study": "empty"})))
    assert "left" not in shown and "in no sum: rm, evaluate." in shown and "Nothing is running." in shown


def test_a_failure_is_shown_with_its_log_and_the_command_that_does_it_again(study, capsys):
    log = write(LOGS / BASELINE / "seed-2.log", "discobeta: training diverged at step 3 (loss nan)\n")
    assert cli.main(["status", "--configfile", "study.yaml", "--set", "common={max_steps: 7}"]) == 0
    shown = capsys.readouterr().out
    again = (
        "snakemake results/hand/runs/rm/baseline/seed-2/provenance.json --cores all --configfile study.yaml "
        "--config 'common={max_steps: 7}'"
    )
    assert "  rm baseline, seed 2: discobeta: training diverged at step 3 (loss nan)\n" in shown
    assert f"    log:   {log}\n    again: {again}\n" in shown


def test_json_names_every_job_with_its_state(study, capsys):
    finish(study)
    assert cli.main(["status", "--configfile", "study.yaml", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == {"done": 1, "running": 0, "interrupted": 0, "waiting": 8, "failed": 0, "all": 9}
    (job,) = [job for job in found["jobs"] if job["state"] == "done"]
    assert (job["stage"], job["arm"], job["seed"], job["step"], job["steps"]) == ("rm", "baseline", 1, 100, 100)
    assert len(found["jobs"]) == 9 and found["unmeasured"] == ["evaluate"]


def test_a_study_that_is_done_says_where_its_tables_are(study, capsys):
    for arm in (BASELINE, DISCO):
        for seed in (1, 2):
            measure(study, finish(study, arm, seed))
    write(Path("results/hand/shared/data/all/tokens/tokens.json"), "{}")
    assert cli.main(["status", "--configfile", "study.yaml", "--watch"]) == 0  # and --watch ends
    shown = capsys.readouterr().out
    assert shown.endswith("All is done. tables: results/hand/tables   figures: results/hand/figures\n")


def test_jobs_in_slurms_queue_are_counted_where_there_is_one(study, tmp_path, monkeypatch):
    here = os.path.realpath(".")
    script = f"#!/bin/sh\nprintf 'RUNNING|{here}\\nPENDING|{here}\\nPENDING|{here}\\nRUNNING|/elsewhere\\n'\n"
    write(tmp_path / "bin" / "squeue", script).chmod(0o755)
    assert "Slurm" not in status.text(look(study))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert status.text(look(study)).endswith("Slurm, jobs of this folder: 1 running, 2 pending")
    write(tmp_path / "bin" / "squeue", "#!/bin/sh\nexit 1\n")
    assert "Slurm" not in status.text(look(study))


def test_two_hundred_runs_are_looked_at_in_a_moment_and_without_torch(tmp_path, monkeypatch):
    """Half of them done, the others of other settings, whose configs are read."""
    monkeypatch.chdir(tmp_path)
    many = STUDY | {"seeds": list(range(1, 101))}
    study = Study(many)
    measure(study, finish(study, BASELINE, 1))
    made = {path.name: path for path in (RUNS / BASELINE / "seed-1").iterdir() if path.name != "provenance.json"}
    for run in study.runs():
        directory = run.directory
        directory.mkdir(parents=True, exist_ok=True)
        for name, path in made.items():
            if not (directory / name).exists():
                os.link(path, directory / name)
        seed = run.seed if run.arm.name == BASELINE else 0
        settings = record.settings_hash(study.config(run).replace(seed=seed))
        write_sealed(directory / "provenance.json", {"settings": settings, "files": {}})
    Path("many.yaml").write_text(yaml.safe_dump(many))
    script = "import sys, time\nfrom discobeta.cli import main\nmain(sys.argv[1:])\n"
    script += "print('torch' in sys.modules, time.process_time())"
    done = subprocess.run(
        [sys.executable, "-c", script, "status", "--configfile", "many.yaml"], capture_output=True, text=True
    )
    has_torch, seconds = done.stdout.splitlines()[-1].split()
    assert has_torch == "False", done.stderr
    assert float(seconds) < 4  # of the processor; what waits for a busy machine is not ours
    assert re.search(r"^rm +100 +100 +200$", done.stdout, re.M)
    assert "100 of another study, or of this one before it was changed" in done.stdout


def write_sealed(path, value):
    """`files.write_sealed` without its care for whoever reads meanwhile."""
    seal = files._seal(value)
    path.write_text(json.dumps(value | {"seal": seal}))


# --- watching


def test_without_a_terminal_a_change_is_a_line():
    rm, dpo = (Job(kind, "baseline, seed 1", Path("t"), Path("l")) for kind in ("rm", "dpo"))
    before = {rm: State("running", 3), dpo: State("running")}
    now = {rm: State("running", 9), dpo: State("failed", detail="discobeta: out of memory")}
    (line,) = status.changes(before, now)
    assert re.fullmatch(r"\d\d:\d\d:\d\d dpo baseline, seed 1: running -> failed \(discobeta: out of memory\)", line)


def test_on_a_terminal_it_is_redrawn_in_place_and_an_interrupt_ends_it(study):
    hold(RUNS / BASELINE / "seed-1")
    master, slave = pty.openpty()
    words = [sys.executable, "-m", "discobeta", "status", "--configfile", "study.yaml", "--watch", "0.1"]
    process = subprocess.Popen(words, stdout=slave, stderr=slave, env=os.environ | {"LINES": "40", "COLUMNS": "100"})
    os.close(slave)
    shown, has_finished = b"", False
    while shown.count(b"\x1b[J") < 3:
        shown += os.read(master, 4096)
        if not has_finished and b"\x1b[J" in shown:
            finish(study, DISCO, 2)
            has_finished = True
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    text = shown.decode()
    heights = [int(up) + 1 for up in re.findall(r"\x1b\[(\d+)A\x1b\[J", text)]
    first = text.partition("\r\x1b")[0]
    assert first.count("\n") + 1 == heights[0]  # it goes up as many lines as it has drawn
    assert "Traceback" not in text and "interrupted" not in text


def test_a_screen_leaves_out_what_does_not_fit(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("LINES", "6")
    monkeypatch.setenv("COLUMNS", "10")
    screen = status.Screen(stream := Terminal())
    screen.draw("\n".join(f"line {n:02} is long" for n in range(9)))
    assert stream.getvalue().splitlines() == ["line 00 i", "line 01 i", "line 02 i", "…", "line 08 i"]


@pytest.mark.parametrize("given", ["0", "-1", "soon", "1e3", "nan"])
def test_seconds_to_wait_are_a_number_above_zero(study, given, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["status", "--configfile", "study.yaml", "--watch", given])
    assert end.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_every_state_is_known(study):
    assert set(status.COUNTED) == set(states.Kind.__args__)
