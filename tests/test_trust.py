"""What is read is what it says it is: base, data, reward models and the files of a run are compared when read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import reseal
from safetensors.torch import load_file, save_file

import discobeta
from discobeta import files
from discobeta.cli import main
from discobeta.errors import UserError
from discobeta.run.evaluate import evaluate

BOTH = {"add_disco_head": True, "disco_pref": True, "add_beta_head": True, "use_dynamic_beta": True}


@pytest.fixture
def own_base(base, tmp_path):
    """A copy of the base that a test may change."""
    return shutil.copytree(base, tmp_path / "own-base")


def change_weights(folder: Path, **changes) -> None:
    """Rewrite the model's weights: name=None removes one, name=function maps it."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name, change in changes.items():
        name = name.replace("__", ".")
        if change is None:
            del weights[name]
        else:
            weights[name] = change(weights.get(name))
    save_file(weights, path, metadata={"format": "pt"})


def flip_a_bit(path: Path, place: float = 0.9) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


# --- base, data and reward model


def test_a_run_on_another_base_is_refused(run, own_base):
    dpo = run("dpo", name="dpo", model_name_or_path=str(own_base))
    rm = run("rm", name="rm", model_name_or_path=str(own_base))
    evaluate(dpo)
    before = (dpo / "metrics.json").read_bytes()
    change_weights(own_base, model__norm__weight=lambda weight: weight * 1.5)
    for reading in (
        lambda: evaluate(dpo),
        lambda: discobeta.load_policy(dpo),
        lambda: discobeta.load_reward_model(rm),
        lambda: run("dpo", name="dpo", model_name_or_path=str(own_base)),  # finished, but not what it would be now
        lambda: run("ppo", name="ppo", reward_model=str(rm)),
    ):
        with pytest.raises(UserError, match="was trained with another base than .*own-base is now"):
            reading()
    assert (dpo / "metrics.json").read_bytes() == before


def test_a_run_with_another_tokenizer_is_refused(run, own_base):
    dpo = run("dpo", model_name_or_path=str(own_base))
    path = own_base / "tokenizer.json"
    path.write_text(path.read_text().replace('"red": 6', '"red": 7').replace('"green": 7', '"green": 6'))
    with pytest.raises(UserError, match="another tokenizer"):
        discobeta.load_policy(dpo)


def test_a_run_on_other_rows_is_refused(run, pairs, tmp_path):
    own = {name: shutil.copy(path, tmp_path / f"own-{name}.jsonl") for name, path in pairs.items()}
    dpo = run("dpo", dataset=str(own["train"]), eval_dataset=str(own["eval"]))
    for part, says in (("train", "another data"), ("eval", "another held out")):
        whole = Path(own[part]).read_text()
        Path(own[part]).write_text("".join(whole.splitlines(keepends=True)[1:]))
        with pytest.raises(UserError, match=says):
            evaluate(dpo)
        with pytest.raises(UserError, match="another sources"):
            run("dpo", dataset=str(own["train"]), eval_dataset=str(own["eval"]))
        Path(own[part]).write_text(whole)
    evaluate(dpo)


def test_a_policy_whose_reward_model_was_trained_again_is_refused(run):
    rm = run("rm", name="rm")
    ppo = run("ppo", name="ppo", reward_model=str(rm), max_new_tokens=4, max_steps=1)
    run("rm", name="rm", learning_rate=2e-3, overwrite_output_dir=True)
    with pytest.raises(UserError, match="another reward model than .*rm is now"):
        evaluate(ppo)


# --- weights


@pytest.mark.parametrize("stage", ["dpo", "rm"])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model__layers__1__mlp__up_proj__weight": None}, "lacks the weight model.layers.1.mlp.up_proj.weight"),
        (
            {"model__layers__2__mlp__up_proj__weight": lambda w: torch.zeros(64, 32)},
            "has the weight model.layers.2.mlp",
        ),
        ({"model__norm__weight": lambda w: torch.ones(16)}, r"model.norm.weight is \(16,\) in its files, and \(32,\)"),
        ({"model__norm__weight": lambda w: w.to(torch.int32)}, "model.norm.weight holds integers"),
        ({"model__norm__weight": lambda w: w.index_fill(0, torch.tensor([3]), torch.nan)}, "not finite"),
    ],
)
def test_a_base_that_is_not_whole_is_refused(run, own_base, stage, changes, says):
    change_weights(own_base, **changes)
    with pytest.raises(UserError, match=says) as refused:
        run(stage, model_name_or_path=str(own_base))
    assert str(own_base) in str(refused.value)


