"""Model, tokenizer, context, LoRA and adapter are compared before anything expensive: one line each, nothing left."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path

import pytest
import yaml
from conftest import WORDS, preference_rows, write_rows

from discobeta.cli import main
from discobeta.errors import UserError

SIZES = {
    "llama": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
              "max_position_embeddings": 64},
    "qwen3": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "head_dim": 8, "intermediate_size": 64, "max_position_embeddings": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64,
            "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "mixtral": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                "intermediate_size": 64, "num_local_experts": 2, "max_position_embeddings": 64},
}  # fmt: skip


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """made(model_type, words, **settings): folder of a tiny random model with embeddings for the usual words, and of
    a tokenizer of `words`."""
    kept: dict[str, Path] = {}

    def make(model_type: str, words: list[str] = WORDS, **settings) -> Path:
        import torch
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

        key = json.dumps([model_type, words, settings])
        if key in kept:
            return kept[key]
        folder = kept[key] = tmp_path_factory.mktemp(model_type)
        backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
        PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": len(WORDS)}
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **(ids | SIZES[model_type] | settings))
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def command(settings, tmp_path, capsys):
    """command(stage, **changes): status, what `discobeta` says in its own name, and the output directory."""

    def go(stage="dpo", word="train", **changes) -> tuple[int, str, Path]:
        wanted = settings(stage, **changes)
        if stage == "sft":
            wanted = {key: wanted[key] for key in wanted if key not in ("lora_rank", "pref_beta", "eval_dataset")}
            wanted["finetuning_type"] = "full"
        wanted = {key: value for key, value in wanted.items() if value is not ...}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(wanted))
        capsys.readouterr()
        status = main([word, str(path), *(["--no-evaluate"] if word == "train" else [])])
        said = capsys.readouterr().err
        assert "Traceback" not in said and "DISCOBETA_TRACEBACK" not in said
        lines = [line for line in said.splitlines() if line.startswith("discobeta: ")]
        return status, "\n".join(lines), Path(wanted["output_dir"])

    return go


@pytest.fixture
def refused(command):
    """refused(stage, **changes): the one line that a run is refused with before it leaves anything."""

    def go(stage="dpo", **changes) -> str:
        status, said, output = command(stage, **changes)
        assert status == 2 and said.count("\n") == 0, said
        assert not output.exists()
        return said.removeprefix("discobeta: ")

    return go


def losses(directory: Path) -> list[float]:
    lines = map(json.loads, (directory / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


# --- token ids


@pytest.fixture
def strange(tmp_path) -> dict[str, str]:
    """Rows of which one holds a word beyond the usual ones."""
    row = {"prompt": "user red assistant", "chosen": "extra .", "rejected": "six ."}
    return {"dataset": str(write_rows(tmp_path / "strange.jsonl", [*preference_rows(20, 1), row]))}


@pytest.mark.parametrize("stage", ["rm", "dpo", "sft"])
def test_a_token_without_an_embedding_is_named_with_its_row(refused, made, strange, stage):
    base = made("llama", [*WORDS, "extra"])
    said = refused(stage, model_name_or_path=str(base), **strange)
    assert said.startswith("strange.jsonl:21 holds the token 'extra' (id 19), and ")
    assert f"{base} has an embedding for 19 tokens (ids 0 to 18)" in said


def test_a_tokenizer_larger_than_the_model_serves_where_no_row_uses_what_is_over(command, made):
    status, said, _ = command("rm", model_name_or_path=str(made("llama", [*WORDS, "extra"])), max_steps=1)
    assert (status, said) == (0, "")


def test_the_reference_command_asks_too(command, made, strange, tmp_path):
    base = made("llama", [*WORDS, "extra"])
    reference = tmp_path / "reference"
    status, said, _ = command(
        "dpo", "reference", model_name_or_path=str(base), reference_path=str(reference), **strange
    )
    assert status == 2 and "'extra' (id 19)" in said and not reference.exists()


def test_an_end_that_the_model_has_no_token_for_is_refused(refused, made):
    words = [*WORDS[:2], "full-stop", *WORDS[3:], "<eos>"]
    said = refused("dpo", model_name_or_path=str(made("gpt2", words)))
    assert "holds the token '<eos>' (id 19)" in said


@pytest.fixture
def judges(made, command):
    """judges(base, **changes): an rm run on it."""

    def make(base: Path, **changes) -> str:
        status, said, output = command("rm", model_name_or_path=str(base), max_steps=1, name=base.name, **changes)
        assert status == 0, said
        return str(output)

    return make


PPO = {"max_new_tokens": 4, "ppo_epochs": 1, "num_eval_generations": 2, "eval_dataset": ..., "max_steps": 1}


def test_prompts_of_ppo_are_compared_with_policy_and_judge(refused, made, judges, tmp_path):
    words = [*WORDS, "extra"]
    small, large = made("llama", words), made("llama", words, vocab_size=20)
    rows = [*preference_rows(10, 1), {"prompt": "user extra assistant", "chosen": "one .", "rejected": "six ."}]
    strange = {"dataset": str(write_rows(tmp_path / "rows.jsonl", rows))}
    judge = judges(small)
    for base, reader in ((small, small), (large, f"reward_model {judge}")):
        said = refused("ppo", model_name_or_path=str(base), reward_model=judge, **PPO, **strange)
        assert f"rows.jsonl:11 holds the token 'extra' (id 19), and {reader} has an embedding for 19" in said


def test_a_sampled_token_that_the_judge_lacks_is_one_line(command, made, judges):
    """A policy whose vocabulary is padded further than its judge's may sample what no text has."""
    words = [*WORDS, *(f"extra{i}" for i in range(300))]
    judge = judges(made("llama", words))
    base = made("llama", words, vocab_size=len(words))  # nearly every sample is beyond the judge's 19
    status, said, _ = command("ppo", model_name_or_path=str(base), reward_model=judge, **PPO)
    assert status == 2 and said.count("\n") == 0
    assert f"reward_model {judge} knows 19 tokens (ids 0 to 18), and was given the token id " in said


