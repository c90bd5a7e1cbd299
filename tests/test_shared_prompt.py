"""Two responses behind one prompt, and passes by tokens: what a batch holds, and that models say the same of it."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from discobeta.data.batches import Pairs, cut, pack
from discobeta.data.rows import Rows
from discobeta.design.config import RunConfig
from discobeta.errors import UserError
from discobeta.model.attention import mask_of, window_of
from discobeta.model.forward import hidden_states, pooled, response_logps, score_place, state_at
from discobeta.model.layout import obeys_masks, pairs_for, why_apart

SIZES = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
CAN = {
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "llama": GROUPED,
    "gemma": GROUPED,
    "gpt2": {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3},
}
CANNOT = {
    "bloom": {"vocab_size": 40, "hidden_size": 32, "n_layer": 2, "n_head": 4},  # ALiBi: distances in the row
    "mamba": {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},  # a state over all tokens
    "rwkv": {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
}
NO_IDS = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}


def model_of(kind, settings, attention="sdpa", auto=AutoModelForCausalLM, **more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **settings, **{**NO_IDS, **more})
    return auto.from_config(config, attn_implementation=attention).eval()


@pytest.fixture
def rows():
    draw = np.random.default_rng(0)

    def ids(least, most):
        return [draw.integers(1, 40, draw.integers(least, most)) for _ in range(9)]

    return Rows(ids(2, 12), ids(1, 10), ids(1, 14))


def said_by(model, pairs):
    """(2B,) log-probabilities and their gradient with respect to every weight."""
    model.zero_grad()
    batch = pairs.batch(np.arange(len(pairs)))
    logps = response_logps(model, hidden_states(model, batch), batch)
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return logps.detach(), {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}


@pytest.mark.numeric
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", CAN)
def test_log_probabilities_and_gradients_are_those_of_the_plain_form(rows, kind, attention):
    model = model_of(kind, CAN[kind], attention)
    assert why_apart(model, 25) is None
    plain, gradients = said_by(model, Pairs(rows))
    shared, of_shared = said_by(model, Pairs(rows, shared=True))
    torch.testing.assert_close(shared, plain, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == of_shared.keys() and len(gradients) > 10
    for name, gradient in gradients.items():
        assert (of_shared[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


LONG_AND_SHORT = Rows([[5, 6, 7, 8], [5]], [[9, 10, 11, 12, 13, 14], [8]], [[14, 13, 12, 11, 10, 9], [4]])
"""Sequences of 10 and of 2 tokens; in a shared pass the second is 3 of 16 and the rest is padding."""


def test_padding_has_no_position_that_no_token_has():
    batch = Pairs(LONG_AND_SHORT, shared=True).batch(np.arange(2))
    assert batch.position_ids[0].tolist() == [*range(10), *range(4, 10)]
    assert batch.position_ids[1].tolist() == [0, 1, 1, *range(2, 10), *[9] * 5]


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gpt2", CAN["gpt2"] | {"n_positions": 10}),  # an index beyond the table
        ("qwen3", CAN["qwen3"] | {"max_position_embeddings": 10, "rope_parameters":
                                  {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}),  # other angles for all
    ],
)  # fmt: skip
def test_a_pass_that_is_wider_than_the_context_reads_rows_that_fit(kind, settings):
    model = model_of(kind, settings)
    plain, gradients = said_by(model, Pairs(LONG_AND_SHORT))
    shared, of_shared = said_by(model, Pairs(LONG_AND_SHORT, shared=True))
    torch.testing.assert_close(shared, plain, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        assert (of_shared[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_a_mask_that_leaks_would_be_seen(rows, monkeypatch):
    """The rejected response after the chosen one, without a mask of ours: other log-probabilities."""
    model = model_of("qwen3", CAN["qwen3"])
    plain, _ = said_by(model, Pairs(rows))
    monkeypatch.setattr("discobeta.model.forward.mask_of", lambda model, batch: None)
    leaking, _ = said_by(model, Pairs(rows, shared=True))
    assert (leaking - plain)[:9].abs().max() < 1e-4 < 0.1 < (leaking - plain)[9:].abs().max()


@pytest.mark.numeric
@pytest.mark.parametrize("kind", CANNOT)
def test_a_model_that_computes_something_else_is_found_out(rows, kind):
    model = model_of(kind, CANNOT[kind], "eager")
    assert not obeys_masks(model)
    assert "other states" in why_apart(model, 25)
    config, _ = RunConfig.from_mapping({"stage": "dpo", "model_name_or_path": "-"})
    assert not pairs_for(model, config, rows).shared


def test_a_window_counts_where_rows_are_longer():
    model = model_of("mistral", {**GROUPED, "sliding_window": 16})
    assert window_of(model.config) == 16
    assert why_apart(model, 16) is None and "16 tokens back" in why_apart(model, 17)
    layers = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 12}
    assert window_of(AutoConfig.for_model("gemma2", **{**GROUPED, **layers})) == 12
    for kind in CAN:  # some configs hold a window that no layer has, or the number of layers that have one
        assert window_of(model_of(kind, CAN[kind]).config) is None
    assert window_of(AutoConfig.for_model("qwen2", sliding_window=8, use_sliding_window=False)) is None
    gpt_neo = {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4, "window_size": 4}
    assert window_of(AutoConfig.for_model("gpt_neo", hidden_size=32, vocab_size=40, **gpt_neo)) == 4


def test_a_window_is_kept_in_the_plain_form(rows):
    """Mistral's: rows of more than 6 tokens would see another past behind another response."""
    model = model_of("mistral", {**GROUPED, "sliding_window": 6})
    config, _ = RunConfig.from_mapping({"stage": "dpo", "model_name_or_path": "-"})
    assert not pairs_for(model, config, rows).shared
    plain, _ = said_by(model, Pairs(rows))
    shared, _ = said_by(model, Pairs(rows, shared=True))
    assert (shared - plain).abs().max() > 0.01


