"""Reward models of other makes, and ours in plain transformers: the same weights give the same score."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import WORDS, write_rows
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

import discobeta
from discobeta.data.batches import Pairs, pack
from discobeta.data.tokens import load_or_tokenise
from discobeta.design.config import RunConfig
from discobeta.errors import UserError
from discobeta.method.ppo import ProximalPolicy
from discobeta.method.stage import stage_class
from discobeta.run import load as runs
from discobeta.run.evaluate import evaluate

pytestmark = pytest.mark.numeric

PAD, EOS, DOT = 0, 2, 17
PROMPTS = [np.array(ids, np.int32) for ids in ([4, 6, 5], [4, 7, 8, 6, 5], [4, 8, 5], [4, 6, 6, 5])]
RESPONSES = [np.array(ids, np.int32) for ids in ([9, 17, 2], [13, 2], [2], [10, 0, 11, 17])]
"""Ended, ended at once, and cut; one holds a <pad> among its words."""


def with_padding(base: Path, folder: Path, pad: int | None) -> Path:
    """The base with another pad_token_id in its config."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text()) | {"pad_token_id": pad}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tokens() -> list[torch.Tensor]:
    return [torch.tensor(np.concatenate(pair)).long() for pair in zip(PROMPTS, RESPONSES, strict=True)]


def logits_of(model, pad: int | None) -> dict[str, torch.Tensor]:
    """(N,) of the texts above by the model's own class: each alone, and padded to the right and to the left."""
    model, ids = (
        model.eval(),
        [torch.tensor(np.concatenate(pair)).long() for pair in zip(PROMPTS, RESPONSES, strict=True)],
    )
    found = {}
    with torch.no_grad():
        found["alone"] = torch.cat([model(row[None], attention_mask=torch.ones(1, len(row))).logits for row in ids])
        if pad is not None and pad >= 0:
            for side in ("right", "left"):
                padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad, padding_side=side)
                ones = [torch.ones(len(row)).long() for row in ids]
                mask = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side=side)
                places = (mask.cumsum(1) - 1).clamp(min=0)
                found[side] = model(padded, attention_mask=mask, position_ids=places).logits
    return {name: values.squeeze(-1) for name, values in found.items()}


def check_same(judge, expected: dict[str, torch.Tensor]) -> None:
    scores, _ = judge.score_ids(PROMPTS, RESPONSES, 4)
    assert expected["alone"].std() > 0.1
    for name, values in expected.items():
        torch.testing.assert_close(scores, values, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


# --- where a score is read


@pytest.mark.parametrize("pad", [PAD, EOS, DOT, None, -1])
def test_a_classifier_scores_as_its_own_class_does(base, tmp_path, pad):
    folder = with_padding(base, tmp_path / "base", pad)
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    check_same(discobeta.load_reward_model(folder), logits_of(model, pad))


FAMILIES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "opt": {"hidden_size": 32, "word_embed_proj_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "ffn_dim": 32, "max_position_embeddings": 64},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gpt_neox": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "llama": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "gemma2": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
               "head_dim": 16, "intermediate_size": 64},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pad", [PAD, EOS])
def test_classifiers_of_all_families_do(base, tmp_path, family, pad):
    shutil.copytree(base, tmp_path / "base")
    torch.manual_seed(2)
    config = AutoConfig.for_model(
        family,
        vocab_size=len(WORDS),
        pad_token_id=pad,
        bos_token_id=1,
        eos_token_id=EOS,
        num_labels=1,
        **FAMILIES[family],
    )
    model = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path / "base")
    own = logits_of(model, pad) if family != "bloom" else {"alone": logits_of_bloom(model)}
    if family in ("gpt2", "opt"):  # absolute positions, which these classes count by themselves
        own = {"alone": own["alone"], "right": own["right"]}
    check_same(discobeta.load_reward_model(tmp_path / "base"), own)


def logits_of_bloom(model):
    """It takes no position ids."""
    with torch.no_grad():
        return torch.cat([model.eval()(row[None]).logits for row in tokens()]).squeeze(-1)


def test_a_class_that_scores_otherwise_is_refused(base, tmp_path, monkeypatch):
    from transformers import Qwen3ForSequenceClassification

    forward = Qwen3ForSequenceClassification.forward

    def halved(self, *args, **kwargs):
        found = forward(self, *args, **kwargs)
        found.logits = found.logits / 2
        return found

    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(tmp_path / "base")
    shutil.copytree(base, tmp_path / "base", dirs_exist_ok=True, ignore=lambda *_: ["model.safetensors", "config.json"])
    monkeypatch.setattr(Qwen3ForSequenceClassification, "forward", halved)
    with pytest.raises(UserError, match="does not score the last token's state"):
        discobeta.load_reward_model(tmp_path / "base")