def test_a_policy_that_cannot_end_a_response_is_refused(refused, made, judges):
    """Its tokenizer's <eos> has no embedding, and the model names no other token to stop at."""
    words = [*WORDS[:2], "full-stop", *WORDS[3:], "<eos>"]
    judge = judges(made("llama", words, vocab_size=20))
    base = made("llama", words, eos_token_id=None)
    said = refused("ppo", model_name_or_path=str(base), reward_model=judge, **PPO)
    assert said.startswith("no response could end: it does with the token '<eos>' (id 19), and ")


def test_scores_of_texts_beyond_the_judge_are_refused(made, judges):
    from discobeta import load_reward_model

    judge = load_reward_model(judges(made("gpt2", [*WORDS, "extra"])))
    with pytest.raises(UserError, match=r"knows 19 tokens \(ids 0 to 18\), and was given the token id 19"):
        judge.score(["user extra assistant"], ["one ."])
    with pytest.raises(UserError, match="has a context of 64 tokens, and a prompt with its response has 103"):
        judge.config = judge.config.replace(cutoff_len=200)
        judge.score([f"user {'red ' * 98}assistant"], ["one ."])  # 100, 2 and the end


# --- lengths


@pytest.fixture
def long(tmp_path) -> dict:
    """Rows of which one has 85 tokens: 82 of the prompt, 2 of the response, and its end."""
    row = {"prompt": f"user {'red ' * 80}assistant", "chosen": "one .", "rejected": "six ."}
    return {"dataset": str(write_rows(tmp_path / "long.jsonl", [row, *preference_rows(20, 1)])), "cutoff_len": 100}


@pytest.mark.parametrize(
    ("stage", "model_type"), [("rm", "gpt2"), ("dpo", "gpt2"), ("sft", "gpt2"), ("rm", "opt"), ("dpo", "llama")]
)
def test_a_row_longer_than_the_context_is_named(refused, made, long, stage, model_type):
    base = made(model_type)
    assert refused(stage, model_name_or_path=str(base), **long) == (
        f"long.jsonl:1 has 85 tokens (prompt + response), and the context of {base} is 64: "
        "lower cutoff_len to 64 or less"
    )


def test_a_model_without_a_context_reads_any_length(command, made, long):
    more = {"lora_target": "in_proj", "max_steps": 1, "per_device_train_batch_size": 2}
    assert command("dpo", model_name_or_path=str(made("mamba")), **more, **long)[0] == 0


