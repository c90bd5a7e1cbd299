"""Several processes by one command: a used head is reduced, an idle one stays idle, a killed run resumes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from discobeta import folders
from discobeta.design.study import Study
from discobeta.errors import UserError
from discobeta.launch import train

USED = {"add_disco_head": True, "disco_pref": True, "add_beta_head": True, "use_dynamic_beta": True}
FILES = ("adapter/adapter_model.safetensors", "heads.safetensors", "log.jsonl")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def command(settings, tmp_path):
    """command(name, processes, **changes): the command line of a run whose settings come from a file."""

    def make(name, processes, stage="dpo", **changes):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings(stage, name=name, logging_steps=1, lora_dropout=0.0, **changes)))
        words = ["train", str(path), "--no-evaluate", *(["--processes", str(processes)] if processes > 1 else [])]
        return [sys.executable, "-m", "discobeta", *words]

    return make


def done(command):
    finished = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]


@pytest.mark.numeric
def test_two_processes_compute_what_one_does(command, tmp_path):
    """The division that a study makes: half the batch per process, so every forward pass keeps its rows."""
    done(command("one", 1, per_device_train_batch_size=8, **USED))
    done(command("two", 2, per_device_train_batch_size=4, **USED))
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").open()] for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 4
    for one, two in zip(*logs, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5), (name, one["step"])
    assert logs[0][1]["disco_grad_norm"] > 1e-3  # the head is trained
    assert json.loads((tmp_path / "two" / "cost.json").read_text())["processes"] == 2


@pytest.mark.numeric
def test_an_idle_head_stays_idle_in_two_processes(command, tmp_path):
    done(command("absent", 2, per_device_train_batch_size=4))
    done(command("idle", 2, per_device_train_batch_size=4, add_disco_head=True, add_beta_head=True))
    for name in ("adapter/adapter_model.safetensors", "log.jsonl"):
        assert (tmp_path / "absent" / name).read_bytes() == (tmp_path / "idle" / name).read_bytes()


def test_two_processes_resume(command, tmp_path):
    """The launcher is terminated; no process stays behind, and the same command goes on from the checkpoint."""
    changes = {"per_device_train_batch_size": 4, "max_steps": 60, "save_steps": 10, **USED}
    done(command("whole", 2, **changes))
    words = command("killed", 2, **changes)
    process = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "killed").glob("checkpoints/step-*.pt")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait() != 0
    before = (tmp_path / "killed" / "log.jsonl").read_bytes()
    time.sleep(1)
    assert (tmp_path / "killed" / "log.jsonl").read_bytes() == before  # nobody goes on
    assert not (tmp_path / "killed" / "provenance.json").exists()
    (tmp_path / "alone").mkdir()
    shutil.copytree(tmp_path / "killed" / "checkpoints", tmp_path / "alone" / "checkpoints")
    for name in (folders.MARK, "config.yaml"):
        shutil.copy(tmp_path / "killed" / name, tmp_path / "alone" / name)
    alone = subprocess.run(command("alone", 1, **changes), env=ENVIRONMENT, capture_output=True, text=True)
    assert alone.returncode == 0 and "is of other settings" in alone.stdout  # its steps would have other rows
    again = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True)
    assert again.returncode == 0 and "resuming from" in again.stdout
    for name in FILES:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


def test_fewer_gpus_than_processes_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match=r"2 processes, and 1 GPU granted: ask for 2 \(`gpu:` in the Slurm profile\)"):
        train(None, 2, evaluate=False)


def test_a_study_divides_its_batch():
    def batch(stage, **changes):
        settings = {
            "study": "s", "data": {"dataset": "a.jsonl", "val_size": 1}, "base": {"model_name_or_path": "m"},
            "gpus_per_run": 2, "arms": ["baseline"], "seeds": [1], **changes,
        }  # fmt: skip
        study = Study(settings)
        run = study.run(stage, "baseline", 1)
        keys = ("per_device_train_batch_size", "gradient_accumulation_steps")
        return tuple(study.run_settings(run).get(key) for key in keys)

    assert batch("rm") == (4, None)  # half of the default 8
    assert batch("dpo", dpo={"per_device_train_batch_size": 6, "gradient_accumulation_steps": 4}) == (3, 4)
    assert batch("rm", common={"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}) == (3, 2)
    assert batch("rm", gpus_per_run=1, common={"per_device_train_batch_size": 3}) == (3, None)
    with pytest.raises(UserError, match="gpus_per_run: 2 divides neither"):
        batch("rm", common={"per_device_train_batch_size": 3})
    with pytest.raises(UserError, match="gpus_per_run: 0 should be a whole number, at least 1"):
        batch("rm", gpus_per_run=0)
