"""`discobeta merge`: a run as a plain model, which transformers alone reads, with the numbers of the run."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import WORDS
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import discobeta
from discobeta import files
from discobeta.cli import main
from discobeta.errors import UserError
from discobeta.run.merge import merge

DISCO = {"add_disco_head": True, "disco_pref": True, "head_pooling": "mean"}
TRAINED = {"max_steps": 3, "learning_rate": 0.02}
"""So that the adapter is no rounding error."""
TEXT = "user red green assistant one two ."
NEAR = {"rtol": 1e-4, "atol": 1e-5}
"""Of float32: W x + s B (A x) and (W + s B A) x round in other places, a few units of 2^-24 in each of the two layers,
whose norms divide by numbers of the size of the states; in one test that was 2e-6."""


@pytest.fixture(scope="module")
def runs(base, pairs, tmp_path_factory) -> Path:
    from discobeta.design.config import RunConfig
    from discobeta.run.train import train

    folder = tmp_path_factory.mktemp("runs")
    own = shutil.copytree(base, folder / "base")
    (own / "generation_config.json").write_text('{"eos_token_id": 2, "max_new_tokens": 5, "pad_token_id": 0}')
    common = {"model_name_or_path": str(own), "dataset": str(pairs["train"]), "eval_dataset": str(pairs["eval"])}
    common |= {"cutoff_len": 32, "lora_rank": 2, "per_device_train_batch_size": 8, **TRAINED}
    full = {"finetuning_type": "full", "pref_beta": 0.5, "learning_rate": 1e-3}
    for name, settings in {"rm": {"stage": "rm", **DISCO}, "plain": {"stage": "rm"}, "full": {"stage": "dpo", **full},
                           "dpo": {"stage": "dpo", "pref_beta": 0.5, **DISCO}}.items():  # fmt: skip
        settings = common | settings | {"output_dir": str(folder / name)}
        if name == "full":
            del settings["lora_rank"]
        train(RunConfig.from_mapping(settings)[0])
    return folder


def ids_of(folder: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer(TEXT, return_tensors="pt")["input_ids"]


@pytest.mark.parametrize("name", ["dpo", "full"])
def test_a_policy_is_a_plain_language_model(runs, tmp_path, name):
    """Logits as the run's own, which are others than the base's."""
    assert merge(runs / name, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = ids_of(tmp_path / "out")
    assert ids.tolist() == [[WORDS.index(word) for word in TEXT.split()]]
    with torch.no_grad():
        found, wanted = plain(ids).logits, discobeta.load_policy(runs / name).model(ids).logits
        of_base = AutoModelForCausalLM.from_pretrained(runs / "base")(ids).logits
    torch.testing.assert_close(found, wanted, **NEAR)
    assert (found - of_base).abs().max() > 0.05
    assert plain.generation_config.max_new_tokens == 5 and plain.generation_config.eos_token_id == 2
    assert not hasattr(plain, "peft_config") and "lora" not in "".join(plain.state_dict())


@pytest.mark.parametrize("name", ["rm", "plain"])
def test_a_reward_model_is_a_plain_classifier(runs, tmp_path, name):
    """Its one logit is r, or mu, of prompt, response and <eos>; also with padding behind it."""
    merge(runs / name, tmp_path / "out")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert plain.config.num_labels == 1
    mean, variance = discobeta.load_reward_model(runs / name).score("user red green assistant", "one two .")
    ids = torch.cat([ids_of(tmp_path / "out"), torch.tensor([[2]])], 1)
    padded = torch.cat([ids, torch.tensor([[0, 0]])], 1)
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits[0, 0], mean, **NEAR)
        torch.testing.assert_close(plain(padded, attention_mask=(padded != 0).long()).logits[0, 0], mean, **NEAR)
    assert (variance is None) == (name == "plain") == (not (tmp_path / "out/heads.json").exists())
    assert discobeta.load_reward_model(tmp_path / "out").score("user red green assistant", "one two .")[1] is None


def test_the_variance_head_beside_it_says_what_the_run_says(runs, tmp_path):
    """By the formula that the card gives, with transformers, safetensors and torch alone."""
    merge(runs / "rm", tmp_path / "out")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    head = load_file(tmp_path / "out/heads.safetensors")
    ids = torch.cat([ids_of(tmp_path / "out"), torch.tensor([[2]])], 1)
    with torch.no_grad():
        states = plain.model(ids).last_hidden_state[0, 4:].mean(0)  # of one, two, ., <eos>
        inner = torch.tanh(head["disco.net.0.weight"] @ (states - head["disco.state_mean"]))
        sigma = 2 / math.sqrt(math.pi) * torch.exp(head["disco.net.2.weight"] @ inner)[0]
    _, variance = discobeta.load_reward_model(runs / "rm").score("user red green assistant", "one two .")
    torch.testing.assert_close(sigma**2, variance, **NEAR)
    assert abs(float(variance) - 4 / math.pi) > 1e-4  # it has learned something
    card = (tmp_path / "out/README.md").read_text()
    for name in ("disco.net.0.weight", "disco.net.2.weight", "disco.state_mean", "mean over the response's tokens"):
        assert name in card


def test_a_merged_model_has_the_dtype_of_the_base_or_the_one_that_is_asked_for(runs, tmp_path, monkeypatch):
    """In bfloat16 a weight is the sum in float32, rounded once: not the rounded base plus a rounded update."""
    merge(runs / "dpo", tmp_path / "float32")
    merge(runs / "dpo", tmp_path / "bfloat16", dtype="bfloat16")
    wide, narrow = (load_file(tmp_path / name / "model.safetensors") for name in ("float32", "bfloat16"))
    assert {tensor.dtype for tensor in wide.values()} == {torch.float32}
    for name, tensor in wide.items():
        assert torch.equal(narrow[name], tensor.bfloat16()), name
    assert json.loads((tmp_path / "bfloat16/config.json").read_text())["dtype"] == "bfloat16"
    own = shutil.copytree(runs, tmp_path / "runs") / "base"
    AutoModelForCausalLM.from_pretrained(own, dtype=torch.bfloat16).save_pretrained(own)
    with pytest.raises(UserError, match="another base"):  # another base, for a run that knows it by its hash
        merge(tmp_path / "runs/dpo", tmp_path / "out", base=own)
    from conftest import reseal

    from discobeta.design.yaml_text import read_yaml, write_yaml

    settings = read_yaml(tmp_path / "runs/dpo/config.yaml")
    write_yaml(settings | {"model_name_or_path": str(own)}, tmp_path / "runs/dpo/config.yaml")
    reseal(tmp_path / "runs/dpo")
    merge(tmp_path / "runs/dpo", tmp_path / "of-bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "of-bfloat16/model.safetensors").values()} == {torch.bfloat16}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_command_again_leaves_it_and_mends_a_damaged_one(runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["merge", str(runs / "rm"), str(out)]) == 0
    before, written = contents(out), (out / "model.safetensors").stat().st_mtime_ns
    assert main(["merge", str(runs / "rm"), str(out)]) == 0 and "holds this model already" in capsys.readouterr().out
    assert contents(out) == before and (out / "model.safetensors").stat().st_mtime_ns == written
    (out / "model.safetensors").write_bytes(b"torn")
    assert main(["merge", str(runs / "rm"), str(out)]) == 0 and "is damaged" in capsys.readouterr().err
    assert contents(out) == before


@pytest.mark.parametrize("place", ["folder", "file", "run", "other model", "other dtype", "extra file", "answers"])
def test_nothing_that_is_somebodys_is_overwritten(runs, tmp_path, place, capsys):
    out, words = tmp_path / "out", []
    if place == "file":
        out.write_text("mine")
    elif place == "run":
        shutil.copytree(runs / "plain", out)
    elif place in ("other model", "other dtype", "extra file"):
        merge(runs / ("plain" if place == "other model" else "rm"), out)
        words = ["--dtype", "float16"] if place == "other dtype" else []
        if place == "extra file":
            (out / "notes.txt").write_text("mine")
            (out / "model.safetensors").write_bytes(b"torn")
    else:
        out.mkdir()
        (out / "model.safetensors").write_text("mine")
        if place == "answers":
            from discobeta.folders import write_mark

            write_mark(out, "discobeta answers", ["model.safetensors"])
    before = contents(tmp_path)
    assert main(["merge", str(runs / "rm"), str(out), *words]) == 2
    said = capsys.readouterr().err.splitlines()
    assert str(out) in said[-1] and contents(tmp_path) == before


def test_it_is_written_whole_or_not_at_all(runs, tmp_path, monkeypatch):
    """Whatever write it dies at: the folder is not there, and nothing is left beside it once it is made again."""
    real, count = files._open_to_readers, 0

    def dies(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_open_to_readers", dies)  # all is written, and nothing is in its place yet
    with pytest.raises(KeyboardInterrupt):
        merge(runs / "rm", tmp_path / "out")
    assert os.listdir(tmp_path) == [] and count == 0
    monkeypatch.setattr(files, "_open_to_readers", real)
    assert merge(runs / "rm", tmp_path / "out") and not merge(runs / "rm", tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["rm", "out", "--dtype", "int8"], "--dtype int8: one of float32, bfloat16, float16"),
        (["base", "out"], "is not a finished run of discobeta"),
        (["rm", "out", "--base", "nowhere"], "nowhere"),
    ],
)
def test_a_merge_that_cannot_be_is_one_line(runs, tmp_path, monkeypatch, words, says, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["merge", str(runs / words[0]), *words[1:]]) == 2
    said = capsys.readouterr().err
    assert says in said and len(said.splitlines()) == 1 and os.listdir(tmp_path) == []