def test_rows_that_fill_the_position_table_are_trained_on(command, made, tmp_path):
    """64 tokens: 60 of the prompt, 3 words and the end. OPT's table has two places more, which are no positions."""
    row = {"prompt": f"user {'red ' * 58}assistant", "chosen": "one two .", "rejected": "six ."}
    data = write_rows(tmp_path / "full.jsonl", [row] * 8)
    for number, model_type in enumerate(("gpt2", "opt")):
        more = {"dataset": str(data), "cutoff_len": 64, "max_steps": 1, "name": f"run{number}"}
        assert command("rm", model_name_or_path=str(made(model_type)), **more)[:2] == (0, "")


def test_room_for_responses_is_asked_for_before_the_reference_pass(refused, made):
    said = refused("dpo", model_name_or_path=str(made("gpt2")), num_eval_generations=2, max_new_tokens=62)
    assert "max_new_tokens: 62 do not fit into the context of 64 tokens" in said


def test_the_context_is_what_the_config_says_it_is():
    from transformers import AutoConfig, FalconConfig, GPT2Config, Qwen3Config

    from discobeta.model.forward import context_of

    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    llama3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 8,
              "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # fmt: skip
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    assert context_of(GPT2Config(n_positions=96)) == 96
    assert context_of(Qwen3Config(max_position_embeddings=128)) == 128
    assert context_of(Qwen3Config(max_position_embeddings=128, rope_parameters=yarn)) == 512  # 4 x 128
    assert context_of(Qwen3Config(max_position_embeddings=256, rope_parameters=llama3)) == 256  # already scaled
    assert context_of(Qwen3Config(max_position_embeddings=128, rope_parameters=linear)) == 256
    # angles by the longest row of a pass: beyond the original context a row changes what is said of those beside it
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert context_of(Qwen3Config(max_position_embeddings=128, rope_parameters=dynamic)) == 128
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
    of_phi = {"max_position_embeddings": 256, "original_max_position_embeddings": 64}
    assert context_of(Qwen3Config(**of_phi, rope_parameters=longrope | {"original_max_position_embeddings": 64})) == 64
    assert context_of(AutoConfig.for_model("phi3", **of_phi, pad_token_id=0)) == 256  # nothing is scaled
    assert context_of(FalconConfig(max_position_embeddings=128, alibi=True)) is None
    assert context_of(AutoConfig.for_model("mpt", max_seq_len=48)) == 48
    assert context_of(AutoConfig.for_model("bloom")) is None
    assert context_of(AutoConfig.for_model("mamba")) is None
    assert context_of(AutoConfig.for_model("gemma3", text_config={"max_position_embeddings": 77})) == 77


# --- LoRA's targets


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", "opt", "mixtral"])
@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_all_means_what_peft_means_by_all_linear(made, settings, stage, model_type):
    from peft import LoraConfig, get_peft_model

    from discobeta.design.config import RunConfig
    from discobeta.method.stage import stage_class

    config, _ = RunConfig.from_mapping(settings(stage, model_name_or_path=str(made(model_type))))
    kind = stage_class(stage)
    ours = kind.start(config).base_model.targeted_module_names
    theirs = get_peft_model(kind.load_base(config), LoraConfig(target_modules="all-linear", task_type=kind.task))
    assert set(ours) == set(theirs.base_model.targeted_module_names) and len(ours) >= 8


