"""Bad input: one or two lines that say what and where, exit status 2, no traceback, nothing half-written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from discobeta.cli import main


@pytest.fixture
def refused(settings, tmp_path, capsys):
    """refused(changes, ...): run `discobeta train` in this process; the message it was refused with."""

    def go(stage="dpo", *words, **changes) -> str:
        wanted = {name: value for name, value in settings(stage, **changes).items() if value is not ...}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(wanted))
        output = Path(wanted["output_dir"])
        leftovers = {path.name for path in output.iterdir()} if output.is_dir() else set()
        status = main(["train", str(path), *words])
        message = capsys.readouterr().err
        lines = [line for line in message.splitlines() if line.startswith("discobeta: ")]
        assert status == 2 and len(lines) == 1, message
        assert "Traceback" not in message
        assert not list(tmp_path.rglob(".*partial*"))
        if "diverged" not in message:  # that run's log stays, to be looked at
            new = {path.name for path in output.iterdir()} - leftovers if output.is_dir() else set()
            assert new <= {"reference"}, new  # a whole reference pass is worth keeping
        return message

    return go


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_name_or_path": "./no/such/model"}, "there is no directory ./no/such/model"),
        ({"model_name_or_path": ...}, "stage dpo needs model_name_or_path"),
        ({"dataset": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"dataset": ...}, "dataset is missing"),
        ({"pref_btea": 0.1}, "unknown key 'pref_btea'; did you mean 'pref_beta'?"),
        ({"learning_rate": "fast"}, "learning_rate: 'fast' should be a number"),
        ({"lora_rank": 0}, "lora_rank: 0 should be at least 1"),
        ({"bf16": "yes"}, "bf16: 'yes' should be true or false"),
        ({"stage": "dop"}, "stage: 'dop' should be sft or rm or dpo or ppo"),
        ({"disco_pref": True}, "disco_pref: true needs add_disco_head: true"),
        ({"use_dynamic_beta": True}, "use_dynamic_beta: true needs add_beta_head: true"),
        ({"val_size": 0.1}, "val_size and eval_dataset contradict each other"),
        ({"fp16": True}, "use bf16: true"),
        ({"deepspeed": "ds.json"}, "--processes N"),
        ({"cutoff_len": 2, "max_unusable_rows": 1.0}, "none of the 40 rows is usable"),
        ({"cutoff_len": 5}, "not usable|unusable"),
        ({"lr_scheduler_type": "sideways"}, "lr_scheduler_type: 'sideways' should be linear or cosine or"),
        ({"lora_target": "nothing"}, "no linear layer called nothing"),
        ({"output_dir": "/proc/version"}, "output_dir: /proc/version is a file"),
        ({"adapter_name_or_path": "./no/adapter"}, "./no/adapter"),
        ({"learning_rate": 1e30, "max_steps": 20, "max_grad_norm": 0}, "training diverged at step"),
        ({"num_train_epochs": 0, "max_steps": -1}, "leave nothing to train"),
    ],
)
def test_train_refuses(refused, changes, says):
    import re

    assert re.search(says if "|" in says else re.escape(says), refused(**changes))


def test_unreadable_configs(tmp_path, capsys):
    cases = {
        "missing.yaml": (None, "cannot read"),
        "list.yaml": ("- a\n- b\n", "must hold `key: value` lines"),
        "broken.yaml": ("a: [1\n", "not valid YAML"),
        "twice.yaml": ("stage: rm\nseed: 1\nseed: 2\n", "key 'seed' stands twice"),
        "latin.yaml": (b"stage: \xe9", "not UTF-8"),
    }
    for name, (content, says) in cases.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        assert main(["train", str(path)]) == 2
        message = capsys.readouterr().err
        assert says in message and str(path) in message, message


def test_a_model_that_cannot_be_read(refused, base, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    (broken / "model.safetensors").write_bytes(b"not a model")
    assert f"cannot load the model {broken}" in refused(model_name_or_path=str(broken))


def test_a_tracker_that_is_not_installed(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "report_to: wandb is not installed (pip install wandb)" in refused(report_to="wandb")


def test_the_directory_of_another_run(run, refused):
    path = run("dpo", name="taken")
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    assert "holds another run (pref_beta: 0.5 there, 0.7 here)" in refused(name="taken", pref_beta=0.7)
    assert before == {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_too_many_broken_rows_are_named(refused, pairs, tmp_path):
    lines = pairs["train"].read_text().splitlines()
    row = json.loads(lines[4])
    lines[4] = json.dumps(row | {"rejected": ""})
    lines[6] = '{"prompt": "user'
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    message = refused(dataset=str(path), max_unusable_rows=0.01)
    assert "rows.jsonl:5" in message and "rows.jsonl:7" in message and "empty response" in message


def test_a_few_broken_rows_are_counted_and_left_out(run, pairs, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(pairs["train"].read_text() + "not json\n")
    directory = run("dpo", dataset=str(path))
    assert "40 of 41 rows are usable" in capsys.readouterr().out
    assert json.loads((directory / "provenance.json").read_text())["pairs"] == 40


@pytest.mark.parametrize("full_after", ["adapter_model.safetensors", "step-2.pt", "log.jsonl"])
def test_a_full_disk_is_one_line(settings, tmp_path, full_after):
    """A file-size limit makes the writes of a real process fail as a full disk does."""
    config = tmp_path / "run.yaml"
    wanted = settings("dpo", save_steps=2 if full_after == "step-2.pt" else 0, logging_steps=1, max_steps=40)
    config.write_text(yaml.safe_dump(wanted))
    limit = 2_000 if full_after == "log.jsonl" else 12_000
    code = (
        "import resource, signal, sys; from discobeta.cli import main; import discobeta.runs, discobeta.loop as loop\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "fit = loop.fit\n"
        "def limited(*words):\n"
        f"    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "    return fit(*words)\n"
        "loop.fit = limited\n"
        f"sys.exit(main(['train', {str(config)!r}, '--no-evaluate']))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "discobeta: cannot write" in done.stderr, done.stderr
    output = Path(wanted["output_dir"])
    assert not (output / "provenance.json").exists() and not (output / "adapter").exists()
    assert not list(output.rglob("*partial*"))
