"""Killed at any step and resumed = never killed, bit for bit on a CPU."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from discobeta.errors import UserError

pytestmark = pytest.mark.numeric

FILES = ("adapter/adapter_model.safetensors", "heads.safetensors", "log.jsonl")
USED = {"add_disco_head": True, "disco_pref": True, "add_beta_head": True, "use_dynamic_beta": True}
COMMON = {
    "max_steps": 8,
    "logging_steps": 3,
    "save_steps": 2,
    "lora_dropout": 0.1,
    "lr_scheduler_type": "cosine",
    **USED,
}


class Killed(BaseException):
    pass


@pytest.fixture
def killed_at(monkeypatch):
    """killed_at(n): the n-th optimiser step from now dies before it changes anything."""

    def arm(step: int):
        count = 0
        original = torch.optim.AdamW.step

        def dying(self, *arguments, **options):
            nonlocal count
            count += 1
            if count == step:
                raise Killed
            return original(self, *arguments, **options)

        monkeypatch.setattr(torch.optim.AdamW, "step", dying)

    return arm


def assert_same_run(one: Path, other: Path):
    for name in FILES:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert not (one / "checkpoints").exists() and not (other / "checkpoints").exists()


@pytest.mark.parametrize("stage", ["rm", "dpo"])
@pytest.mark.parametrize("step", [1, 4, 6, 8])
def test_killed_and_resumed_is_never_killed(run, killed_at, monkeypatch, stage, step):
    whole = run(stage, name="whole", **COMMON)
    with monkeypatch.context():
        killed_at(step)
        with pytest.raises(Killed):
            run(stage, name="killed", **COMMON)
        monkeypatch.undo()
    killed = whole.with_name("killed")
    assert not (killed / "provenance.json").exists()
    saved = [path.name for path in (killed / "checkpoints").glob("*")] if step > 2 else []
    assert saved == ([f"step-{(step - 1) // 2 * 2}.pt"] if step > 2 else [])
    run(stage, name="killed", **COMMON)
    assert_same_run(whole, killed)


@pytest.mark.parametrize("rule", ["learned", "batch", "mallows"])
def test_a_rule_of_beta_goes_on_as_it_was(run, killed_at, monkeypatch, rule):
    settings = {name: value for name, value in COMMON.items() if name not in USED} | {"beta_rule": rule}
    whole = run("dpo", name="whole", **settings)
    killed_at(6)
    with pytest.raises(Killed):
        run("dpo", name="killed", **settings)
    monkeypatch.undo()
    killed = whole.with_name("killed")
    assert [path.name for path in (killed / "checkpoints").glob("*")] == ["step-4.pt"]
    run("dpo", name="killed", **settings)
    assert_same_run(whole, killed)


def test_killed_twice(run, killed_at, monkeypatch):
    whole = run("dpo", name="whole", **COMMON)
    for step in (4, 3):
        killed_at(step)
        with pytest.raises(Killed):
            run("dpo", name="killed", **COMMON)
        monkeypatch.undo()
    run("dpo", name="killed", **COMMON)
    assert_same_run(whole, whole.with_name("killed"))


def test_a_stopped_run_has_the_first_steps_of_the_whole_one(run):
    """stop_after_steps keeps the schedule of the whole run: what a proof of an idle arm relies on."""
    whole = run("dpo", name="whole", max_steps=6, logging_steps=1)
    short = run("dpo", name="short", max_steps=6, logging_steps=1, stop_after_steps=3)
    assert (whole / "log.jsonl").read_text().splitlines()[:3] == (short / "log.jsonl").read_text().splitlines()


def test_a_checkpoint_of_other_settings_is_not_resumed(run, killed_at, monkeypatch):
    killed_at(5)
    with pytest.raises(Killed):
        run("dpo", name="run", **COMMON)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"holds another run \(learning_rate: 0.001 there, 0.002 here\)"):
        run("dpo", name="run", **COMMON, learning_rate=2e-3)
    changed = run("dpo", name="run", **COMMON, learning_rate=2e-3, overwrite_output_dir=True)
    fresh = run("dpo", name="fresh", **COMMON, learning_rate=2e-3)
    assert_same_run(changed, fresh)


def test_a_checkpoint_of_other_code_is_not_resumed(run, killed_at, monkeypatch, capsys):
    whole = run("dpo", name="whole", **COMMON)
    killed_at(5)
    with pytest.raises(Killed):
        run("dpo", name="run", **COMMON)
    monkeypatch.undo()
    monkeypatch.setattr("discobeta.record.code_hash", lambda stage: "other")
    again = run("dpo", name="run", **COMMON)
    assert "starting at step 0" in capsys.readouterr().out
    assert_same_run(whole, again)


def test_a_finished_run_is_left_alone(run):
    path = run("dpo", **COMMON)
    before = (path / "provenance.json").stat().st_mtime_ns
    run("dpo", **COMMON)
    assert (path / "provenance.json").stat().st_mtime_ns == before
    run("dpo", **COMMON, overwrite_output_dir=True)
    assert (path / "provenance.json").stat().st_mtime_ns > before


def test_a_run_that_cannot_start_does_not_destroy_the_one_it_would_replace(run):
    path = run("dpo", **COMMON)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match="there is no directory"):
        run("dpo", **COMMON, model_name_or_path="./mistyped", overwrite_output_dir=True)
    assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_another_run_may_take_the_place_if_it_is_told_to(run):
    path = run("dpo", **COMMON)
    changed = COMMON | {"cutoff_len": 16, "overwrite_output_dir": True, "max_unusable_rows": 1.0}
    again, fresh = run("dpo", **changed), run("dpo", name="fresh", **changed)
    assert again == path
    assert_same_run(again, fresh)


def test_a_broken_checkpoint_is_a_clear_error(run, killed_at, monkeypatch, tmp_path):
    killed_at(5)
    with pytest.raises(Killed):
        run("dpo", **COMMON)
    monkeypatch.undo()
    (path,) = tmp_path.glob("run/checkpoints/*.pt")
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    with pytest.raises(UserError, match=f"resume_from_checkpoint: {path} is no checkpoint, or is damaged"):
        run("dpo", **COMMON, resume_from_checkpoint=str(path))
    assert path.read_bytes() == whole[:1000]


def test_sigkill_for_real(run, settings, tmp_path):
    """A real process, a real SIGKILL once a checkpoint is there, and the same command again."""
    long = COMMON | {"max_steps": 60, "save_steps": 10}
    whole = run("dpo", name="whole", **long)
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings("dpo", name="killed", **long, num_train_epochs=3.0)))
    command = [sys.executable, "-m", "discobeta.cli", "train", str(config), "--no-evaluate"]
    process = subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    killed = tmp_path / "killed"
    deadline = time.monotonic() + 60
    while not list(killed.glob("checkpoints/step-*.pt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "provenance.json").exists()
    subprocess.run(command, env=os.environ, check=True, capture_output=True)
    assert_same_run(whole, killed)
