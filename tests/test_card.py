"""The model card in a run's directory: what it says, whose it is, and that it decides nothing."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import preference_rows, write_rows

from discobeta import folders, record
from discobeta.cli import main
from discobeta.run import card

BOTH = {"add_disco_head": True, "disco_pref": True, "add_beta_head": True, "use_dynamic_beta": True}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def command(settings, tmp_path, capsys):
    """command(stage, *words, **changes): `discobeta train`; the directory and what was said."""

    def go(stage: str, *words: str, **changes):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(settings(stage, **{"max_steps": 2} | changes)))
        assert main(["train", str(path), *words]) == 0
        return tmp_path / changes.get("name", "run"), capsys.readouterr().err

    return go


def parts(text: str) -> tuple[dict, str]:
    """The header, as the hub reads it, and the rest."""
    start, header, body = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(header), body


def test_a_card_stands_in_a_run_when_training_ends_and_is_renewed_by_the_evaluation(command):
    run, _ = command("dpo", "--no-evaluate", **BOTH)
    header, body = parts((run / "README.md").read_text())
    assert header["library_name"] == "peft" and header["pipeline_tag"] == "text-generation"
    assert {"discobeta", "dpo", "disco-used_beta-used", "lora"} <= set(header["tags"])
    assert "base_model" not in header and "datasets" not in header  # which the hub would look for there
    for said in (
        "Disco + LeDPO, seed 7",
        "used: the loss reads the Disco Head",
        "`use_dynamic_beta: true`",
        "40 rows",
        "12 rows",
        "learning_rate: 0.001",
        "pref_beta: 0.5",
        "discobeta.load_policy(",
        "PeftModel",
        "@software",
        "not evaluated",
    ):
        assert said in body, said
    assert main(["evaluate", str(run)]) == 0
    measured = json.loads((run / "metrics.json").read_text())
    after = (run / "README.md").read_text()
    assert f"| `nll` | {measured['nll']:.4g} |" in after and f"| `accuracy` | {measured['accuracy']:.4g} |" in after
    assert "not evaluated" not in after


def test_a_card_of_a_reward_model_says_how_its_variance_is_read(command):
    run, _ = command("rm", add_disco_head=True, disco_pref=True)
    text = (run / "README.md").read_text()
    assert "text-classification" in text and "disco.state_mean" in text and "reward_model.score(" in text
    idle, _ = command("rm", name="idle", add_disco_head=True)
    text = (idle / "README.md").read_text()
    assert "disco.state_mean" not in text and "there and not read (a control)" in text


def test_a_base_and_data_of_the_hub_are_named_to_it(run):
    from dataclasses import replace

    found = record.read(run("dpo"))
    of_hub = {
        "model_name_or_path": "Qwen/Qwen3-0.6B",
        "dataset": "Anthropic/hh-rlhf",
        "eval_dataset": "Anthropic/hh-rlhf",
    }
    description = found.directory / "adapter/adapter_config.json"
    named = json.loads(description.read_text()) | {"base_model_name_or_path": "Qwen/Qwen3-0.6B"}
    description.write_text(json.dumps(named))
    header, _ = parts(card.text(replace(found, config=found.config.replace(**of_hub))))
    assert header["base_model"] == "Qwen/Qwen3-0.6B" and header["base_model_relation"] == "adapter"
    assert header["datasets"] == ["Anthropic/hh-rlhf"]


def test_equal_runs_have_equal_cards_without_a_path_of_this_machine(command, base):
    first, _ = command("dpo", name="first", **BOTH)
    second, _ = command("dpo", name="second", **BOTH)
    assert (first / "README.md").read_bytes() == (second / "README.md").read_bytes()
    assert str(first) not in (first / "README.md").read_text()


def test_an_edited_card_is_its_authors_and_damages_nothing(command, capsys):
    run, _ = command("dpo")
    before = contents(run)
    edited = (run / "README.md").read_text().replace("## Limits", "## My limits")
    (run / "README.md").write_text(edited)
    assert main(["evaluate", str(run)]) == 0
    assert "README.md is not as discobeta wrote it, and is left as it is" in capsys.readouterr().err
    assert (run / "README.md").read_text() == edited
    assert record.measurement_fault(run) is None and record.fault(run, record.read(run).config, weights=True) is None
    _, said = command("dpo")  # finished: it is not trained again
    assert "holds this run, finished" in said and (run / "README.md").read_text() == edited
    (run / "README.md").unlink()
    assert main(["evaluate", str(run)]) == 0
    assert contents(run)["README.md"] == before["README.md"]


def test_a_card_makes_no_run_another_one_and_none_that_lacks_one_damaged(command):
    run, _ = command("dpo")
    sealed = json.loads((run / "provenance.json").read_text())["files"]
    assert "README.md" not in sealed and "README.md" not in json.loads((run / folders.MARK).read_text())["parts"]
    (run / "README.md").unlink()
    assert record.fault(run, record.read(run).config, weights=True) is None
    weights = (run / "adapter/adapter_model.safetensors").stat().st_mtime_ns
    command("dpo")  # a run of before gets one, and nothing else
    assert (run / "README.md").is_file()
    assert (run / "adapter/adapter_model.safetensors").stat().st_mtime_ns == weights


def test_a_run_that_replaces_another_takes_its_card_away_and_leaves_somebodys(command, tmp_path):
    run, _ = command("dpo")
    seven = (run / "README.md").read_text()
    assert "seed 7" in seven
    command("dpo", "--no-evaluate", seed=8, overwrite_output_dir=True)
    assert "seed 8" in (run / "README.md").read_text()
    (run / "README.md").write_text("mine")
    _, said = command("dpo", "--no-evaluate", seed=9, overwrite_output_dir=True)
    assert (run / "README.md").read_text() == "mine" and "left as it is" in said


def test_a_card_that_a_kill_has_kept_out_is_written_by_the_same_command(command, monkeypatch):
    run, _ = command("dpo")
    measured = (run / "README.md").read_text()
    folders.write_card(run, "of before its evaluation")
    command("dpo")
    assert (run / "README.md").read_text() == measured


@pytest.mark.parametrize("change", ["a byte", "the end cut", "something behind", "a link", "no text"])
def test_a_card_is_ours_only_as_it_was_written(tmp_path, change):
    path = tmp_path / "README.md"
    assert folders.write_card(tmp_path, "# a\n\nb\n") and folders.is_our_card(path)
    content = path.read_bytes()
    if change == "a link":
        shutil.move(path, tmp_path / "other")
        path.symlink_to(tmp_path / "other")
    else:
        path.write_bytes({"a byte": content.replace(b"b", b"c", 1), "the end cut": content[:-3],
                          "something behind": content + b"x", "no text": b"\xff\xfe"}[change])  # fmt: skip
    before = path.read_bytes()
    assert not folders.is_our_card(path)
    assert not folders.write_card(tmp_path, "# other") and path.read_bytes() == before


def test_a_proof_says_that_it_is_no_model(command):
    run, _ = command("dpo", "--no-evaluate", stop_after_steps=1)
    assert "stopped after 1 steps" in (run / "README.md").read_text()


def test_rows_that_are_left_out_are_not_counted(command, tmp_path):
    rows = preference_rows(20, 3)
    rows[4] = rows[4] | {"rejected": rows[4]["chosen"]}
    path = write_rows(tmp_path / "rows.jsonl", rows)
    run, _ = command("dpo", "--no-evaluate", dataset=str(path), max_unusable_rows=0.5)
    assert "rows.jsonl`, 19 rows" in (run / "README.md").read_text()
