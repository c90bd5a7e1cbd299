"""Stage sft: an ordinary model folder, made by TRL, that is a function of its config."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from discobeta.design.config import RunConfig
from discobeta.errors import UserError
from discobeta.inputs import base as sft
from discobeta.inputs import world

SIZES = (
    "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,num_key_value_heads=1,head_dim=16,"
    "intermediate_size=64,tie_word_embeddings=true"
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    world.write_corpus(folder, seed=1, sft_examples=3000)
    return folder


@pytest.fixture
def config(corpus, tmp_path):
    """config(**changes): a few steps of the world's base in a folder of its own."""

    def make(**changes) -> RunConfig:
        settings = {
            "stage": "sft",
            "finetuning_type": "full",
            "model_type": "qwen3",
            "config_overrides": SIZES,
            "tokenizer_name": str(corpus / "tokenizer"),
            "dataset": str(corpus / "sft.jsonl"),
            "max_samples": 64,
            "cutoff_len": 32,
            "per_device_train_batch_size": 16,
            "learning_rate": 3e-3,
            "max_steps": 4,
            "logging_steps": 2,
            "output_dir": str(tmp_path / changes.pop("name", "base")),
        }
        return RunConfig.from_mapping(settings | changes)[0]

    return make


def trained(config: RunConfig) -> Path:
    sft.train(config)
    return Path(config.output_dir)