def test_a_judge_that_is_not_whole_is_refused(base, own_base):
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(own_base)
    discobeta.load_reward_model(own_base)
    change_weights(own_base, model__layers__0__self_attn__q_proj__weight=None)
    with pytest.raises(UserError, match="lacks the weight model.layers.0.self_attn.q_proj.weight"):
        discobeta.load_reward_model(own_base)


def test_only_a_whole_plain_lora_adapter_is_one(run, tmp_path):
    start = run("dpo", name="start") / "adapter"

    def refused(**changes):
        adapter = shutil.copytree(start, tmp_path / "adapter", dirs_exist_ok=True)
        settings = json.loads((start / "adapter_config.json").read_text()) | changes.get("settings", {})
        (adapter / "adapter_config.json").write_text(json.dumps(settings))
        weights = load_file(start / "adapter_model.safetensors")
        save_file(changes.get("weights", lambda all: all)(weights), adapter / "adapter_model.safetensors")
        if "file" in changes:
            (adapter / "adapter_model.safetensors").rename(adapter / changes["file"])
        with pytest.raises(UserError) as error:
            run("dpo", name="run", adapter_name_or_path=str(adapter))
        shutil.rmtree(adapter)
        return str(error.value)

    assert "use_dora: True" in refused(settings={"use_dora": True})
    assert "use_rslora: True" in refused(settings={"use_rslora": True})
    assert "belongs to a base with other weights" in refused(settings={"init_lora_weights": "pissa_niter_4"})
    assert "'IA3': only LORA" in refused(settings={"peft_type": "IA3"})
    assert "lacks base_model" in refused(weights=lambda all: dict(list(all.items())[: len(all) // 2]))
    assert "does not fit this model" in refused(weights=lambda all: all | {"base_model.model.extra": torch.ones(2)})
    assert "not finite" in refused(weights=lambda all: {name: value * torch.nan for name, value in all.items()})
    assert "adapter_model.bin is damaged, or holds more than a model's weights" in refused(file="adapter_model.bin")
    assert "only adapter_model.pt" in refused(file="adapter_model.pt")


@pytest.mark.parametrize("key", ["model_name_or_path", "adapter_name_or_path", "reward_model"])
def test_a_local_folder_that_is_not_there_is_not_looked_for_on_the_hub(run, tmp_path, monkeypatch, key):
    """Somebody else's model may have that name there."""
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    given = {key: "runs/mistyped"} | ({"reward_model": "runs/mistyped"} if key == "reward_model" else {})
    with pytest.raises(UserError, match=f"{key}: there is no directory runs/mistyped"):
        run("ppo" if key == "reward_model" else "dpo", **given)


# --- the files of a run


@pytest.fixture(scope="module")
def finished(base, pairs, tmp_path_factory):
    """A dpo and an rm run with used heads, evaluated."""
    from discobeta.design.config import RunConfig
    from discobeta.run.train import train

    folder = tmp_path_factory.mktemp("finished")
    common = {"model_name_or_path": str(base), "dataset": str(pairs["train"]), "eval_dataset": str(pairs["eval"])}
    common |= {"cutoff_len": 32, "max_steps": 2, "lora_rank": 2, "learning_rate": 1e-3, "logging_steps": 1}
    for stage in ("dpo", "rm"):
        train(RunConfig.from_mapping({"stage": stage, "output_dir": str(folder / stage), **common, **BOTH})[0])
        evaluate(folder / stage)
    return folder


@pytest.fixture
def runs(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "runs")


READ = ["config.yaml", "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "heads.safetensors"]
READ += ["heads.json", "log.jsonl", "cost.json", "provenance.json"]


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "emptied"])
def test_damage_to_a_file_of_a_run_is_named(runs, name, damage):
    for stage, load in (("dpo", discobeta.load_policy), ("rm", discobeta.load_reward_model)):
        path = runs / stage / name
        if damage == "bit":
            flip_a_bit(path)
        elif damage == "gone":
            path.unlink()
        else:
            lines = path.read_bytes().splitlines(keepends=True)
            path.write_bytes(b"".join(lines[: len(lines) // 2]) if damage == "cut" else b"")
        before = (runs / stage / "metrics.json").read_bytes()
        for reading in (load, evaluate):
            with pytest.raises(UserError, match=name.replace(".", r"\.")):
                reading(runs / stage)
        assert (runs / stage / "metrics.json").read_bytes() == before
        assert main(["evaluate", str(runs / stage)]) == 2


def test_parts_of_a_run_are_compared_where_they_are_used_alone(runs, run):
    """The adapter that another run starts from, or that judges."""
    dpo, rm = runs / "dpo" / "adapter", runs / "rm" / "adapter"
    start = {"adapter_name_or_path": str(dpo), "lora_rank": 2}
    run("dpo", name="whole", **start)
    discobeta.load_reward_model(rm)
    for adapter in (dpo, rm):
        flip_a_bit(adapter / "adapter_model.safetensors")
    for reading in (lambda: run("dpo", name="new", **start), lambda: discobeta.load_reward_model(rm)):
        with pytest.raises(UserError, match="adapter_model.safetensors is not what was written there when its run"):
            reading()


def test_weights_that_were_put_beside_are_refused(runs):
    torch.save({}, runs / "dpo" / "adapter" / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model.bin was put there after the run was finished"):
        discobeta.load_policy(runs / "dpo")


@pytest.mark.parametrize("content", ["null", "5", "[]", "{}", '{"files": {}}', "[" * 3000, '{"seal": 1}', "9" * 5000])
def test_a_record_of_another_shape_is_one_line(runs, content, capsys):
    (runs / "dpo" / "provenance.json").write_text(content)
    assert main(["evaluate", str(runs / "dpo")]) == 2
    message = capsys.readouterr().err
    assert "provenance.json" in message and len(message.splitlines()) == 1 and len(message) < 400


def test_the_seal_is_over_every_value(tmp_path):
    path = tmp_path / "record.json"
    files.write_sealed(path, {"a": 1, "b": {"c": [1, 2.5, None, "é😀"]}})
    assert files.read_sealed(path) == {"a": 1, "b": {"c": [1, 2.5, None, "é😀"]}}
    path.write_text(path.read_text().replace("2.5", "2.6"))
    with pytest.raises(UserError, match="was changed after it was written"):
        files.read_sealed(path)


def test_metrics_of_an_earlier_training_are_not_this_ones(runs, run, settings):
    from discobeta import record

    assert record.measurement_fault(runs / "dpo") is None
    for name in ("metrics.json", "examples.parquet"):
        shutil.copytree(runs / "dpo", runs / "changed", dirs_exist_ok=True)
        flip_a_bit(runs / "changed" / name)
        assert record.measurement_fault(runs / "changed") == f"damaged: {name} was changed after the evaluation"
    path = run("dpo", name="twice")
    evaluate(path)
    for name in ("provenance.json", ".finished.json"):  # with the second it would be the same training
        (path / name).unlink()
    run("dpo", name="twice")
    assert record.measurement_fault(path) == "not evaluated" and not (path / "metrics.json").exists()


# --- whose word counts


CODE = """
from pathlib import Path
from transformers import Qwen3Config

Path({mark!r}).touch()


class OwnConfig(Qwen3Config):
    model_type = "own"
"""


def test_a_runs_own_word_on_remote_code_counts_for_nothing(runs, own_base, tmp_path, capsys):
    """A run that somebody gives away names a base with code, and says that it may be run."""
    mark = tmp_path / "the-code-ran"
    (own_base / "own.py").write_text(CODE.format(mark=str(mark)))
    description = json.loads((own_base / "config.json").read_text())
    description |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (own_base / "config.json").write_text(json.dumps(description))
    for stage in ("dpo", "rm"):
        directory = runs / stage
        settings = yaml.safe_load((directory / "config.yaml").read_text())
        settings |= {"trust_remote_code": True, "model_name_or_path": str(own_base), "output_dir": str(directory)}
        (directory / "config.yaml").write_text(yaml.safe_dump(settings))
        reseal(directory)  # whoever gives a run away can do that too
    for reading in (
        lambda: evaluate(runs / "dpo"),
        lambda: discobeta.load_policy(runs / "dpo"),
        lambda: discobeta.load_reward_model(runs / "rm"),
    ):
        with pytest.raises(UserError, match="trust_remote_code"):
            reading()
        assert not mark.exists()
    assert main(["evaluate", str(runs / "dpo")]) == 2
    assert "trust_remote_code" in capsys.readouterr().err and not mark.exists()
    with pytest.raises(UserError):  # the caller's word counts: the code runs (and makes no model that fits)
        discobeta.load_policy(runs / "dpo", trust_remote_code=True)
    assert mark.exists()


def test_an_evaluation_writes_nowhere_but_in_the_run(run, tmp_path, monkeypatch):
    """The folders that a run's config names are somebody's; those that are not there are not made."""
    elsewhere = tmp_path / "elsewhere"
    path = run("dpo", name="given", tokenized_path=str(elsewhere / "t"), reference_path=str(elsewhere / "r"))
    first = evaluate(path)
    shutil.rmtree(elsewhere)
    (elsewhere / "r").mkdir(parents=True)
    (elsewhere / "r" / "thesis.tex").write_text("three years")
    outside = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and path not in p.parents}
    assert evaluate(path) == first
    assert outside == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and path not in p.parents}