@pytest.mark.parametrize("pad", [PAD, EOS, None])
@pytest.mark.parametrize("disco", [{}, {"add_disco_head": True, "disco_pref": True}])
@pytest.mark.parametrize("finetuning", ["lora", "full"])
def test_our_reward_model_scores_the_same_in_plain_transformers(base, run, tmp_path, pad, disco, finetuning):
    folder = with_padding(base, tmp_path / "base", pad)
    directory = run("rm", model_name_or_path=str(folder), finetuning_type=finetuning, learning_rate=1e-2, **disco)
    if finetuning == "lora":
        plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        plain = PeftModel.from_pretrained(plain, directory / "adapter")
    else:
        plain = AutoModelForSequenceClassification.from_pretrained(directory / "model")
    check_same(discobeta.load_reward_model(directory), logits_of(plain, pad))


def test_an_adapter_is_read_at_the_padding_of_its_own_tokenizer_where_the_base_names_none(base, tmp_path):
    """TRL takes the tokenizer's <pad>, or else its <eos>, for the model's, and saves it with the adapter."""
    folder = with_padding(base, tmp_path / "base", None)
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    model.config.pad_token_id = EOS
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], init_lora_weights=False))
    torch.nn.init.normal_(model.get_base_model().score.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "<eos>"
    tokenizer.save_pretrained(tmp_path / "adapter")
    check_same(discobeta.load_reward_model(tmp_path / "adapter"), logits_of(model, EOS))


# --- value heads


def lora_with_value_head(base: Path, folder: Path):
    """A LoRA of a language model as LLaMA-Factory leaves it, but for the value head: (model, head)."""
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_pretrained(base)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=False)
    model = get_peft_model(model, lora)
    model.save_pretrained(folder)
    return model.eval(), fresh_head(model.config.hidden_size)


def fresh_head(size: int) -> dict[str, torch.Tensor]:
    return {"v_head.summary.weight": torch.randn(1, size), "v_head.summary.bias": torch.tensor([0.75])}