@pytest.mark.parametrize("target", ["c_attn", "c_attn, c_proj,", "all", "all-linear", "h.1.attn.c_attn"])
def test_conv1d_is_a_linear_layer(run, made, target):
    """The adapter of a GPT-2, read by plain PEFT, says what the run says."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    from discobeta.run.load import load_policy

    base = made("gpt2")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fan_in_fan_out")
        directory = run("dpo", model_name_or_path=str(base), lora_target=target, learning_rate=0.01)
    saved = json.loads((directory / "adapter" / "adapter_config.json").read_text())
    assert saved["fan_in_fan_out"] is True
    ids = torch.tensor([[4, 6, 7, 5, 9, 10]])
    with torch.no_grad():
        said = load_policy(directory).model(ids).logits
        plain = AutoPeftModelForCausalLM.from_pretrained(directory / "adapter").eval()(ids).logits
        before = AutoModelForCausalLM.from_pretrained(base)(ids).logits
    assert torch.equal(said, plain) and (said - before).abs().max() > 1e-3


def test_of_conv1d_and_linear_each_is_taken_as_it_is(made, settings):
    """PEFT notes each correction in its config, with a warning: nothing that a user could act on."""
    import torch
    from torch import nn

    from discobeta.design.config import RunConfig
    from discobeta.model.adapters import add_adapter
    from discobeta.model.pretrained import load_causal_lm

    base = made("gpt2")
    config, _ = RunConfig.from_mapping(settings("dpo", model_name_or_path=str(base)))
    model = load_causal_lm(config)
    model.transformer.h[1].mlp.c_fc = nn.Linear(32, 128)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fan_in_fan_out")
        adapted = add_adapter(model, config, "CAUSAL_LM")
    shapes = {name: tuple(weight.shape) for name, weight in adapted.named_parameters() if "lora_B" in name}
    assert {shape for name, shape in shapes.items() if "c_fc" in name} == {(128, 4)} and len(shapes) == 8
    assert adapted(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize(
    ("model_type", "target", "says"),
    [
        ("gpt2", "wte", "lora_target: the model has no linear layer called wte; it has c_attn, c_fc, c_proj"),
        ("gpt2", "lm_head", "no linear layer called lm_head; it has c_attn, c_fc, c_proj"),
        ("gpt2", "attn", "no linear layer called attn"),
        ("gpt2", " , ", "lora_target names no layer"),
        ("mixtral", "gate_up_proj", "no linear layer called gate_up_proj (it has experts of that name, stacked)"),
        ("mamba", "all", "lora_target: dt_proj, in_proj, out_proj, x_proj: "),
        ("mamba", "in_proj,out_proj", "Module 'out_proj' is incompatible with Mamba-based models"),
    ],
)
def test_a_layer_that_lora_cannot_be_on_is_refused(refused, made, model_type, target, says):
    assert says in refused("dpo", model_name_or_path=str(made(model_type)), lora_target=target)


def test_experts_that_all_leaves_out_are_said(command, made):
    base = {"model_name_or_path": str(made("mixtral")), "max_steps": 1}
    status, said, output = command("dpo", **base)
    assert status == 0
    assert "lora_target: all leaves down_proj, gate_up_proj of " in said and said.count("\n") == 0
    status, said, _ = command("dpo", **base, name="on", adapter_name_or_path=str(output / "adapter"), lora_rank=...)
    assert (status, said.count("\n")) == (0, 0), said


# --- adapters


@pytest.fixture(scope="session")
def adapter(made, pairs, tmp_path_factory) -> Path:
    """The adapter of a dpo run on the Llama: rank 4, alpha 8, dropout 0.1, on q_proj and v_proj."""
    from discobeta.design.config import RunConfig
    from discobeta.run.train import train

    folder = tmp_path_factory.mktemp("start")
    config, _ = RunConfig.from_mapping(
        {
            "stage": "dpo", "model_name_or_path": str(made("llama")), "dataset": str(pairs["train"]),
            "output_dir": str(folder / "run"), "cutoff_len": 32, "max_steps": 2, "learning_rate": 1e-2,
            "lora_rank": 4, "lora_dropout": 0.1, "lora_target": "q_proj,v_proj",
        }
    )  # fmt: skip
    train(config)
    # out of the run's directory, whose record would say that it was changed
    return shutil.copytree(folder / "run" / "adapter", folder / "adapter")


@pytest.mark.parametrize(
    ("settings_of_it", "says"),
    [
        ("{", "adapter_config.json is not valid JSON"),
        ("", "adapter_config.json is not valid JSON"),
        ("[]", "adapter_config.json should hold a JSON object, not list"),
        ({"peft_type": None}, "peft_type: None: only LORA is supported"),
        ({"peft_type": "FOO"}, "peft_type: 'FOO': only LORA is supported"),
        ({"peft_type": ["LORA"]}, "peft_type: ['LORA']: only LORA is supported"),
        ({"r": 8}, "q_proj.lora_A.weight is (4, 32) in its files, and (8, 32) by its adapter_config.json"),
        ({"r": "4"}, "r: '4' should be a whole number above 0"),
        ({"r": None}, "r: None should be a whole number above 0"),
        ({"lora_alpha": math.nan}, "lora_alpha: nan should be a number above 0"),
        ({"lora_dropout": 2.0}, "lora_dropout: 2.0 should be a number from 0, below 1"),
        ({"target_modules": 7}, "target_modules: 7 should be names of layers, or a pattern"),
        ({"target_modules": ["c_attn"]}, "Target modules {'c_attn'} not found in the base model"),
        ({"target_modules": ["q_proj", "nothing"]}, "which has no base_model.model.model.layers.0.self_attn.v_proj."),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "k_proj.lora_A.weight (and 3 more): its weights are not"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path: 5 should be text"),
        ({"rank_pattern": "x"}, "rank_pattern: 'x' should be a mapping"),
    ],
)
def test_an_adapter_whose_settings_are_wrong_is_one_line(refused, made, adapter, tmp_path, settings_of_it, says):
    broken = shutil.copytree(adapter, tmp_path / "broken")
    path = broken / "adapter_config.json"
    if isinstance(settings_of_it, str):
        path.write_text(settings_of_it)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | settings_of_it))
    base = {"model_name_or_path": str(made("llama")), "lora_rank": ...}
    assert says in refused("dpo", adapter_name_or_path=str(broken), **base)


@pytest.mark.parametrize("damage", ["none", "empty", "cut", "integers", "nothing in it"])
def test_an_adapter_whose_weights_are_wrong_is_one_line(refused, made, adapter, tmp_path, damage):
    import torch
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(adapter, tmp_path / "broken")
    path = broken / "adapter_model.safetensors"
    says = "cannot read"
    if damage == "none":
        path.unlink()
        says = "has no adapter_model.safetensors"
    elif damage == "integers":
        save_file({name: weight.to(torch.int8) for name, weight in load_file(path).items()}, path)
        says = "holds integers"
    elif damage == "nothing in it":
        save_file({}, path)
        says = "its weights are not whole"
    else:
        path.write_bytes(path.read_bytes()[: 500 if damage == "cut" else 0])
    base = {"model_name_or_path": str(made("llama")), "lora_rank": ...}
    assert says in refused("dpo", adapter_name_or_path=str(broken), **base)


def test_a_folder_that_is_no_adapter_is_said_with_the_one_in_it(refused, made, adapter, tmp_path):
    base = {"model_name_or_path": str(made("llama")), "lora_rank": ...}
    (tmp_path / "empty").mkdir()
    said = refused("dpo", adapter_name_or_path=str(tmp_path / "empty"), **base)
    assert "is no PEFT adapter (it has no adapter_config.json)" in said
    assert refused("dpo", adapter_name_or_path=str(adapter.parent), **base).endswith(f"; {adapter} is one")


@pytest.mark.parametrize(
    ("model_type", "sizes", "says"),
    [
        ("llama", {"hidden_size": 64}, "q_proj.lora_A.weight is (4, 32) in its files, and (4, 64) by"),
        ("llama", {"num_hidden_layers": 3}, "lacks base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"),
        ("gpt2", {}, "not found in the base model"),
    ],
)
def test_an_adapter_of_another_architecture_is_refused(refused, made, adapter, model_type, sizes, says):
    base = made(model_type, **sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = refused("dpo", model_name_or_path=str(base), adapter_name_or_path=str(adapter), lora_rank=...)
    assert says in said


def test_another_base_of_the_same_shape_is_said(command, made, adapter):
    base = made("llama", initializer_range=0.03)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        status, said, _ = command(
            "dpo", model_name_or_path=str(base), adapter_name_or_path=str(adapter), lora_rank=..., max_steps=1
        )
    assert status == 0
    assert f"adapter {adapter} was trained on {made('llama')}, by its own word, and goes on on {base}" in said


# --- what a base or an adapter brings along


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"lora_rank": 8}, "lora_rank: 8, and the adapter ADAPTER has 4: write 4, or leave lora_rank out"),
        ({"lora_alpha": 16}, "lora_alpha: 16, and the adapter ADAPTER has 8: write 8, or leave lora_alpha out"),
        ({"lora_dropout": 0}, "lora_dropout: 0.0, and the adapter ADAPTER has 0.1: write 0.1, or leave"),
        ({"lora_target": "all"}, "lora_target: all, and the adapter ADAPTER has no part for model.layers.0.mlp.down"),
        ({"lora_target": "q_proj"}, "lora_target: q_proj, and the adapter ADAPTER has a part for model.layers.0.self"),
    ],
)
def test_a_setting_that_contradicts_the_adapter_is_refused(refused, made, adapter, asked, says):
    base = {"model_name_or_path": str(made("llama")), "adapter_name_or_path": str(adapter), "lora_rank": ...}
    assert refused("dpo", **(base | asked)).startswith(says.replace("ADAPTER", str(adapter)))


def test_what_is_not_written_is_the_adapters_and_said(command, made, adapter):
    base = {"model_name_or_path": str(made("llama")), "adapter_name_or_path": str(adapter), "max_steps": 1}
    status, said, output = command("rm", **base, lora_rank=...)
    assert (status, said) == (
        0, f"discobeta: adapter {adapter} brings along lora_rank 4, lora_alpha 8, lora_dropout 0.1"
    )  # fmt: skip
    written = yaml.safe_load((output / "config.yaml").read_text())
    assert [written[f"lora_{key}"] for key in ("rank", "alpha", "dropout", "target")] == [None] * 4
    same = {"lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.1, "lora_target": "v_proj,q_proj"}
    status, said, again = command("rm", **base, **same, name="again")
    assert (status, said) == (0, "")
    saved = [folder / "adapter" / "adapter_model.safetensors" for folder in (output, again)]
    assert saved[0].read_bytes() == saved[1].read_bytes()


def test_defaults_of_lora_are_written_down_where_there_is_no_adapter(settings):
    from discobeta.design.config import RunConfig

    given = {key: value for key, value in settings("rm").items() if key != "lora_rank"}
    for more in ({}, {"lora_rank": None, "lora_dropout": None, "lora_target": None}):
        resolved = RunConfig.from_mapping(given | more)[0].resolved()
        assert [resolved[f"lora_{key}"] for key in ("rank", "alpha", "dropout", "target")] == [8, None, 0.0, "all"]


def changed(base: Path, target: Path, **settings) -> Path:
    shutil.copytree(base, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return target


def test_what_a_config_asks_a_pass_to_return_is_set_aside(run, made, tmp_path):
    base = made("llama")
    talkative = {"return_dict": False, "output_attentions": True, "output_hidden_states": True}
    other = changed(base, tmp_path / "other", **talkative)
    first, second = (run("dpo", name=f"run-{path.name}", model_name_or_path=str(path)) for path in (base, other))
    assert losses(first) == losses(second)


@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_a_model_that_sees_what_comes_later_is_refused(refused, made, tmp_path, stage):
    base = changed(made("llama"), tmp_path / "both-ways", is_causal=False)
    assert "it looks ahead" in refused(stage, model_name_or_path=str(base))


DROPPING = [
    ("gpt2", {"resid_pdrop": 0.1, "attn_pdrop": 0.1, "embd_pdrop": 0.1}),
    ("opt", {"dropout": 0.1, "attention_dropout": 0.1, "layerdrop": 0.5}),
    ("mixtral", {"attention_dropout": 0.5, "router_jitter_noise": 0.3}),
]


@pytest.mark.numeric
@pytest.mark.parametrize(("model_type", "rates"), DROPPING)
def test_the_first_loss_of_dpo_is_log_2_whatever_dropout_the_base_has(run, made, model_type, rates):
    """Of policy and reference the same network answers, so every margin is 0; 1e-6 is a few roundings in float32."""
    directory = run("dpo", model_name_or_path=str(made(model_type, **rates)), logging_steps=1, max_steps=1)
    assert losses(directory)[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("finetuning_type", ["lora", "full"])
def test_rm_trains_the_network_that_is_measured(run, made, finetuning_type):
    """The base's dropout has nothing to act on: with and without it, equal weights are trained to equal weights."""
    found = []
    for rate in (0.2, 0.0):
        rates = dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), rate)
        base = made("gpt2", **rates)
        found.append(losses(run("rm", name=f"{rate}", model_name_or_path=str(base), finetuning_type=finetuning_type)))
    assert found[0] == found[1] and len(found[0]) == 2


