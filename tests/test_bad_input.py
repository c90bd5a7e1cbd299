"""Bad input: one or two lines that say what and where, exit status 2, no traceback, nothing half-written."""

import json
import os
import subprocess
import sys
import time
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
        ({"use_mca": True}, "--processes N"),
        ({"cutoff_len": 2, "max_unusable_rows": 1.0}, "none of the 40 rows is usable"),
        ({"cutoff_len": 5}, "not usable|unusable"),
        ({"lr_scheduler_type": "sideways"}, "lr_scheduler_type: 'sideways' should be linear or cosine or"),
        ({"lora_target": "nothing"}, "no linear layer called nothing"),
        ({"output_dir": "/proc/version"}, "output_dir: /proc/version is a file"),
        ({"adapter_name_or_path": "./no/adapter"}, "./no/adapter"),
        ({"learning_rate": 1e30, "max_steps": 20, "max_grad_norm": 0}, "training diverged at step"),
        (
            {"learning_rate": 1e39, "max_steps": 1},
            "training diverged at step 1 (28 of 28 weights hold numbers that",
        ),
        ({"adam_epsilon": 0}, "adam_epsilon: 0.0 should be at least 1e-16"),
        (
            {"lr_scheduler_type": "polynomial", "learning_rate": 1e-7},
            "polynomial ends at 1e-07, so learning_rate",
        ),
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
        "import resource, signal, sys; from discobeta.cli import main\n"
        "import discobeta.run.load, discobeta.run.loop as loop\n"
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


# --- YAML that is hostile, or only odd


HOSTILE = {
    "a list where a word stands": ("stage: dpo\neval_strategy: [steps]", "eval_strategy: ['steps'] should be no or"),
    "a mapping": ("stage: dpo\nseed: {a: 1}", "seed: {'a': 1} should be a whole number"),
    "5,000 digits": (f"stage: dpo\nseed: {'9' * 5000}", "is not valid YAML: Exceeds the limit"),
    "a long hexadecimal number": (f"stage: dpo\nseed: 0x{'f' * 5000}", "seed: a very large int should be"),
    "5,000 digits in quotes": (f"stage: dpo\nseed: '{'9' * 5000}'", "seed: '999"),
    "depth 3,000": (f"stage: {'[' * 3000}", "nested too deeply"),
    "a number by its tag": ("stage: dpo\nseed: !!int abc", "is not valid YAML: invalid literal for int()"),
    "a date by its tag": ("stage: dpo\nseed: !!timestamp x", "is not valid YAML: AttributeError"),
    "a truth by its tag": ("stage: dpo\nbf16: !!bool maybe", "is not valid YAML: KeyError"),
    "code by its tag": ("stage: !!python/object/apply:os.system [echo]", "could not determine a constructor"),
    "bytes": ("stage: dpo\nrun_name: !!binary aGk=", "b'hi' is neither text nor a number"),
    "a set": ("stage: dpo\nrun_name: !!set {a, b}", "is neither text nor a number"),
    "no text": ('stage: dpo\nrun_name: "a\\0b"', "holds characters that no text has"),
    "half a character": ('stage: dpo\nrun_name: "\\ud83d"', "holds characters that no text has"),
    "a key that is no text": ("stage: dpo\n1: 2", "the key 1 should be text"),
    "a key that is a list": ("stage: dpo\n? [a]\n: 2", "found unhashable key"),
    "a key that is a truth": ("stage: dpo\nyes: 2", "the key True should be text"),
    "a megabyte of a key": (f"stage: dpo\n? {'k' * 1_000_000}\n: 1", "unknown key 'kkk"),
    "a megabyte of a value": (f"stage: dpo\npref_beta: {'k' * 1_000_000}", "pref_beta: 'kkk"),
    "in itself": ("a: &a [*a]", "nested too deeply, or in itself"),
    "an alias bomb": (
        "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)),
        "holds more than 100,000 values",
    ),
    "not a number": ("stage: dpo\nmodel_name_or_path: x\nlearning_rate: .nan", "learning_rate: nan should be a number"),
    "too large a number": ("stage: dpo\nmodel_name_or_path: x\nmax_steps: 1e300", "max_steps: 1"),
    "a large seed": (
        "stage: dpo\nmodel_name_or_path: x\nseed: 9223372036854775808",
        "between 0 and 9223372036854775807",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml_is_one_short_line(tmp_path, capsys, name):
    text, says = HOSTILE[name]
    path = tmp_path / "run.yaml"
    path.write_text(text)
    started = time.monotonic()
    assert main(["train", str(path)]) == 2
    message = capsys.readouterr().err
    assert says in message and str(path) in message, message[:500]
    assert len(message.splitlines()) == 1 and len(message) < 700 and time.monotonic() - started < 10


def test_dates_are_texts_and_whole_numbers_stay_whole(tmp_path):
    from discobeta.design.config import RunConfig

    path = tmp_path / "run.yaml"
    for seed in (2**53 + 1, 2**63 - 1):
        for written in (str(seed), f"'{seed}'"):
            path.write_text(f"stage: dpo\nmodel_name_or_path: 2026-11-25\nseed: {written}\n")
            config, _ = RunConfig.read(path)
            assert config.seed == seed and config.model_name_or_path == "2026-11-25"
    path.write_bytes(b"\xef\xbb\xbfstage: dpo\r\nmodel_name_or_path: x\r\n")
    assert RunConfig.read(path, ["max_steps=1e3", "learning_rate=1e-4"])[0].max_steps == 1000


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--set", "seed"], "write key=value"),
        (["--set", "seed=[1"], "--set seed=[1: the value is not valid YAML"),
        (["--set", f"seed={'9' * 5000}"], "--set seed=999"),
        (["--processes", "-3"], "--processes"),
        (["--processes", "0"], "--processes"),
        (["--processes", "x"], "--processes"),
    ],
)
def test_hostile_words_are_refused(settings, tmp_path, capsys, words, says):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings("dpo")))
    try:
        status = main(["train", str(path), *words])
    except SystemExit as end:  # argparse
        status = end.code
    message = capsys.readouterr().err
    assert status == 2 and says in message and "Traceback" not in message and len(message) < 1500, message


