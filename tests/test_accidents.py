"""What must not happen by accident: finished training that is lost, and a run that is measured on what it has seen."""

from __future__ import annotations

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
import torch
from conftest import preference_rows, write_rows
from pretended import planned, snakemake, trained

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
def study(first: Path) -> Iterator[Path]:
    """The same for each test: what it changes is put back."""
    shutil.copytree(first / "results", first / "before")
    yield first
    for name in ("results", "started"):
        shutil.rmtree(first / name, ignore_errors=True)
    (first / "before").rename(first / "results")
    shutil.rmtree(first / ".snakemake" / "incomplete", ignore_errors=True)
    (first / "trained").unlink(missing_ok=True)


def plan_of(folder: Path, **settings: str) -> str:
    """What a dry run says, which never fails."""
    done = snakemake(folder, "--dry-run", **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


LOST = "finished runs with other settings than this study's"
OTHERS = {
    "a setting of a stage": ({"rm": "{learning_rate: 0.5}"}, "rm, baseline, seed 1: learning_rate: 0.003 there, 0.5"),
    "a setting of all": ({"common": "{warmup_ratio: 0.5}"}, "warmup_ratio: 0.1 there, 0.5 here"),
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
    """`gamma` is none of the study's; but what the study says itself is one in any code."""
    path = first / "src" / "discobeta" / "design" / "config.py"
    text = path.read_text()
    new = text.replace("adam_beta2: float = option(0.999,", "adam_beta2: float = option(0.99,")
    new = new.replace(
        'lam: float = option(0.95, "', 'newcomer: float = option(0.5, "")\n    lam: float = option(0.95, "'
    )
    loss = first / "src" / "discobeta" / "losses.py"
    try:
        assert new.count("0.99,") > text.count("0.99,") and "newcomer" in new
        path.write_text(new)
        with loss.open("a") as stream:
            stream.write("# other code\n")
        assert LOST not in plan_of(first)
        assert LOST in plan_of(first, common="{adam_beta2: 0.9}")
    finally:
        path.write_text(text)
        loss.write_text(loss.read_text().removesuffix("# other code\n"))


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


ALL_ARE_WRITTEN = {"tables": 1, "figures": 1}
GONE = {
    "runs/rm/baseline/seed-1": {"train_rm": 1, "evaluate": 1} | ALL_ARE_WRITTEN,
    "runs/dpo": {"train_dpo": 2, "evaluate": 2} | ALL_ARE_WRITTEN,
    "runs/rm/baseline/seed-1/metrics.json": {"evaluate": 1} | ALL_ARE_WRITTEN,
    "tables": {"tables": 1},
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
    (study / "trained").unlink(missing_ok=True)
    process = start(study, warm=how == "its warm process")
    try:
        deadline = time.monotonic() + 60
        while not (study / "started").exists() or len(list((study / "started").iterdir())) < 2:
            assert process.poll() is None and time.monotonic() < deadline, (study / "log").read_text()
            time.sleep(0.02)
        (os.killpg if "all" in how else os.kill)(process.pid, signal.SIGTERM)
        time.sleep(0.3)
    finally:
        (study / "wait").unlink()
    assert process.wait(60) == 1
    reward_models = [f"results/smoke/runs/rm/{arm}/seed-1" for arm in ("baseline", "disco-used_beta-absent")]
    assert trained(study) == ([] if "all" in how else reward_models)  # those that run may come to their end
    assert not list((study / "results").rglob("*.partial*"))
    counts = planned(study)  # nothing is locked, and what is finished is not done again
    assert counts == ALL_ARE_WRITTEN | {"evaluate": 2} | ({"train_rm": 2} if "all" in how else {})
    assert snakemake(study).returncode == 0 and trained(study) == reward_models and planned(study) == {}