def test_flash_attention_takes_no_mask():
    model = model_of("llama", CAN["llama"])
    model.config._attn_implementation = "flash_attention_2"
    assert why_apart(model, 8) == "flash_attention_2 takes no mask"


def test_share_prompt_switches_off(rows):
    model = model_of("llama", CAN["llama"])
    for share in (True, False):
        config, _ = RunConfig.from_mapping({"stage": "rm", "model_name_or_path": "-", "share_prompt": share})
        assert pairs_for(model, config, rows).shared is share


@pytest.mark.parametrize("training", [True, False])
def test_asking_leaves_mode_and_random_stream(training):
    model = model_of("gpt2", CAN["gpt2"]).train(training)
    model.transformer.h[0].eval()
    before, modes = torch.get_rng_state(), [part.training for part in model.modules()]
    assert obeys_masks(model)
    assert torch.equal(torch.get_rng_state(), before) and [part.training for part in model.modules()] == modes


def test_where_everything_lies_in_a_shared_row():
    """Two pairs by hand: prompts of 3 and 1 tokens, chosen of 2 and 1, rejected of 1 and 3."""
    rows = Rows([[5, 6, 7], [5]], [[8, 9], [8]], [[4], [1, 2, 3]])
    batch = Pairs(rows, shared=True).batch(np.array([0, 1]))
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 4], [5, 8, 1, 2, 3, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 1, 2, 3, 4]]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 1, 1, 2], [0, 1, 2, 2, 2, 2]]
    assert batch.attention_mask is None
    assert batch.prompt_end.tolist() == [2, 6, 2, 6]  # chosen, chosen, rejected, rejected
    assert batch.response_end.tolist() == [4, 7, 5, 10]
    assert batch.response_lengths.tolist() == [2, 1, 1, 3]
    assert batch.target_index.tolist() == [3, 4, 7, 5, 8, 9, 10]
    assert batch.target_ids.tolist() == [8, 9, 8, 4, 1, 2, 3]
    assert batch.predictor_index.tolist() == [2, 3, 6, 2, 6, 8, 9]
    assert batch.sequence_index.tolist() == [0, 0, 1, 2, 3, 3, 3]
    sees = mask_of(model_of("llama", CAN["llama"]), batch)[:, 0].int().tolist()
    assert sees[0] == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 1],
    ]
    left = Pairs(rows, shared=True).batch(np.array([0, 1]), side="left")
    assert left.input_ids.tolist()[1] == [0, 5, 8, 1, 2, 3] and left.position_ids.tolist()[1] == [0, 0, 1, 1, 2, 3]
    assert left.prompt_end.tolist() == [2, 7, 2, 7] and left.response_end.tolist() == [4, 8, 5, 11]
    assert mask_of(model_of("llama", CAN["llama"]), left)[1, 0].int().tolist()[5] == [0, 1, 0, 1, 1, 1]