@pytest.mark.parametrize(
    "key", ["output_dir", "model_name_or_path", "adapter_name_or_path", "dataset", "tokenized_path"]
)
@pytest.mark.parametrize("path", ["x" * 300, "/" + "y/" * 3000, "/proc/version/x", "/dev/null"])
def test_paths_that_no_file_system_has(settings, tmp_path, capsys, key, path):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings("dpo") | {key: path}))
    assert main(["train", str(config)]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message and "DISCOBETA_TRACEBACK" not in message, message
    assert len(message.splitlines()) == 1, message


def discobeta(command: str, **options) -> subprocess.CompletedProcess:
    """`discobeta` in a shell, which can close streams and set locales."""
    command = command.replace("discobeta", f"{sys.executable} -m discobeta")
    return subprocess.run(command, shell=True, capture_output=True, text=True, errors="replace", **options)


def test_closed_streams_lead_nowhere(settings, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings("dpo")))
    done = discobeta("discobeta train - <&-")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
    assert discobeta("discobeta grid >&-").returncode == 0
    assert discobeta("discobeta grid >&- 2>&- <&-").returncode == 0
    # what libraries print must not end up in a file that happened to get the number of a closed stream
    done = discobeta(f"discobeta train {tmp_path / 'run.yaml'} >&- 2>&- <&-")
    assert done.returncode == 0
    for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines():
        json.loads(line)
    done = discobeta("discobeta grid > /dev/full")
    assert done.returncode == 2 and "no space left" in done.stderr and "Traceback" not in done.stderr
    assert discobeta("discobeta grid | head -n 1").returncode == 0


def test_a_terminal_without_utf8(settings, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "ü", "chosen": "–", "rejected": ""}\n' * 3, encoding="utf-8")
    wanted = settings("dpo", dataset=str(rows), eval_dataset=None)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(wanted, allow_unicode=True), encoding="utf-8")
    ascii = {"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0"}
    done = discobeta(f"discobeta train {tmp_path / 'run.yaml'}", env=os.environ | ascii)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "none of the 3 rows is usable" in done.stderr


def test_what_nobody_foresaw_is_one_line_too(monkeypatch, capsys, tmp_path):
    from discobeta import cli

    def fail(*arguments):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(cli.lookup, "grid", fail)
    assert main(["grid"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("discobeta: RuntimeError: first line second line (test_bad_input.py:")
    assert "DISCOBETA_TRACEBACK=1" in message and len(message.splitlines()) == 1
    monkeypatch.setenv("DISCOBETA_TRACEBACK", "1")
    assert main(["grid"]) == 2 and "Traceback" in capsys.readouterr().err