@pytest.mark.numeric
def test_the_adapters_dropout_stays(run, made):
    base = str(made("gpt2", resid_pdrop=0.1, attn_pdrop=0.1, embd_pdrop=0.1))
    with_it, without = (
        losses(run("dpo", name=f"{rate}", model_name_or_path=base, lora_dropout=rate, logging_steps=1, max_steps=3))
        for rate in (0.5, 0.0)
    )
    assert with_it[0] == without[0]  # B = 0: the adapter says nothing yet
    assert with_it[2] != without[2]


@pytest.mark.numeric
def test_asking_changes_nothing(run, made, monkeypatch):
    """Neither a byte of the weights nor a random number: dropout is drawn in every step."""
    from discobeta.model import preflight

    more = {"model_name_or_path": str(made("qwen3")), "lora_dropout": 0.3}
    asked = run("dpo", name="asked", **more)
    monkeypatch.setattr(preflight, "check", lambda *given: None)
    not_asked = run("dpo", name="not-asked", **more)
    for name in ("log.jsonl", "adapter/adapter_model.safetensors", "heads.json"):
        assert (asked / name).read_bytes() == (not_asked / name).read_bytes()


# --- memory


def cuda(*given):
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79 GiB")


def cpu(*given):
    import torch

    torch.empty(1 << 46)


