"""The peak of a GPU's memory that is worked out ahead, against bytes counted by hand and what a pass must keep."""

import gc
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig

from discobeta import cli
from discobeta.data.batches import cut
from discobeta.design.config import RunConfig
from discobeta.design.study import Study
from discobeta.model import kernels
from discobeta.run import memory

LAYERS, WIDTH, MIDDLE, WORDS, RANK = 2, 32, 64, 19, 4  # of the base of conftest.py; 4 heads of 8, 2 of keys and values


def config_of(base, stage="dpo", **changes):
    settings = {
        "stage": stage, "model_name_or_path": str(base), "bf16": True, "lora_rank": RANK, "cutoff_len": 64,
        "per_device_train_batch_size": 8, "per_device_eval_batch_size": 2,
    }  # fmt: skip
    return RunConfig.from_mapping(settings | ({"reward_model": "x"} if stage == "ppo" else {}) | changes)[0]


def peaks(base, stage="dpo", **changes):
    gc.collect()
    return memory.peaks(config_of(base, stage, **changes), AutoConfig.from_pretrained(base))


def blocks(size):
    """What CUDA's allocator gives for `size` bytes."""
    return -(-size // 512) * 512


def linears():
    """(out, in) of the linear layers of one block."""
    return [(32, WIDTH), (16, WIDTH), (16, WIDTH), (WIDTH, 32), (MIDDLE, WIDTH), (MIDDLE, WIDTH), (WIDTH, MIDDLE)]


def test_weights_gradients_and_states_are_those_counted_by_hand(base):
    """The frozen base once in bf16, and of each adapter weight four float32: itself, its gradient, AdamW's two."""
    in_block = [out * inner for out, inner in linears()] + [WIDTH, WIDTH, 8, 8]  # norms: two, and one each of q and k
    frozen = [WORDS * WIDTH, *in_block * LAYERS, WIDTH]
    adapter = [size for out, inner in linears() for size in (RANK * inner, out * RANK)] * LAYERS
    rotary = 2 * blocks(4 * 4)  # 4 frequencies, and those it began with
    steps = len(adapter) * blocks(4)  # AdamW counts the steps of each weight
    expected = sum(blocks(2 * size) for size in frozen) + 4 * sum(blocks(4 * size) for size in adapter) + rotary
    assert expected <= peaks(base)["weights"] <= expected + steps


def test_all_weights_are_trained_in_float32(base):
    in_block = [out * inner for out, inner in linears()] + [WIDTH, WIDTH, 8, 8]
    weights = [WORDS * WIDTH, *in_block * LAYERS, WIDTH]
    expected = 4 * sum(blocks(4 * size) for size in weights) + 2 * blocks(4 * 4)
    found = peaks(base, finetuning_type="full")["weights"]
    assert expected <= found <= expected + len(weights) * blocks(4)


@pytest.mark.parametrize("stage", ["dpo", "rm", "ppo"])
def test_a_pass_of_more_tokens_needs_more_and_checkpointing_less(base, stage):
    short, long = (peaks(base, stage, cutoff_len=length)["training"] for length in (32, 64))
    again = peaks(base, stage, cutoff_len=64, gradient_checkpointing=True)["training"]
    weights = peaks(base, stage)["weights"]
    assert weights < again < long and weights < short < long


@pytest.mark.parametrize("stage", ["dpo", "rm", "ppo"])
def test_the_pass_is_the_fullest_that_there_can_be(base, stage):
    """Against every length that rows may have, cut as a step cuts them: the most tokens of a first pass."""
    for share, budget, cutoff, step in [(True, 256, 48, 8), (True, 256, 129, 8), (False, 256, 80, 8), (True, 64, 48, 8),
                                        (True, 4096, 48, 3), (True, 256, 48, 1)]:  # fmt: skip
        config = config_of(
            base, stage, cutoff_len=cutoff, per_device_train_batch_size=step, tokens_per_pass=budget,
            share_prompt=share, max_new_tokens=8,
        )  # fmt: skip
        if stage == "ppo":
            rows = range(9, cutoff + 8 + 1)
        else:
            rows = range(3, 2 * cutoff) if share else range(4, 2 * cutoff + 1, 2)
        most = max(row * len(cut(np.arange(step), np.full(step, row), budget)[0]) for row in rows)
        made = memory.shell(config, AutoConfig.from_pretrained(base))
        found = memory.first_pass(made, config).input_ids.numel()
        assert most - 2 * step < found <= most  # two equal responses of a row may leave a token of it free


def test_a_card_that_suffices_for_longer_rows_suffices_for_shorter_ones(base):
    """A little above half of the budget a pass holds one row of the longest, or two of the second longest."""
    found = [
        peaks(base, cutoff_len=length, tokens_per_pass=256, per_device_train_batch_size=8)["training"]
        for length in (40, 60, 64, 66, 90, 127, 129, 200)
    ]
    assert all(shorter <= 1.06 * longer for shorter, longer in pairwise(found)), found  # one token in 40 may be left


def test_a_norm_is_one_kernel_that_keeps_what_it_is_given(base):
    """Of n states of width 32 in bf16: the result, and a float32 a row; not the float32 copies of a plain norm."""
    norm = memory.shell(config_of(base), AutoConfig.from_pretrained(base)).model.get_base_model().model.norm
    assert type(norm).__mro__[1] is kernels.FusedNorm
    with memory.counting() as peak:
        memory.materialise(norm)
        states = torch.zeros(4096, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        before = peak.live
        given = norm(states)
        assert peak.live - before == 4096 * (2 * WIDTH + 4) and given.dtype == torch.bfloat16
        given.sum().backward()
        assert states.grad.shape == states.shape


@pytest.mark.parametrize("rule", ["learned", "mallows", "batch"])
def test_a_rule_of_beta_needs_a_few_numbers_more(base, rule):
    fixed, ruled = peaks(base), peaks(base, beta_rule=rule)
    assert fixed.keys() == ruled.keys() and all(0 <= ruled[name] - fixed[name] < 2**14 for name in fixed)


def test_a_pass_keeps_at_least_what_its_layers_need_in_backward(base):
    """Of each token and layer, in bf16: the inputs of three groups of linear layers (two norms' outputs, the product of
    the gate), q, k, v and what attention gives; and no (T, T) weights, which would be more than all of it."""
    length, pairs = 32, 16
    found = peaks(base, cutoff_len=length, per_device_train_batch_size=pairs)
    tokens = pairs * (2 * length - 1)  # the prompt is one token, once for both
    least = tokens * LAYERS * 2 * (WIDTH + WIDTH + MIDDLE + 32 + 16 + 16 + 32)
    assert found["training"] - found["weights"] > least
    longer = peaks(base, cutoff_len=4 * length, per_device_train_batch_size=pairs // 4)
    growth = (longer["training"] - longer["weights"]) / (found["training"] - found["weights"])
    assert 0.8 < growth < 1.4  # as many tokens in sequences four times as long; (T, T) weights would be 4 times as many


def test_sampling_holds_keys_and_values_of_every_response(base):
    """8 x per_device_eval_batch_size responses; keys and values of 2 heads of 8 in bf16, of each token and layer."""
    found = [peaks(base, num_eval_generations=16, max_new_tokens=new)["sampling"] for new in (1000, 2000)]
    assert found[1] - found[0] == 1000 * 16 * LAYERS * 2 * 2 * 8 * 2
    assert "sampling" not in peaks(base, num_eval_generations=0)
    assert "sampling" in peaks(base, "ppo", num_eval_generations=0)


def test_nothing_of_it_stays(base):
    attention = torch.nn.functional.scaled_dot_product_attention
    peaks(base)
    assert torch.nn.functional.scaled_dot_product_attention is attention
    assert torch.zeros(1).item() == 0


STUDY = """
study: s
stages: [dpo, rm]
arms: [baseline, disco-used_beta-used]
data: {{dataset: a.jsonl, eval_dataset: b.jsonl, cutoff_len: 64}}
base: {{model_name_or_path: {base}}}
common: {{max_steps: 4, bf16: true}}
dpo: {{num_eval_generations: 0}}
"""


@pytest.mark.parametrize(("size", "verdict"), [("2GB", "fits 2 GB"), ("900MB", "does not fit"), (None, None)])
def test_cost_says_whether_a_card_suffices(base, size, verdict, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(STUDY.format(base=base))
    assert cli.main(["cost", "--configfile", "study.yaml", "--memory", *([size] if size else [])]) == 0
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith(("  dpo:", "  rm:"))]
    assert len(lines) == 2 and all("training" in line for line in lines)
    assert all((verdict or "training") in line for line in lines)
    assert "fit" in text if size else "fit" not in text


def test_a_stage_that_cannot_be_worked_out_is_a_line_of_its_own(tmp_path, monkeypatch, capfd):
    """torch has no shapes of products of groups of matrices in float32: Mixtral's experts, trained as a whole."""
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    MixtralConfig(**shape, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4).save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    study = STUDY.format(base=tmp_path).replace("bf16: true}", "bf16: true, finetuning_type: full}")
    (tmp_path / "study.yaml").write_text(study)
    assert cli.main(["cost", "--configfile", "study.yaml", "--memory", "2GB"]) == 0
    said, complaint = capfd.readouterr()
    assert "  dpo: cannot be worked out: " in said and "  rm: cannot be worked out: " in said
    assert "Traceback" not in complaint


def test_no_more_is_sampled_at_once_than_at_all(base):
    """Keys and values of a response to each of 16 prompts, or of 8 x per_device_eval_batch_size; ppo's of an update, or
    of the first 256, whose scores are standardised."""
    of_one = 1000 * LAYERS * 2 * 2 * 8 * 2  # bytes of 1,000 tokens, as in the test above

    def grown(stage, **changes):
        found = [peaks(base, stage, max_new_tokens=new, **changes)["sampling"] for new in (1000, 2000)]
        return (found[1] - found[0]) / of_one

    assert grown("dpo", num_eval_generations=16, generations_per_prompt=3, per_device_eval_batch_size=4) == 16
    assert grown("dpo", num_eval_generations=300, per_device_eval_batch_size=4) == 32
    small = {"per_device_train_batch_size": 8, "ppo_buffer_size": 2, "per_device_eval_batch_size": 64}
    assert grown("ppo", num_eval_generations=0, ppo_score_norm=False, **small) == 16
    assert grown("ppo", num_eval_generations=0, ppo_score_norm=True, **small) == 256


def test_what_is_there_beside_the_policy(base):
    """A finished policy has no optimiser, and whole weights a whole reference beside them; ppo a reference and each of
    its reward models: an adapter, or whole too."""
    of_models = [{"reward_model": models, "ppo_score_norm": True} for models in ("a", "a,b,c")]
    one, three = (peaks(base, "ppo", finetuning_type="full", **models)["weights"] for models in of_models)
    in_block = [out * inner for out, inner in linears()] + [WIDTH, WIDTH, 8, 8]
    whole = sum(blocks(4 * size) for size in [WORDS * WIDTH, *in_block * LAYERS, WIDTH]) + 2 * blocks(4 * 4)
    assert three - one == 2 * whole
    adapter = sum(blocks(4 * size) for out, inner in linears() for size in (RANK * inner, out * RANK)) * LAYERS
    lora = [peaks(base, "ppo", **models)["weights"] for models in of_models]
    assert 0 < lora[1] - lora[0] <= 2 * adapter
    few = {"num_eval_generations": 1, "max_new_tokens": 1, "cutoff_len": 8, "finetuning_type": "full"}
    assert peaks(base, **few)["sampling"] < peaks(base, **few)["weights"]  # twice the weights, and not four times


@pytest.mark.parametrize("size", ["24XB", "many", "-3GB", "0GB", "GB", "24", "٢٤GB"])
def test_a_size_that_is_none_is_refused_in_a_line(base, size, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(STUDY.format(base=base))
    assert cli.main(["cost", "--configfile", "study.yaml", f"--memory={size}"]) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1 and "24GB or 80GiB" in message and size in message


def test_the_shipped_studies_base_need_not_be_there(monkeypatch, tmp_path, capsys):
    """Qwen3-0.6B has 596,049,920 weights, by its model card and files; a LoRA run in bf16 holds two bytes of each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    settings = STUDY.format(base="Qwen/Qwen3-0.6B").replace("stages: [dpo, rm]", "stages: [rm]")
    (tmp_path / "study.yaml").write_text(settings)
    study = Study.read(["study.yaml"], [])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(memory.architecture_of(study))
    assert sum(weight.numel() for weight in model.parameters()) == 596_049_920
    assert cli.main(["cost", "--configfile", "study.yaml", "--memory"]) == 0
    weights = float(capsys.readouterr().out.split("of which weights and optimiser ")[1].split(")")[0])
    assert 1.19 < weights < 1.4


def test_a_base_that_is_not_there_is_refused_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(STUDY.format(base="nobody/no-such-model"))
    assert cli.main(["cost", "--configfile", "study.yaml", "--memory"]) == 2
    assert "nobody/no-such-model" in capsys.readouterr().err.splitlines()[-1]


def test_what_does_not_fit_is_given_a_cure(base):
    """A card between what the run needs and what it would need with smaller passes."""
    config, architecture = config_of(base), AutoConfig.from_pretrained(base)
    need = peaks(base)["training"]
    less = peaks(base, gradient_checkpointing=True)["training"]
    share, size = memory.RESERVED
    card = (0.3 * need + 0.7 * less) * (1 + share) + size
    (advice,) = memory.advice_for("training", config, architecture, card)
    assert "would" in advice and ("tokens_per_pass" in advice or "gradient_checkpointing: true" in advice)
    (advice,) = memory.advice_for("training", config, architecture, 10.0)
    assert "lower cutoff_len" in advice