def load(folder: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# --- the folder


def test_a_base_is_an_ordinary_model_folder(config, corpus):
    folder = trained(config())
    model, tokenizer = load(folder)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    sizes = model.config
    assert (sizes.hidden_size, sizes.num_hidden_layers, sizes.head_dim, sizes.intermediate_size) == (32, 2, 16, 64)
    assert sizes.vocab_size == len(tokenizer) == 66 and sizes.tie_word_embeddings
    assert (sizes.pad_token_id, sizes.bos_token_id, sizes.eos_token_id) == (0, 1, 2)
    assert model.generation_config.eos_token_id == 2
    assert tokenizer("soup basil")["input_ids"] == load_tokenizer(corpus)("soup basil")["input_ids"]
    written = {path.name for path in folder.iterdir()}
    assert written >= {"config.yaml", "log.jsonl", "cost.json", "provenance.json", "model.safetensors"}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # no temporary is left


def load_tokenizer(corpus: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(corpus / "tokenizer")


def test_log_and_cost(config):
    folder = trained(config())
    rows = read_log(folder)
    assert [row["step"] for row in rows] == [2, 4]
    assert all(
        set(row) == {"step", "epoch", "loss", "mean_token_accuracy", "learning_rate", "grad_norm"} for row in rows
    )
    cost = json.loads((folder / "cost.json").read_text())
    assert cost["examples"] == 64  # 4 steps of 16
    assert 64 * (9 + 10) <= cost["tokens"] <= 64 * (9 + 11)  # prompts of 9, completions of 9 or 10 and <eos>
    assert cost["seconds"] > 0 and cost["gpu_seconds"] == 0 and cost["processes"] == 1


def test_equal_configs_give_equal_bytes(config):
    first, again, other = (trained(config(name=name, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    for name in ("model.safetensors", "log.jsonl", "config.json", "tokenizer.json"):
        assert (first / name).read_bytes() == (again / name).read_bytes(), name
    for name in ("model.safetensors", "log.jsonl"):
        assert (first / name).read_bytes() != (other / name).read_bytes(), name


def test_torchs_global_stream_is_left_alone(config):
    import torch

    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    trained(config(max_steps=1))
    assert torch.equal(torch.rand(2), expected)


# --- what is learnt


def test_the_loss_is_the_mean_over_completion_tokens(config, corpus):
    """With a learning rate of 0 the folder holds the initial weights, whose loss is worked out here on its own."""
    import torch

    folder = trained(config(learning_rate=0, max_steps=1, logging_steps=1, max_samples=16))
    model, tokenizer = load(folder)
    losses = []
    for line in (corpus / "sft.jsonl").read_text().splitlines()[:16]:
        row = json.loads(line)
        prompt, completion = (tokenizer(row[part])["input_ids"] for part in ("prompt", "completion"))
        ids = prompt + completion + [tokenizer.eos_token_id]
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        losses += [-float(logps[place - 1, ids[place]]) for place in range(len(prompt), len(ids))]
    assert read_log(folder)[0]["loss"] == pytest.approx(np.mean(losses), abs=1e-5)


@pytest.mark.numeric
def test_a_base_learns_the_world_and_its_mean_state_knows_the_words(config, corpus):
    """After 280 steps, responses are well-formed, and their reward is linear in the mean state, not in that at <eos>.

    The bounds are loose: what was measured at full size stands in docs/world.md.
    """
    sizes = SIZES.replace("hidden_size=32", "hidden_size=64").replace("num_attention_heads=2", "num_attention_heads=4")
    folder = trained(
        config(
            config_overrides=sizes, max_samples=None, per_device_train_batch_size=64, max_steps=280, learning_rate=5e-3
        )
    )
    prompts, responses, states = sampled(folder, 1000)
    good = np.array([world.DEFAULT.well_formed(*texts) for texts in zip(prompts, responses, strict=True)])
    assert good.mean() > 0.6
    rewards = np.array([world.DEFAULT.true_reward(*texts) for texts in zip(prompts, responses, strict=True)])
    assert abs(rewards[good].mean()) < 0.2  # the base knows no quality: words are uniform, E q = 0
    assert rewards[good].std() == pytest.approx(1.09, abs=0.1)  # sqrt(3 * 13 / 33) = 1.087
    explained = {name: explained_variance(values[good], rewards[good]) for name, values in states.items()}
    assert explained["mean"] > 0.35
    assert explained["mean"] > explained["last"] + 0.2


def sampled(folder: Path, count: int):
    """Prompts, responses that ended, and the last hidden states at <eos> and averaged over the response."""
    import random

    import torch

    from discobeta.model.generation import generate, response_text
    from discobeta.seeds import uniforms

    model, tokenizer = load(folder)
    rng = random.Random(0)
    prompts = [world.draw_prompt(rng, held_out=True) for _ in range(count)]
    prompt_ids = tokenizer(prompts)["input_ids"]
    draws = uniforms(0, "test", shape=(count, 12))
    responses = generate(model, tokenizer, prompt_ids, draws, batch_size=500)
    ended = [index for index in range(count) if responses[index][-1] == tokenizer.eos_token_id]
    states = {"last": [], "mean": []}
    for index in ended:
        with torch.no_grad():
            ids = torch.tensor([[*prompt_ids[index], *responses[index].tolist()]])
            hidden = model.model(ids).last_hidden_state[0, len(prompt_ids[index]) :].double().numpy()
        states["last"].append(hidden[-1])
        states["mean"].append(hidden.mean(0))
    texts = [response_text(tokenizer, responses[index]) for index in ended]
    return [prompts[index] for index in ended], texts, {name: np.array(values) for name, values in states.items()}


def explained_variance(features: np.ndarray, target: np.ndarray) -> float:
    """R^2 on the last third of a linear probe that is fitted (ridge) on the first two thirds."""
    cut = len(target) * 2 // 3
    scaled = np.c_[(features - features[:cut].mean(0)) / features[:cut].std(0), np.ones(len(target))]
    ridge = 1e-3 * cut * np.eye(scaled.shape[1])
    weights = np.linalg.solve(scaled[:cut].T @ scaled[:cut] + ridge, scaled[:cut].T @ target[:cut])
    return 1 - np.var(target[cut:] - scaled[cut:] @ weights) / np.var(target[cut:])


def test_a_start_from_a_model_is_that_model(config):
    import torch

    first = trained(config(name="first"))
    start = {"model_type": None, "tokenizer_name": None, "config_overrides": "", "model_name_or_path": str(first)}
    second = trained(config(name="second", learning_rate=0, **start))
    third = trained(config(name="third", **start))
    fourth = trained(config(name="fourth", seed=9, **start))  # another order of the data
    weights = [load(folder)[0].state_dict() for folder in (first, second, third, fourth)]

    def equal(a: int, b: int) -> bool:
        return all(torch.equal(weights[a][name], weights[b][name]) for name in weights[0])

    assert equal(0, 1) and not equal(0, 2) and not equal(2, 3)


def test_held_out_loss_and_an_early_stop(config):
    changes = {"val_size": 16, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 8, "stop_after_steps": 4}
    rows = read_log(trained(config(**changes)))
    assert [(row["step"], "eval_loss" in row) for row in rows] == [(2, False), (2, True), (4, False), (4, True)]
    assert all(set(row) == {"step", "epoch", "eval_loss"} for row in rows if "eval_loss" in row)
    assert rows[2]["learning_rate"] == pytest.approx(3e-3 * 5 / 8)  # linear over 8 steps: at the 4th, 3 are done


# --- a tokenizer of its own


def test_a_tokenizer_trained_on_the_data(config, tmp_path):
    folder = trained(config(tokenizer_name=None, vocab_size=300, max_steps=1, cutoff_len=256))
    model, tokenizer = load(folder)
    assert model.config.vocab_size == len(tokenizer) == 300
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    text = "Grüße, 世界 \n\t  two  spaces <eo 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("<eos>")["input_ids"] == [tokenizer.eos_token_id]


def test_a_trained_tokenizer_is_a_function_of_the_texts():
    """Also in another process, whose hash seed and number of threads differ."""
    texts = [f"{a}{b} {b}{a}" for a in "abcdefgh" for b in "ijklmnop"]  # merges with many ties
    program = (
        "from discobeta.inputs.base import train_tokenizer\n"
        f"print(train_tokenizer({texts!r}, 320).backend_tokenizer.to_str(), end='')"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1", "RAYON_NUM_THREADS": "1"}
    other = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout == sft.train_tokenizer(texts, 320).backend_tokenizer.to_str()


# --- bad input


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"config_overrides": "hiden_size=64"}, "no 'hiden_size'; did you mean 'hidden_size'"),
        ({"config_overrides": "hidden_size"}, "write name=value"),
        ({"config_overrides": "hidden_size=big"}, "hidden_size=big should be like 4096"),
        ({"config_overrides": "hidden_size=64.5"}, "hidden_size=64.5 should be like 4096"),
        ({"config_overrides": "tie_word_embeddings=1"}, "should be like False"),
        ({"config_overrides": "vocab_size=100"}, "vocab_size comes from the tokenizer"),
        ({"config_overrides": SIZES + ",hidden_act=reluu"}, "cannot build such a qwen3: KeyError: 'reluu'"),
        ({"config_overrides": SIZES.replace("num_key_value_heads=1", "num_key_value_heads=3")}, "cannot build such"),
        ({"model_type": "qwen33"}, "no causal LM 'qwen33'; did you mean 'qwen3'"),
        ({"model_type": "vit"}, "no causal LM 'vit'"),
        ({"lr_scheduler_type": "lineal"}, "lineal"),
        ({"tokenizer_name": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"dataset": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"dataset": None, "tokenizer_name": None}, "dataset is missing"),
        ({"output_dir": ""}, "output_dir is missing"),
    ],
)
def test_bad_input_is_named(config, tmp_path, changes, message):
    with pytest.raises(UserError) as refusal:
        sft.train(config(**changes))
    assert message in str(refusal.value)
    assert len(str(refusal.value).splitlines()) <= 2
    assert not list(tmp_path.iterdir())


def test_numbers_of_an_override_have_the_architectures_types(corpus):
    tokenizer = load_tokenizer(corpus)
    overrides = "rms_norm_eps=1e-5, rope_theta=500, attention_bias=true, num_hidden_layers=3"
    architecture = sft.build_architecture("qwen3", overrides, tokenizer)
    assert architecture.rms_norm_eps == 1e-5 and architecture.attention_bias is True
    assert architecture.rope_parameters["rope_theta"] == 500.0 and len(architecture.layer_types) == 3
    assert sft.build_architecture("gpt2", "hidden_size=48,n_layer=2,n_head=2", tokenizer).n_embd == 48


def test_what_output_dir_holds_is_not_lost(config, tmp_path):
    folder = trained(config(max_steps=1))
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"holds another run \(seed: 42 there, 5 here\)"):
        sft.train(config(max_steps=1, seed=5))
    sft.train(config(max_steps=1))  # the same run: nothing to do
    assert (folder / "model.safetensors").read_bytes() == before
    sft.train(config(max_steps=1, seed=5, overwrite_output_dir=True))
    assert (folder / "model.safetensors").read_bytes() != before

    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="thesis.tex in it was not written by discobeta"):
        sft.train(config(name="home", overwrite_output_dir=True))
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years"


def test_a_run_that_fails_leaves_nothing(config, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sft, "cost", fail)  # after training and saving, before the end
    with pytest.raises(RuntimeError, match="out of memory"):
        sft.train(config(max_steps=1))
    assert not list(tmp_path.iterdir())
