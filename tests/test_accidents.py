"""What must not happen by accident: finished training that is lost, and a run that is measured on what it has seen."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pretended
import pytest
import report_study
import torch
from conftest import preference_rows, write_rows
from pretended import planned, snakemake, trained

from discobeta.cli import main
from discobeta.data.sources import check_apart
from discobeta.data.tokens import load_or_tokenise
from discobeta.design.config import RunConfig
from discobeta.errors import UserError
from discobeta.model.pretrained import load_tokenizer
from discobeta.report.cells import stage_table
from discobeta.report.results import overlap_note

# --- a run whose job was killed between its seal and the workflow's note that it is done


class Trained(BaseException):
    """An optimiser step was made."""


@pytest.fixture
def no_step(monkeypatch):
    def step(self, *arguments, **options):
        raise Trained

    return lambda: monkeypatch.setattr(torch.optim.AdamW, "step", step)


SFT = {"finetuning_type": "full"}


def kept(run, stage: str, **changes) -> Path:
    """A run that has finished, and whose job has failed for the workflow, which removes what the job has made."""
    path = run(stage, **(SFT if stage == "sft" else {}), **changes)
    (path / "provenance.json").rename(path.parent / "provenance.json")
    return path


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])
def test_a_finished_run_is_not_trained_again_for_its_record_alone(run, no_step, capsys, stage):
    path = kept(run, stage)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    no_step()
    kept_again = run(stage, **(SFT if stage == "sft" else {}), overwrite_output_dir=True)  # as a study says
    assert (path / "provenance.json").read_bytes() == (path.parent / "provenance.json").read_bytes()
    assert {file: content for file, content in before.items() if file.read_bytes() != content} == {}
    assert kept_again == path and "only its record was gone" in capsys.readouterr().err
    with pytest.raises(Trained):  # and with the record there, that is what is asked for
        run(stage, **(SFT if stage == "sft" else {}), overwrite_output_dir=True)


def other_rows(path: Path, settings, tmp_path) -> dict:
    return {"dataset": str(write_rows(tmp_path / "other.jsonl", preference_rows(40, 9)))}


def damaged_weights(path: Path, settings, tmp_path) -> dict:
    with (path / "adapter" / "adapter_model.safetensors").open("ab") as stream:
        stream.write(b"x")
    return {}


def another_log(path: Path, settings, tmp_path) -> dict:
    return {"logging_steps": 1}


def another_record(path: Path, settings, tmp_path) -> dict:
    text = (path / ".finished.json").read_text()
    (path / ".finished.json").write_text(text.replace('"seed": 7', '"seed": 8'))
    return {}


def another_rate(path: Path, settings, tmp_path) -> dict:
    return {"learning_rate": 2e-3}


@pytest.mark.parametrize("change", [other_rows, damaged_weights, another_log, another_record, another_rate])
def test_a_run_of_anything_else_is_trained(run, no_step, settings, tmp_path, change):
    changes = change(kept(run, "rm"), settings, tmp_path)
    no_step()
    with pytest.raises(Trained):
        run("rm", **changes, overwrite_output_dir=True)


def test_the_same_files_under_other_code_are_trained(run, no_step, monkeypatch):
    kept(run, "rm")
    monkeypatch.setattr("discobeta.record.code_hash", lambda stage: "other")
    no_step()
    with pytest.raises(Trained):
        run("rm", overwrite_output_dir=True)


# --- rows in two roles


@pytest.fixture
def config(tmp_path, monkeypatch):
    """config(**data): of a run that may name a.jsonl, its copy, entries of both, b.jsonl, a link to it, and the hub."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a.jsonl", 1), ("b.jsonl", 2)):
        write_rows(tmp_path / name, preference_rows(8, seed))
    shutil.copy("a.jsonl", "copy.jsonl")
    (tmp_path / "link.jsonl").symlink_to("b.jsonl")
    listed = {"mine": {"file_name": "a.jsonl"}, "other": {"file_name": "copy.jsonl", "num_samples": 3}}
    listed |= {
        "hh": {"hf_hub_url": "Anthropic/hh-rlhf"},
        "tested": {"hf_hub_url": "Anthropic/hh-rlhf", "split": "test"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(listed))

    def make(**data) -> RunConfig:
        return RunConfig.from_mapping({"stage": "rm", "model_name_or_path": "m", "dataset_dir": "."} | data)[0]

    return make


SAME = [
    {"dataset": "a.jsonl", "eval_dataset": "a.jsonl"},
    {"dataset": "b.jsonl,a.jsonl", "eval_dataset": "copy.jsonl"},
    {"dataset": "mine", "eval_dataset": "./a.jsonl"},
    {"dataset": "mine", "eval_dataset": "other", "max_samples": 2},
    {"dataset": "b.jsonl", "eval_dataset": "link.jsonl", "stage": "dpo"},
    {"dataset": "a.jsonl", "eval_dataset": "a.jsonl", "stage": "ppo"},
    {"dataset": "tested", "eval_dataset": "hh"},
    {"dataset": "Anthropic/hh-rlhf", "eval_dataset": "hh", "eval_split": "train"},
    {"dataset": "a.jsonl", "eval_dataset": "b.jsonl", "calibration_dataset": "link.jsonl"},
    {"dataset": "a.jsonl", "val_size": 2, "calibration_dataset": "mine"},
    {"dataset": "a.jsonl", "eval_dataset": "hh", "calibration_dataset": "tested"},
]
APART = [
    {"dataset": "a.jsonl", "eval_dataset": "b.jsonl"},
    {"dataset": "hh", "eval_dataset": "hh"},  # the README's: its splits are train and test
    {"dataset": "Anthropic/hh-rlhf", "eval_dataset": "tested"},
    {"dataset": "a.jsonl", "val_size": 0.5},
    {"dataset": "a.jsonl,a.jsonl", "eval_dataset": "b.jsonl"},  # trained on twice
    {"dataset": "hh", "eval_dataset": "hh", "split": "train[:90%]", "eval_split": "train[90%:]"},
]


@pytest.mark.parametrize("data", SAME, ids=str)
def test_the_same_rows_in_two_roles_are_refused(config, data):
    with pytest.raises(UserError, match="are the same rows .*: give (eval|calibration)_dataset another"):
        check_apart(config(**data))


@pytest.mark.parametrize("data", APART, ids=str)
def test_rows_of_two_sources_and_splits_are_not(config, data):
    check_apart(config(**data))


@pytest.mark.parametrize("written", [False, True], ids=["tokenised", "read"])
def test_neither_tokenised_nor_read_is_what_has_two_roles(config, written, monkeypatch, base):
    """Also where the tokens were written by a version that did not look."""
    data = config(dataset="a.jsonl", eval_dataset="copy.jsonl", tokenized_path="tokens", model_name_or_path=str(base))
    tokenizer = load_tokenizer(data)
    if written:
        with monkeypatch.context() as before:
            before.setattr("discobeta.data.tokens.check_apart", lambda config: None)
            load_or_tokenise(data, tokenizer)
    with pytest.raises(UserError, match="eval_dataset and dataset are the same rows"):
        load_or_tokenise(data, tokenizer)
    assert Path("tokens").exists() is written


COUNTED = [
    ({"shared_prompts": 0}, {"shared_prompts": 0}, "No held-out prompt is a prompt of the training rows."),
    (
        {"shared_prompts": 3, "shared_calibration": 2}, {"shared_prompts": 3, "shared_calibration": 0},
        "3 held-out prompts also are prompts of the training rows, so what is measured was partly seen; "
        "0 to 2 calibration rows also are training or held-out rows.",
    ),
    ({"shared_prompts": 0}, {"shared_prompts": 12}, "0 to 12 held-out prompts also are prompts of the training rows"),
    ({}, "nonsense", None),
]  # fmt: skip


@pytest.mark.parametrize("one, two, said", COUNTED, ids=lambda case: "")
def test_overlaps_are_said_in_the_table(tmp_path, monkeypatch, one, two, said):
    monkeypatch.chdir(tmp_path)
    made = report_study.study(stages=["rm"], arms=["baseline"])
    for run, rows in zip(made.runs(), (one, two), strict=True):
        report_study.finish(made, run, {"nll": 0.5}, rows=rows)
    results = report_study.results(made)
    notes = stage_table(results, "rm").notes
    assert [note for note in notes if "of the training rows" in note] == ([overlap_note(results, "rm")] if said else [])
    assert said is None or overlap_note(results, "rm").startswith(said)


# --- a plan looks for what is needed


def plan(tmp_path, monkeypatch, capsys, **changes) -> tuple[int, str, str]:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        if not Path(f"{name}.jsonl").exists():
            Path(f"{name}.jsonl").write_text(f'{{"prompt": "{name}"}}')
    for name in ("model", "bare"):
        Path(name).mkdir(exist_ok=True)
    Path("model/config.json").write_text("{}")
    settings = {"study": "s", "seeds": [1], "data": {"dataset": "a.jsonl", "eval_dataset": "b.jsonl"}}
    settings |= {"stages": ["rm"], "base": {"model_name_or_path": "./model"}} | changes
    Path("study.yaml").write_text(json.dumps(settings))
    status = main(["plan", "--configfile", "study.yaml"])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_a_plan_says_that_what_is_local_is_there(tmp_path, monkeypatch, capsys):
    status, out, err = plan(tmp_path, monkeypatch, capsys)
    assert status == 0 and err == ""
    lines = out.splitlines()
    for line in ("model_name_or_path: ./model, a local folder", "dataset: a.jsonl", "eval_dataset: b.jsonl"):
        assert f"here     {line}" in lines
    assert lines[-1].startswith("tables: results/s/tables")
    assert not [line for line in lines if line.startswith(("missing", "fetch", "note"))]


MISSING = [
    ({"data": {"dataset": "a.jsonl", "eval_dataset": "c.jsonl"}}, "eval_dataset: no such file: c.jsonl"),
    ({"data": {"dataset": "a.jsonl", "eval_dataset": "a.jsonl"}}, "eval_dataset and dataset are the same rows"),
    ({"base": {"model_name_or_path": "./nowhere"}}, "model_name_or_path: there is no directory ./nowhere"),
    ({"base": {"model_name_or_path": "./bare"}}, "model_name_or_path: ./bare is a folder without config.json"),
    (
        {"base": {"model_name_or_path": "./model", "adapter_name_or_path": "./gone"}},
        "adapter_name_or_path: there is no directory ./gone",
    ),
    (
        {"data": {"world": {}}, "base": {"sft": {"model_type": "qwen3", "dataset": "gone.jsonl"}}},
        "dataset: no such file: gone.jsonl",
    ),
    (
        {"stages": ["rm", "dpo"], "common": {"ground_truth": "gone/world.json"}},
        "ground_truth: gone/world.json",
    ),
]  # fmt: skip


@pytest.mark.parametrize("changes, said", MISSING, ids=[said for _, said in MISSING])
def test_a_plan_misses_what_is_local_and_not_there(tmp_path, monkeypatch, capsys, changes, said):
    status, out, err = plan(tmp_path, monkeypatch, capsys, **changes)
    assert status == 2 and f"missing  {said}" in out
    assert err.startswith(f"discobeta: the study needs what is not here: {said}") and len(err.splitlines()) == 1


def test_a_plan_names_what_comes_from_the_hub_and_the_gpu_that_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("discobeta.inputs.ready.GPUS", tmp_path / "gpus")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    changes = {"data": {"dataset": "owner/rows", "val_size": 4}, "base": {"model_name_or_path": "owner/model"}}
    changes |= {"common": {"bf16": True}, "gpus_per_run": 2}
    status, out, _ = plan(tmp_path, monkeypatch, capsys, **changes)
    assert status == 0
    assert "fetch    model_name_or_path: owner/model, of the hub: discobeta fetch" in out
    assert "fetch    dataset: owner/rows, split train, of the hub: discobeta fetch" in out
    assert "note     device: 2 GPUs for each run, gpus_per_run; this machine has none" in out
    (tmp_path / "hub" / "models--owner--model" / "snapshots").mkdir(parents=True)
    for number in range(2):
        (tmp_path / "gpus" / str(number)).mkdir(parents=True)
    _, out, _ = plan(tmp_path, monkeypatch, capsys, **changes)
    assert "here     model_name_or_path: owner/model, of the hub, in its cache" in out
    assert "here     device: 2 GPUs for each run, gpus_per_run; this machine has 2" in out


def test_a_plan_misses_packages_by_name_and_version(tmp_path, monkeypatch, capsys):
    wanted = ["pyyaml>=900", "no-such-package-at-all>=1", "pytest>=1", 'absent-extra; extra == "dev"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: wanted)
    status, out, err = plan(tmp_path, monkeypatch, capsys)
    assert status == 2 and "pyyaml " in err and ">=900 is required; no-such-package-at-all is not installed" in err
    assert "absent-extra" not in out + err and "pytest" not in out + err


# --- a study


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study, pretended: four runs."""
    pytest.importorskip("snakemake")
    folder = pretended.make(tmp_path_factory.mktemp("study"))
    done = snakemake(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert planned(folder) == {} and len(trained(folder)) == 5
    return folder


@pytest.fixture
def study(first: Path, tmp_path: Path) -> Iterator[Path]:
    """The same for each test: what it changes, also of what Snakemake has written down, is put back."""
    names = ("results", ".snakemake", "started")
    for name in names:
        shutil.copytree(first / name, tmp_path / name)
    (first / "trained").unlink(missing_ok=True)
    yield first
    for name in names:
        shutil.rmtree(first / name, ignore_errors=True)
        shutil.copytree(tmp_path / name, first / name)


def plan_of(folder: Path, **settings: str) -> str:
    """What a dry run says, which never fails."""
    done = snakemake(folder, "--dry-run", **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


LOST = "finished runs with other settings than this study's"
OTHERS = {
    "a setting of a stage": ({"rm": "{learning_rate: 0.5}"}, "rm, baseline, seed 1: learning_rate: 0.003 there, 0.5"),
    "a setting of all": ({"common": "{warmup_ratio: 0.5}"}, "warmup_ratio: 0.0 there, 0.5 here"),
    "the world": ({"data": "{world: {train: 700}}"}, "data: world: train: 640 there, 700 here"),
    "the base": ({"base": "{sft: {learning_rate: 0.5}}"}, "base: sft: learning_rate: "),
}


@pytest.mark.parametrize("changes, said", OTHERS.values(), ids=OTHERS.keys())
def test_other_settings_under_the_same_name_are_refused_before_anything_is_lost(first, changes, said):
    done = snakemake(first, **changes)
    text = done.stdout + done.stderr
    assert done.returncode == 1 and f"{LOST}, which would be trained again" in text and said in text
    assert "--config study=NAME" in text and "--config retrain=true" in text
    assert planned(first) == {}  # all is as it was
    assert LOST in plan_of(first, **changes)  # a plan says it, and is a plan


def test_what_is_meant_is_done(study):
    shutil.rmtree(study / "started")
    done = snakemake(study, rm="{learning_rate: 0.5}", retrain="true")
    assert done.returncode == 0 and LOST not in done.stdout + done.stderr, done.stdout + done.stderr
    again = ["results/smoke/runs/rm/baseline/seed-1", "results/smoke/runs/rm/disco-used_beta-absent/seed-1"]
    assert sorted(path.name.replace(":", "/") for path in (study / "started").iterdir()) == again


NO_ACCIDENT = {
    "another name": {"study": "another", "rm": "{learning_rate: 0.5}"},
    "a seed more": {"seeds": "[1,2]"},
    "an arm more": {"arms": "all"},
    "a stage more": {"stages": "[rm,dpo,ppo]"},
    "other measurements": {"dpo": "{temperature: 0.7}"},
    "another log": {"common": "{logging_steps: 3}"},
}


@pytest.mark.parametrize("changes", NO_ACCIDENT.values(), ids=NO_ACCIDENT.keys())
def test_what_trains_no_finished_run_again_is_no_accident(first, changes):
    assert LOST not in plan_of(first, **changes)


def test_changed_code_and_its_defaults_are_no_accident(first):
    """Neither a new default nor a new key; but what the study says itself is one in any code."""
    path = first / "src" / "discobeta" / "design" / "config.py"
    text, known = path.read_text(), 'lam: float = option(0.95, "'
    new = text.replace("adam_beta2: float = option(0.999,", "adam_beta2: float = option(0.99,")
    assert new != text and known in text
    try:
        path.write_text(new.replace(known, f'newcomer: float = option(0.5, "")\n    {known}'))
        assert LOST not in plan_of(first)
        assert LOST in plan_of(first, common="{adam_beta2: 0.9}")
    finally:
        path.write_text(text)


def test_a_run_that_was_never_finished_is_no_accident(study):
    for path in (study / "results" / "smoke" / "runs" / "rm").rglob("provenance.json"):
        path.unlink()
    assert LOST not in plan_of(study, rm="{learning_rate: 0.5}")


def test_the_word_for_it_is_none_of_a_config(first):
    (first / "forgetful.yaml").write_text("retrain: true\n")
    words = ["--configfile", "config/smoke.yaml", "forgetful.yaml", "--dry-run"]
    command = [sys.executable, "-m", "snakemake", "--snakefile", "workflow/Snakefile", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=first, env=pretended.environment())
    assert done.returncode == 1 and "unknown key 'retrain'" in done.stdout + done.stderr


ALL_ARE_WRITTEN = {"tables": 1, "figures": 1, "page": 1}
GONE = {
    "runs/rm/baseline/seed-1": {"train_rm": 1, "evaluate": 1} | ALL_ARE_WRITTEN,
    "runs/dpo": {"train_dpo": 2, "evaluate": 2} | ALL_ARE_WRITTEN,
    "runs/rm/baseline/seed-1/metrics.json": {"evaluate": 1} | ALL_ARE_WRITTEN,
    "tables": {"tables": 1, "page": 1},
    # what finished runs were made from is made again for a run that needs it, and not for its own sake
    "shared/data/seed-1/tokens": {},
    "shared": {},
}


@pytest.mark.parametrize("gone, expected", GONE.items(), ids=GONE.keys())
def test_what_is_gone_is_made_again_by_the_same_command(study, gone, expected):
    path = study / "results" / "smoke" / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert planned(study) == expected


# --- a workflow that is told to end


def start(folder: Path, *, warm: bool) -> subprocess.Popen:
    command, environment = pretended.command(), pretended.environment()
    if warm:
        command = [sys.executable, "-m", "discobeta.warm", *command]
        environment |= {"PYTHONPATH": str(folder / "src")}
    (folder / "wait").touch()
    log = (folder / "log").open("w")
    return subprocess.Popen(
        command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )


@pytest.mark.parametrize("how", ["the workflow", "its warm process", "the workflow and all that it has started"])
def test_a_workflow_that_is_told_to_end_loses_no_finished_run(study, how):
    """Of four runs the policies are done, and both reward models are being trained when SIGTERM comes."""
    for part in ("runs/rm", "tables", "figures"):
        shutil.rmtree(study / "results" / "smoke" / part)
    shutil.rmtree(study / "started")
    process = start(study, warm=how == "its warm process")
    try:
        deadline = time.monotonic() + 180
        while not (study / "started").exists() or len(list((study / "started").iterdir())) < 2:
            assert process.poll() is None and time.monotonic() < deadline, (study / "log").read_text()
            time.sleep(0.02)
        (os.killpg if "all" in how else os.kill)(process.pid, signal.SIGTERM)
        time.sleep(0.3)
    finally:
        (study / "wait").unlink()
    assert process.wait(300) == 1  # the warm process may still be importing
    reward_models = [f"results/smoke/runs/rm/{arm}/seed-1" for arm in ("baseline", "disco-used_beta-absent")]
    assert trained(study) == ([] if "all" in how else reward_models)  # those that run may come to their end
    assert not list((study / "results").rglob("*.partial*"))
    counts = planned(study)  # nothing is locked, and what is finished is not done again
    assert counts == ALL_ARE_WRITTEN | {"evaluate": 2} | ({"train_rm": 2} if "all" in how else {})
    assert snakemake(study).returncode == 0 and trained(study) == reward_models and planned(study) == {}