def array(*given):
    import numpy

    numpy.empty(1 << 46)


def python(*given):
    raise MemoryError


TRAINING = "lower tokens_per_pass or cutoff_len"


@pytest.mark.parametrize(
    ("failure", "amount"),
    [(cuda, " (2.50 GiB were asked for)"), (cpu, " (281474976710656 bytes were asked for)"),
     (array, " (512. TiB were asked for)"), (python, "")],
)  # fmt: skip
def test_out_of_memory_in_training_is_one_line_and_the_checkpoint_stays(command, monkeypatch, failure, amount):
    from discobeta.method.rm import RewardModelling

    computed = RewardModelling.forward
    count = iter(range(9))
    with monkeypatch.context() as patch:
        patch.setattr(RewardModelling, "forward", lambda *given: (failure if next(count) == 2 else computed)(*given))
        status, said, output = command("rm", save_steps=1)
    assert status == 2
    assert said == f"discobeta: out of memory in training{amount}: {TRAINING}, or set gradient_checkpointing: true"
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-2.pt"]
    assert command("rm", save_steps=1)[0] == 0  # which goes on from there


def test_out_of_memory_names_the_step(command, monkeypatch, settings):
    from discobeta.inputs import reference
    from discobeta.method.dpo import DirectPreference
    from discobeta.model import generation
    from discobeta.run import evaluate

    with monkeypatch.context() as patch:
        patch.setattr(reference, "hidden_states", cpu)
        status, said, output = command("dpo")
        assert status == 2 and "out of memory in the reference pass (" in said and "lower per_device_eval" in said
        assert not output.exists()
    assert command("dpo")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(DirectPreference, "compare", cuda)
        with pytest.raises(UserError, match=r"out of memory in evaluation \(2.50 GiB .*per_device_eval_batch_size"):
            evaluate.evaluate(output)
    status, said, output = command("dpo", name="sampled", num_eval_generations=2, max_new_tokens=4)
    assert status == 0
    with monkeypatch.context() as patch:
        patch.setattr(generation, "_left_padded", python)
        with pytest.raises(UserError, match=r"out of memory in sampling: lower per_device_eval_batch_size"):
            evaluate.evaluate(output)


def test_out_of_memory_in_sft_is_one_line(command, monkeypatch):
    from trl import SFTTrainer

    monkeypatch.setattr(SFTTrainer, "training_step", cuda)
    status, said, output = command("sft")
    assert status == 2 and said.startswith("discobeta: out of memory in training (2.50 GiB were asked for): lower per_")
    assert not output.exists()


def test_out_of_memory_anywhere_else_is_one_line(command, monkeypatch):
    from discobeta.method.stage import Stage

    monkeypatch.setattr(Stage, "check_data", cpu)
    status, said, _ = command("rm")
    assert (status, said) == (2, "discobeta: out of memory (281474976710656 bytes were asked for)")


def test_out_of_memory_while_a_model_is_loaded_is_one_line(refused, made, monkeypatch):
    from transformers import AutoModelForSequenceClassification

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", lambda *given, **settings: cpu())
    base = made("llama")
    said = refused("rm", model_name_or_path=str(base))
    assert said == f"cannot load the model {base}: out of memory (281474976710656 bytes were asked for)"


def test_an_error_that_is_none_of_memory_stays_what_it_is():
    from discobeta.errors import lack_of_memory

    assert lack_of_memory(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")) is None
    assert lack_of_memory(ValueError("out of memory")) is None