def values_of(model, head) -> dict[str, torch.Tensor]:
    """LLaMA-Factory's `get_rewards`: the value head on hidden_states[-1], at attention_mask.sum() - 1, right padded."""
    ids = tokens()
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=EOS)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)).long() for row in ids], batch_first=True)
    with torch.no_grad():
        states = model(padded, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        values = torch.nn.functional.linear(states, head["v_head.summary.weight"], head["v_head.summary.bias"])
    return {"alone": values.squeeze(-1).gather(1, mask.sum(1, keepdim=True) - 1).squeeze(-1)}


def to_bin(path: Path, name: str) -> None:
    torch.save(load_file(path), path.with_name(name))
    path.unlink()


@pytest.mark.parametrize("pad", [PAD, EOS])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_lora_of_llama_factory_scores_as_there(base, tmp_path, pad, form):
    """Its rm output directory, and a checkpoint in it with the Trainer's files beside the weights."""
    folder = tmp_path / "saves" / "checkpoint-45"
    model, head = lora_with_value_head(with_padding(base, tmp_path / "base", pad), folder)
    save_file(head, folder / "value_head.safetensors", metadata={"format": "pt"})
    if form == "bin":
        to_bin(folder / "value_head.safetensors", "value_head.bin")
        to_bin(folder / "adapter_model.safetensors", "adapter_model.bin")
    torch.save({"lr": 1e-4}, folder / "training_args.bin")
    torch.save({"state": {}}, folder / "optimizer.pt")
    (folder / "trainer_state.json").write_text('{"global_step": 45}')
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    check_same(discobeta.load_reward_model(folder), values_of(model, head))


@pytest.mark.parametrize("form", ["plain", "sharded", "bin", "inside", "inside bin", "prefixed"])
def test_a_whole_model_with_a_value_head_scores_as_there(base, tmp_path, form):
    """As LLaMA-Factory saves it, and as TRL does: one state dict with the head in it."""
    folder = with_padding(base, tmp_path / "base", EOS)
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    head = fresh_head(model.config.hidden_size)
    path = folder / "model.safetensors"
    path.unlink()
    model.save_pretrained(folder, max_shard_size="20KB" if form == "sharded" else "1GB")
    if form in ("plain", "sharded", "bin"):
        save_file(head, folder / "value_head.safetensors")
    else:
        prefix = "pretrained_model." if form == "prefixed" else ""
        tensors = {f"{prefix}{name}": tensor for name, tensor in load_file(path).items()} | head
        save_file(tensors, path, metadata={"format": "pt"})
    if "bin" in form:
        to_bin(path, "pytorch_model.bin")
    assert path.exists() == (form not in ("bin", "inside bin", "sharded"))
    check_same(discobeta.load_reward_model(folder), values_of(model, head))


WEIGHT, BIAS = "v_head.summary.weight", "v_head.summary.bias"


@pytest.mark.parametrize(
    ("head", "says"),
    [
        ({WEIGHT: torch.ones(1, 32)}, "holds v_head.summary.weight instead of v_head.summary.weight and v_head.summ"),
        ({"value.weight": torch.ones(1, 32)}, "holds no weight of one instead of"),
        ({WEIGHT: torch.ones(1, 16), BIAS: torch.zeros(1)}, r"is \(1, 16\) \+ \(1,\), and this model needs \(1, 32\)"),
        ({WEIGHT: torch.ones(2, 32), BIAS: torch.zeros(2)}, r"is \(2, 32\) \+ \(2,\), and this model needs \(1, 32\)"),
        ({WEIGHT: torch.full((1, 32), torch.nan), BIAS: torch.zeros(1)}, "v_head.summary.weight .*not finite"),
        ({WEIGHT: torch.ones(1, 32), BIAS: torch.tensor([torch.inf])}, "v_head.summary.bias .*not finite"),
        ({WEIGHT: torch.ones(1, 32, dtype=torch.int8), BIAS: torch.zeros(1)}, "v_head.summary.weight .*are integers"),
        (b"no tensors", r"value_head\.bin is damaged, or holds more"),
        ([torch.ones(1, 32)], r"value_head\.bin is damaged, or holds more than a model's weights"),
        (None, "has no `score` and no value head"),
    ],
)
def test_a_value_head_of_another_form_is_refused(base, tmp_path, head, says):
    lora_with_value_head(base, tmp_path / "saves")
    path = tmp_path / "saves" / "value_head.bin"
    if isinstance(head, bytes):
        path.write_bytes(head)
    elif head is not None:
        torch.save(head, path)
    with pytest.raises(UserError, match=says) as refused:
        discobeta.load_reward_model(tmp_path / "saves")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


class Runs:
    """Pickled as a call, which whoever unpickles it makes."""

    def __reduce__(self):
        return (Path.touch, (Path("unpickled"),))


@pytest.mark.parametrize("name", ["value_head.bin", "adapter_model.bin"])
def test_no_code_is_run_that_stands_in_a_bin_file(base, tmp_path, monkeypatch, name):
    lora_with_value_head(base, tmp_path / "saves")
    (tmp_path / "saves" / "adapter_model.safetensors").unlink(missing_ok=name != "adapter_model.bin")
    torch.save({WEIGHT: Runs()}, tmp_path / "saves" / name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"{name} is damaged, or holds more than"):
        discobeta.load_reward_model(tmp_path / "saves")
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("key", ["adapter_name_or_path", "model_name_or_path"])
def test_a_reward_model_starts_from_a_value_head(base, settings, tmp_path, key, is_there):
    """Its score is the value, but for a constant."""
    if key == "adapter_name_or_path":
        model, head = lora_with_value_head(base, tmp_path / "saves")
    else:
        model = AutoModelForCausalLM.from_pretrained(shutil.copytree(base, tmp_path / "saves")).eval()
        head = fresh_head(model.config.hidden_size)
    if is_there:
        save_file(head, tmp_path / "saves" / "value_head.safetensors")
    config, _ = RunConfig.from_mapping(settings("rm", **{key: str(tmp_path / "saves")}, lora_rank=2))
    stage = stage_class("rm").fresh(config, {}).eval()
    with torch.no_grad():
        found = stage.rewards(pack(PROMPTS[:3], RESPONSES[:3]))[0] + 0.75
    expected = values_of(model, head)["alone"][:3]
    assert torch.allclose(found, expected, atol=1e-4) == is_there


def test_a_classifier_saved_as_bin_is_read_checked_and_hashed(base, tmp_path):
    folder = with_padding(base, tmp_path / "base", EOS)
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    to_bin(folder / "model.safetensors", "pytorch_model.bin")
    judge = discobeta.load_reward_model(folder)
    check_same(judge, logits_of(model, EOS))
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save(tensors | {"score.weight": tensors["score.weight"] + 1}, folder / "pytorch_model.bin")
    assert discobeta.load_reward_model(folder).fingerprint != judge.fingerprint
    torch.save(tensors | {"model.norm.weight": tensors["model.norm.weight"].int()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.norm\.weight holds integers"):
        discobeta.load_reward_model(folder)
    torch.save(tensors | {"score.weight": tensors["score.weight"] * torch.nan}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"score\.weight holds numbers that are not finite"):
        discobeta.load_reward_model(folder)


def test_the_base_of_an_adapter_counts_as_a_part_of_the_judge(base, tmp_path):
    folder = with_padding(base, tmp_path / "base", PAD)
    _, head = lora_with_value_head(folder, tmp_path / "saves")
    save_file(head, tmp_path / "saves" / "value_head.safetensors")
    before = discobeta.load_reward_model(tmp_path / "saves").fingerprint
    assert discobeta.load_reward_model(tmp_path / "saves").fingerprint == before
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] * 2}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    assert discobeta.load_reward_model(tmp_path / "saves").fingerprint != before


# --- what is there in place of what is not


def test_a_checkpoint_that_is_not_there_names_the_run_that_is(base, run, settings, tmp_path):
    ours = run("rm", name="rm")
    lora_with_value_head(base, tmp_path / "saves")
    lora_with_value_head(base, tmp_path / "kept" / "checkpoint-100")
    lora_with_value_head(base, tmp_path / "kept" / "checkpoint-90")

    def refused(stage, **changes):
        with pytest.raises(UserError) as error:
            run(stage, name="refused", **changes)
        return str(error.value)

    for name, instead in (
        ("rm", ours), ("saves", tmp_path / "saves"), ("kept", tmp_path / "kept" / "checkpoint-100"),
    ):  # fmt: skip
        missing = tmp_path / name / "checkpoint-45"
        said = f"reward_model: there is no directory {missing}; there is {instead}"
        assert refused("ppo", reward_model=str(missing)) == said
    missing = ours / "checkpoint-45"
    assert refused("dpo", adapter_name_or_path=str(missing)).endswith(f"{missing}; there is {ours / 'adapter'}")
    missing = tmp_path / "saves" / "checkpoint-45"
    assert refused("dpo", adapter_name_or_path=str(missing)).endswith(f"{missing}; there is {tmp_path / 'saves'}")


def test_a_run_starts_from_an_adapter_saved_as_bin(base, run, tmp_path):
    lora_with_value_head(base, tmp_path / "saves")
    start = {"adapter_name_or_path": str(tmp_path / "saves"), "lora_rank": 2}
    first = run("dpo", name="first", **start)
    to_bin(tmp_path / "saves" / "adapter_model.safetensors", "adapter_model.bin")
    second = run("dpo", name="second", **start)
    name = "adapter/adapter_model.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()
    tensors = torch.load(tmp_path / "saves" / "adapter_model.bin", weights_only=True)
    torch.save({key: value * torch.nan for key, value in tensors.items()}, tmp_path / "saves" / "adapter_model.bin")
    with pytest.raises(UserError, match="not finite"):
        run("dpo", name="third", **start)


# --- in ppo

PPO = {"max_new_tokens": 6, "max_steps": 2, "num_eval_generations": 6, "per_device_train_batch_size": 8}


def test_ppo_takes_a_reward_model_of_llama_factory(base, run, tmp_path):
    model, head = lora_with_value_head(base, tmp_path / "saves")
    save_file(head, tmp_path / "saves" / "value_head.safetensors")
    directory = run("ppo", reward_model=str(tmp_path / "saves"), **PPO)
    evaluate(directory)
    rows = [json.loads(line) for line in (directory / "generations.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    for row in rows:
        words = f"{row['prompt']} {row['response']}".split() + ["<eos>"] * row["ended"]
        ids = torch.tensor([[WORDS.index(word) for word in words]])
        with torch.no_grad():
            state = model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
        assert row["reward"] == pytest.approx((state @ head[WEIGHT][0] + head[BIAS][0]).item(), abs=1e-4)
    save_file(head | {BIAS: torch.ones(1)}, tmp_path / "saves" / "value_head.safetensors")
    with pytest.raises(UserError, match="reward_model"):
        evaluate(directory)


def test_the_critic_starts_as_the_value_head(base, settings, tmp_path):
    """With its bias: V before a token is the value of the text so far."""
    model, head = lora_with_value_head(base, tmp_path / "saves")
    save_file(head, tmp_path / "saves" / "value_head.safetensors")
    config, _ = RunConfig.from_mapping(
        settings("ppo", reward_model=str(tmp_path / "saves"), ppo_score_norm=False, **PPO)
    )
    stage = ProximalPolicy.fresh(config, {}, given=runs.given(config))
    values = stage.eval().judge(PROMPTS[:1], [np.array([9, 10, 2], np.int32)])["values"][0]
    with torch.no_grad():
        states = model(torch.tensor([[4, 6, 5, 9, 10]]), output_hidden_states=True).hidden_states[-1][0, 2:]
    torch.testing.assert_close(values, states @ head[WEIGHT][0] + head[BIAS], rtol=1e-4, atol=1e-4)


# --- a judge with another tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<u> {{ m.content }} <a> "
    "{% else %}{{ m.content }} <end> {% endif %}{% endfor %}"
)
OTHER = [*reversed(WORDS), "<u>", "<a>", "<end>"]


def word_tokenizer(words: list[str], template: str | None = None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    more = [word for word in ("<u>", "<a>", "<end>") if word in words]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, additional_special_tokens=more, **special
    )


def other_judge(folder: Path, words: list[str], template: str | None = None):
    """A classifier of another width on a tokenizer of its own."""
    config = AutoConfig.for_model("llama", num_labels=1, vocab_size=len(words), hidden_size=16, num_hidden_layers=1,
                                  num_attention_heads=2, intermediate_size=16, pad_token_id=words.index("<pad>"),
                                  max_position_embeddings=64)  # fmt: skip
    torch.manual_seed(6)
    model = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.normal_(model.score.weight)
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    model.save_pretrained(folder)
    word_tokenizer(words, template).save_pretrained(folder)
    return model.eval()


@pytest.fixture
def talking(base, tmp_path):
    """The base with a chat template, and conversations."""
    shutil.copytree(base, tmp_path / "talking")
    template = "{% for m in messages %}{% if m.role == 'user' %}user {{ m.content }} assistant {% else %}{{ m.content }} {% endif %}{% endfor %}"  # noqa: E501
    word_tokenizer(WORDS, template).save_pretrained(tmp_path / "talking")
    asked = ["red", "red blue", "green", "blue green red", "green green", "blue"]
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in asked]
    return {"model_name_or_path": str(tmp_path / "talking"), "eval_dataset": None,
            "dataset": str(write_rows(tmp_path / "talks.jsonl", rows)), "per_device_train_batch_size": 6}  # fmt: skip


def measured(directory: Path) -> list[dict]:
    evaluate(directory)
    return [json.loads(line) for line in (directory / "generations.jsonl").read_text().splitlines()]


def check_rewards(rows: list[dict], model, words_of) -> None:
    """words_of(prompt, response, ended): what the judge should have read."""
    found, expected = [], []
    for row in rows:
        ids = [[OTHER.index(word) for word in words_of(row["prompt"], row["response"], row["ended"])]]
        with torch.no_grad():
            expected.append(model(torch.tensor(ids)).logits.item())
        found.append(row["reward"])
    assert np.std(expected) > 0.1 and len({row["ended"] for row in rows}) == 2
    np.testing.assert_allclose(found, expected, atol=1e-4)


MORE = PPO | {"max_new_tokens": 12}


def test_a_judge_with_a_template_of_its_own_reads_conversations_in_it(run, talking, tmp_path):
    model = other_judge(tmp_path / "judge", OTHER, TEMPLATE)

    def words_of(prompt, response, ended):
        return ["<u>", *prompt.split()[1:-1], "<a>", *response.split(), *["<end>"] * ended]

    rows = measured(run("ppo", reward_model=str(tmp_path / "judge"), **(MORE | talking)))
    check_rewards(rows, model, words_of)


def test_a_judge_with_another_tokenizer_reads_texts_anew(run, tmp_path):
    model = other_judge(tmp_path / "judge", OTHER)

    def words_of(prompt, response, ended):
        return [*prompt.split(), *response.split(), *["<eos>"] * ended]

    check_rewards(measured(run("ppo", reward_model=str(tmp_path / "judge"), **MORE)), model, words_of)


def test_prompts_of_ones_own_are_judged_anew_as_held_out_ones_are(run, tmp_path):
    """No row of the run's data is one's own prompt."""
    from discobeta.run.samples import samples

    model = other_judge(tmp_path / "judge", OTHER)
    directory = run("ppo", reward_model=str(tmp_path / "judge"), **MORE)
    held_out = samples(directory, count=2, settings={"temperature": 0.9})["rows"]
    own = samples(directory, [{"prompt": "user green green red blue assistant"}])["rows"]
    assert len(held_out) == 2 and len(own) == 1
    for one in [*held_out, *own]:
        for side in ("", "reference_"):
            words = f"{one['prompt']} {one[f'{side}response']}".split() + ["<eos>"] * (one[f"{side}length"] < 12)
            with torch.no_grad():
                expected = model(
                    torch.tensor(
                        [
                            [OTHER.index(word) for word in words if word != "<eos>"]
                            + [OTHER.index("<eos>")] * ("<eos>" in words)
                        ]
                    )
                ).logits.item()
            assert one[f"{side}reward"] == pytest.approx(expected, abs=1e-4)


def test_a_rollout_is_judged_in_the_judges_tokens_and_valued_in_the_policys(settings, talking, tmp_path):
    model = other_judge(tmp_path / "judge", OTHER, TEMPLATE)
    config, _ = RunConfig.from_mapping(
        settings("ppo", reward_model=str(tmp_path / "judge"), ppo_score_norm=True, **(MORE | talking))
    )
    stage = ProximalPolicy.fresh(config, {}, given=runs.given(config)).eval()
    prompts = [np.array(ids, np.int32) for ids in ([4, 6, 5], [4, 6, 8, 5], [4, 7, 5])]
    responses = [np.array(ids, np.int32) for ids in ([9, 10, 17, 2], [11], [2])]
    said = stage.judge(prompts, responses)
    read = ["<u> red <a> one two . <end>", "<u> red blue <a> three", "<u> green <a> <end>"]
    with torch.no_grad():
        expected = [model(torch.tensor([[OTHER.index(word) for word in text.split()]])).logits.item() for text in read]
        states = stage.reference(torch.tensor([[4, 6, 5, 9, 10, 17]]), output_hidden_states=True).hidden_states[-1][
            0, 2:
        ]
    np.testing.assert_allclose([score.item() for score in said["scores"]], expected, atol=1e-4)
    torch.testing.assert_close(said["states"][0], states, rtol=1e-4, atol=1e-4)
    assert all((values == 0).all() for values in said["values"])
    rows = Pairs(load_or_tokenise(config, stage.tokenizer).train)
    rollouts = stage.collect(0, rows, stage.schedule(rows, 1), Accelerator()).material
    assert stage.score_scale[0] != 0 and all((values == 0).all() for values in rollouts.columns["values"])


def test_a_judge_whose_tokenizer_has_more_tokens_reads_the_policys_ids(run, tmp_path):
    words = [*WORDS, "<u>", "<a>", "<end>"]
    model = other_judge(tmp_path / "judge", words)
    for row in measured(run("ppo", reward_model=str(tmp_path / "judge"), **PPO)):
        ids = [words.index(word) for word in f"{row['prompt']} {row['response']}".split() + ["<eos>"] * row["ended"]]
        with torch.no_grad():
            assert row["reward"] == pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-4)


def test_a_judge_that_cannot_be_given_the_prompts_is_refused(run, talking, tmp_path):
    refuses = TEMPLATE + "{% if 'blue' in messages[0].content %}{{ raise_exception('no blue') }}{% endif %}"
    other_judge(tmp_path / "judge", OTHER, refuses)
    with pytest.raises(UserError, match=r"for reward_model .*3 of 6 rows are unusable") as refused:
        run("ppo", reward_model=str(tmp_path / "judge"), **(PPO | talking))
    assert "no blue" in str(refused.value)
    other_judge(tmp_path / "other", OTHER, TEMPLATE)
    tokens = {"tokenized_path": str(tmp_path / "tokens")}
    run("ppo", name="first", reward_model=str(tmp_path / "other"), **(PPO | talking | tokens))
    with pytest.raises(UserError, match="has another tokenizer than .*: name their dataset"):
        run("ppo", name="second", reward_model=str(tmp_path / "other"), **(PPO | talking | tokens | {"dataset": None}))
