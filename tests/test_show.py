"""`discobeta show`: what a run would be, where it stands, what came out, and how it goes on."""

import json
import shlex
from pathlib import Path

import pytest
import yaml

from discobeta import cli, lock
from discobeta.report import states


@pytest.fixture
def shown(capsys: pytest.CaptureFixture):
    """shown(words…): what `discobeta show … --json` says."""

    def ask(*words: str | Path) -> dict:
        capsys.readouterr()
        assert cli.main(["show", *map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return ask


def written(path: Path, settings: dict) -> Path:
    path.write_text(yaml.safe_dump(settings))
    return path


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


def test_a_yaml_says_what_would_be_computed_and_the_training_does_that(settings, run, shown, tmp_path):
    """40 pairs in steps of 8 are 5 steps, of which 30 % are 1.5, rounded up."""
    changes = {"max_steps": -1, "num_train_epochs": 1, "warmup_ratio": 0.3, "logging_steps": 1}
    path = written(tmp_path / "run.yaml", settings("rm", add_disco_head=True, lam=0.5, template="x", **changes))
    before = snapshot(tmp_path)
    sheet = shown(path)
    assert snapshot(tmp_path) == before
    assert sheet["state"] == {"kind": "waiting", "step": None, "steps": 5, "pace": None, "detail": "not begun"}
    assert (sheet["stage"], sheet["arm"], sheet["seed"]) == ("rm", "disco-idle_beta-absent", 7)
    assert sheet["ideas"] == {"Disco": "idle: the head is there, and nothing reads it", "LeDPO": "absent"}
    assert sheet["plan"]["rows"].startswith("40 (rows of ") and sheet["plan"]["steps"] == "5"
    assert sheet["plan"]["learning rate"] == "0.001, linear after 2 steps of warm-up"
    assert sheet["plan"]["trained"] == "LoRA of rank 4 on all, alpha 8, float32"
    assert sheet["changed"]["lora_rank"] == {"value": 4, "default": 8} and sheet["defaults"]["tokens_per_pass"] == 1024
    assert not {"lam", "pref_beta", "add_disco_head", "stage"} & (sheet["changed"].keys() | sheet["defaults"].keys())
    assert "lam is unused: rm does not read it (ppo does)" in sheet["notes"]
    assert any(note.startswith("template is ignored: ") for note in sheet["notes"])
    assert any(
        note.startswith("an idle head changes nothing: every file equals that of baseline") for note in sheet["notes"]
    )
    assert {one["key"]: one["there"] for one in sheet["inputs"]} == {
        "model_name_or_path": True, "dataset": True, "eval_dataset": True,
    }  # fmt: skip
    assert sheet["commands"] == {"train": f"discobeta train {path}"}
    directory = run("rm", add_disco_head=True, **changes)
    rates = [json.loads(line)["learning_rate"] for line in (directory / "log.jsonl").read_text().splitlines()]
    assert len(rates) == 5 and rates[:3] == pytest.approx([0, 5e-4, 1e-3])


def test_a_finished_run_says_its_results_and_the_commands_do_what_they_say(settings, run, shown, tmp_path, capsys):
    directory = run("rm")
    path = written(tmp_path / "run.yaml", settings("rm"))
    assert cli.main(["evaluate", str(directory)]) == 0
    measured = json.loads((directory / "metrics.json").read_text())
    before = snapshot(directory)
    for where in (path, directory):
        sheet = shown(where)
        assert sheet["state"]["kind"] == "done" and sheet["state"]["steps"] == 4
        assert list(sheet["results"])[:2] == ["nll", "accuracy"] and sheet["results"]["nll"] == measured["nll"]
        assert sheet["cost"]["rows"] == 32 and sheet["notes"] == []
        assert set(sheet["commands"]) == {"evaluate", "train again"}
    assert snapshot(directory) == before
    assert cli.main(["show", str(directory)]) == 0
    text = capsys.readouterr().out
    assert "  state          finished: sealed, and as it was written\n" in text and "  nll  " in text
    provenance = (directory / "provenance.json").stat().st_mtime_ns
    for what in ("evaluate", "train again"):
        assert cli.main(shlex.split(sheet["commands"][what])[1:]) == 0
    assert (directory / "provenance.json").stat().st_mtime_ns > provenance


def test_an_interrupted_run_says_where_and_its_command_goes_on_from_there(
    settings, run, shown, tmp_path, monkeypatch, capsys
):
    import torch

    step, count = torch.optim.AdamW.step, iter(range(100))

    def dying(self, *arguments, **options):
        if next(count) == 3:
            raise KeyboardInterrupt
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", dying)
    with pytest.raises(KeyboardInterrupt):
        run("dpo", save_steps=2, logging_steps=1)
    monkeypatch.undo()
    directory = tmp_path / "run"
    path = written(tmp_path / "run.yaml", settings("dpo", save_steps=2, logging_steps=1))
    for where in (path, directory):
        sheet = shown(where)
        state = sheet["state"]
        assert state.pop("pace") > 0
        assert state == {"kind": "interrupted", "step": 2, "steps": 4, "detail": "goes on from step 2"}
        assert sheet["results"] == {} and set(sheet["commands"]) == {"resume"}
    other = written(tmp_path / "other.yaml", settings("dpo", save_steps=2, logging_steps=1, learning_rate=1e-4))
    assert shown(other)["state"]["detail"] == (
        f"{directory} holds another run, interrupted (learning_rate: 0.001 there, 0.0001 here)"
    )
    assert cli.main([*shlex.split(sheet["commands"]["resume"])[1:], "--no-evaluate"]) == 0
    assert f"resuming from {directory / 'checkpoints' / 'step-2.pt'}" in capsys.readouterr().out
    assert shown(directory)["state"]["kind"] == "done"


def test_a_run_that_is_being_written_is_running(run, shown):
    directory = run("rm")
    (directory / "provenance.json").unlink()
    (directory / lock.NAME).write_text(json.dumps(lock.this_holder()))
    state = shown(directory)["state"]
    assert (state["kind"], state["step"], state["steps"]) == ("running", 4, 4)


def test_a_run_that_is_not_what_was_written_says_why(settings, run, shown, base, tmp_path):
    directory = run("rm")
    stale = written(tmp_path / "stale.yaml", settings("rm", max_steps=3))
    state = shown(stale)["state"]
    assert (state["kind"], state["detail"]) == ("failed", "stale: max_steps: 4 there, 3 here")
    weights = directory / "adapter" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"x")
    assert shown(directory)["state"]["detail"].startswith(f"damaged: {weights} was changed after the run was finished")
    weights.write_bytes(content)
    assert shown(directory)["state"]["kind"] == "done"
    provenance = directory / "provenance.json"
    provenance.write_text(provenance.read_text().replace('"seed": 7', '"seed": 8'))
    assert "damaged" in shown(directory)["state"]["detail"]


def test_what_is_not_there_is_named(settings, run, shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    judge = run("rm", name="judge")
    changes = {
        "dataset": "nowhere.jsonl",
        "eval_dataset": "",
        "beta_head": str(judge),
        "reward_model": f"{judge},gone/x",
    }
    path = written(tmp_path / "run.yaml", settings("ppo", ppo_score_norm=True, model_name_or_path="./none", **changes))
    sheet = shown(path, "--set", "beta_head=null", "eval_dataset=null", "val_size=2")
    found = {(one["key"], one["name"]): (one["there"], one["detail"]) for one in sheet["inputs"]}
    assert found["model_name_or_path", "./none"] == (False, "there is no directory ./none")
    assert found["dataset", "nowhere.jsonl"][0] is False and "no such file" in found["dataset", "nowhere.jsonl"][1]
    assert found["reward_model", str(judge)] == (True, "a finished rm run, baseline, seed 7")
    assert found["reward_model", "gone/x"][0] is False
    assert sheet["commands"]["train"] == f"discobeta train {path} --set beta_head=null eval_dataset=null val_size=2"


def test_a_run_that_was_moved_is_shown_where_it_is(run, shown, tmp_path):
    directory = run("rm").rename(tmp_path / "moved")
    sheet = shown(directory)
    assert sheet["state"]["kind"] == "done" and sheet["directory"] == str(directory)
    assert any("output_dir" in note for note in sheet["notes"])
    assert shlex.split(sheet["commands"]["train again"])[3:] == [
        "--set", f"output_dir={directory}", "overwrite_output_dir=true",
    ]  # fmt: skip


def test_a_run_of_a_study_says_whose_it_is(run, shown, tmp_path):
    place = tmp_path / "a study/runs/rm/baseline/seed-1"
    place.parent.mkdir(parents=True)
    directory = run("rm").rename(place)
    assert not [note for note in shown(str(directory))["notes"] if "a run of the study" in note]  # any folder `runs`
    (tmp_path / "a study/shared").mkdir()
    (note,) = [note for note in shown(str(directory))["notes"] if "a run of the study" in note]
    assert f"in {tmp_path / 'a study'}," in note
    assert f"snakemake '{directory}/provenance.json' --cores all" in note


def test_passes_and_updates_of_ppo_are_counted(settings, shown, tmp_path):
    """2 x 3 responses an optimiser step, a buffer of 4 steps, gone through twice: 24 responses, 8 steps."""
    batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "ppo_buffer_size": 4, "ppo_epochs": 2}
    path = written(
        tmp_path / "run.yaml", settings("ppo", reward_model="rm", max_steps=-1, num_train_epochs=1.5, **batch)
    )
    plan = shown(path)["plan"]
    assert plan["a update"] == "24 responses, then 8 optimiser steps of 6"
    assert plan["updates"] == "3"  # 60 of 24 at a time, the last one full: 2.5


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["empty"], "empty is no run directory: it has no config.yaml"),
        (["study"], "study is no run directory: it has no config.yaml; it is a study's folder, and study/"),
        (["nowhere.yaml"], "cannot read nowhere.yaml: No such file or directory"),
        (["study.yaml"], "study.yaml is a study and no run: "),
        (["study/runs/rm/x", "--set", "seed=1"], "--set seed=1: a run directory is shown as it is"),
    ],
)  # fmt: skip
def test_what_is_no_run_is_refused_in_a_line(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("study/runs/rm/x").mkdir(parents=True)
    Path("study/runs/rm/x/config.yaml").write_text("stage: rm\nmodel_name_or_path: m\n")
    Path("study.yaml").write_text("study: s\n")
    assert cli.main(["show", *words]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"discobeta: {says}") and message.count("\n") == 1


def test_a_base_and_a_broken_log_are_shown(shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(Path("base.yaml"), {"stage": "sft", "model_type": "qwen3", "finetuning_type": "full", "output_dir": "b"})
    sheet = shown("base.yaml")
    assert (
        sheet["title"] == "The base"
        and sheet["ideas"] == {}
        and sheet["commands"] == {"train": "discobeta train base.yaml"}
    )
    Path("b").mkdir()
    Path("b/log.jsonl").write_text('{"step": 2, "epoch": 0.5}\n{"step": 3, "ep')
    assert states.last_step(Path("b")) == 2