@pytest.mark.parametrize("shared", [False, True])
def test_a_score_is_read_before_a_pad_that_ends_a_response(shared):
    """<pad> is 7: the last token of the first chosen response, all of the second rejected one, and one in a prompt."""
    rows = Rows([[5, 7, 6], [5, 7]], [[8, 9, 7], [8]], [[4], [7, 7]])
    model = model_of("llama", CAN["llama"], auto=AutoModelForSequenceClassification, pad_token_id=7)
    batch = Pairs(rows, shared=shared).batch(np.array([0, 1]))
    width = batch.input_ids.shape[1]
    places = score_place(model, batch)
    read = [(place // width, place % width) for place in places.tolist()]
    if shared:  # rows: 5 7 6 8 9 7 4 and 5 7 8 7 7
        assert read == [(0, 4), (1, 2), (0, 6), (1, 0)]
    else:
        assert read == [(0, 4), (1, 2), (2, 3), (3, 0)]


def test_pooling_means_over_the_own_response():
    states = torch.arange(2 * 6 * 3, dtype=torch.float32).view(2, 6, 3)
    batch = Pairs(Rows([[5, 6, 7], [5]], [[8, 9], [8]], [[4], [1, 2, 3]]), shared=True).batch(np.array([0, 1]))
    mean = pooled(states.bfloat16(), batch, "mean")
    assert mean.dtype == torch.float32
    expected = [states[0, 3:5].mean(0), states[1, 1], states[0, 5], states[1, 2:5].mean(0)]
    torch.testing.assert_close(mean, torch.stack(expected), rtol=0.01, atol=0)  # of bfloat16 states
    torch.testing.assert_close(state_at(states, batch.response_end)[3], states[1, 4])


def test_states_are_pooled_in_float32_under_autocast():
    batch = pack([[1, 2]], [[3] * 40])
    states = torch.full((1, 42, 2), 1 / 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert pooled(states, batch, "mean")[0, 0].item() == pytest.approx(1 / 3, rel=1e-6)  # bfloat16: to 1 in 400


def test_passes_hold_the_tokens_that_they_may():
    places = np.array([3, 10, 4, 4, 10, 25, 1])
    passes = cut(np.array([6, 5, 4, 3, 2, 1, 0]), places, 20)
    assert [part.tolist() for part in passes] == [[5], [4, 1], [3, 2, 0, 6]]  # one that is too long is alone
    assert [part.tolist() for part in cut(np.arange(7), places, None, 3)] == [[5, 1, 4], [2, 3, 0], [6]]
    assert [len(part) for part in cut(np.arange(7), places, 20, 1)] == [1] * 7
    assert cut(np.arange(0), places, 20) == []


def test_places_are_those_of_the_batch(rows):
    for shared in (False, True):
        pairs = Pairs(rows, shared=shared)
        for i in range(len(rows)):
            assert pairs.batch(np.array([i])).input_ids.numel() == pairs.places[i]


@pytest.mark.parametrize("bf16, expected", [(False, 1024), (True, 8192)])
def test_the_cut_stands_in_the_resolved_config(bf16, expected):
    config, _ = RunConfig.from_mapping({"stage": "rm", "model_name_or_path": "-", "bf16": bf16})
    assert config.resolved()["tokens_per_pass"] == expected
    config, _ = RunConfig.from_mapping({"stage": "rm", "model_name_or_path": "-", "bf16": bf16, "tokens_per_pass": 99})
    assert config.tokens_per_pass == 99
    with pytest.raises(UserError, match="tokens_per_pass"):
        RunConfig.from_mapping({"stage": "rm", "model_name_or_path": "-", "tokens_per_pass": 0})


def test_batch_and_accumulation_count_as_their_product(run):
    """LLaMA-Factory's keys: 4 x 2 is the run of 8 x 1, to the last bit."""
    every = {"max_steps": 3, "logging_steps": 1}
    one = run("dpo", name="one", per_device_train_batch_size=8, **every)
    other = run("dpo", name="other", per_device_train_batch_size=4, gradient_accumulation_steps=2, **every)
    for name in ("adapter/adapter_model.safetensors", "log.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_a_run_is_the_run_with_prompts_of_their_own(run, stage):
    from safetensors.torch import load_file

    every = {"max_steps": 8, "logging_steps": 1, "add_disco_head": True, "disco_pref": True}
    shared, apart = run(stage, name="shared", **every), run(stage, name="apart", share_prompt=False, **every)
    logs = [[json.loads(line) for line in (path / "log.jsonl").open()] for path in (shared, apart)]
    for one, other in zip(*logs, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5), one["step"]
    one, other = (load_file(path / "adapter/adapter_model.safetensors") for path in (shared, apart))
    assert any(not torch.equal(value, other[name]) for name, value in one.items())  # it is another computation
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=5e-5, msg=name)
