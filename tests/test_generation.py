"""Sampling: a response is a function of model, prompt and uniforms, and follows the model's distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest

from discobeta.errors import UserError
from discobeta.inputs.world import build_tokenizer

pytestmark = pytest.mark.numeric

PROMPTS = [[4, first, second, 5] for first in range(6, 13) for second in (7, 9, 14, 16)]


@pytest.fixture(scope="module")
def model(base):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(base)
    network.lm_head.weight.data.mul_(6)  # a fresh model is nearly uniform, which hides most mistakes
    return network.eval(), AutoTokenizer.from_pretrained(base)


def sample(model, tokenizer, prompts, max_new_tokens=12, **options):
    from discobeta.model.generation import generate
    from discobeta.seeds import uniforms

    draws = uniforms(1, "test", shape=(len(prompts), max_new_tokens))
    return generate(model, tokenizer, prompts, draws, **options)


def test_responses_end_with_the_first_eos_or_at_the_limit(model):
    network, tokenizer = model
    responses = sample(network, tokenizer, [[4, 6, 5]] * 400, max_new_tokens=30)
    eos = tokenizer.eos_token_id
    assert all(eos not in response[:-1] for response in responses)
    assert all(response[-1] == eos or len(response) == 30 for response in responses)
    assert {len(response) == 30 for response in responses} == {True, False}  # both kinds are there
    assert all(response.dtype == np.int32 for response in responses)


def test_samples_follow_the_models_distribution_whatever_the_padding(model):
    """First tokens of one prompt, sampled beside a longer prompt: their frequencies are softmax(logits)."""
    import torch

    network, tokenizer = model
    prompt = [4, 12, 5]
    with torch.no_grad():
        expected = network(torch.tensor([prompt])).logits[0, -1].double().softmax(-1).numpy()
    both = [prompt, [4, 6, 7, 8, 9, 10, 5]] * 4000
    responses = sample(
        network, tokenizer, both, max_new_tokens=1, batch_size=8000
    )  # one batch, so the short are padded
    firsts = [response[0] for response in responses]
    found = np.bincount(firsts[::2], minlength=len(expected)) / 4000
    chi_square = 4000 * ((found - expected) ** 2 / expected).sum()
    degrees = len(expected) - 1
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)


def test_a_models_own_sampling_options_are_set_aside_and_kept(model):
    network, tokenizer = model
    plain = sample(network, tokenizer, PROMPTS)
    own = network.generation_config
    try:
        network.generation_config.repetition_penalty = 50.0
        network.generation_config.min_p = 0.5
        network.train()
        assert all(map(np.array_equal, sample(network, tokenizer, PROMPTS), plain))
        assert network.training and network.generation_config is own and own.repetition_penalty == 50.0
    finally:
        own.repetition_penalty = own.min_p = None
        network.eval()


def test_top_k_of_one_is_greedy(model):
    import torch

    network, tokenizer = model
    with torch.no_grad():
        best = network(torch.tensor(PROMPTS)).logits[:, -1].argmax(-1).tolist()
    assert [response[0] for response in sample(network, tokenizer, PROMPTS, top_k=1, max_new_tokens=1)] == best


@pytest.mark.parametrize(
    "u, options, token",
    [
        # p = .5 .3 .15 .05 for tokens 2 0 3 1; F over token ids: 0 -> .3, 1 -> .35, 2 -> .85, 3 -> 1
        (0.0, {}, 0), (0.299, {}, 0), (0.301, {}, 1), (0.349, {}, 1), (0.351, {}, 2), (0.851, {}, 3), (0.9999, {}, 3),
        # sorted and cut at top_k = 2: tokens 2, 0 with .625, .375
        (0.624, {"top_k": 2}, 2), (0.626, {"top_k": 2}, 0), (0.9999, {"top_k": 2}, 0),
        # the fewest tokens that hold .6: 2, 0; that hold .4: 2 alone; that hold .81: 2, 0, 3 with .526, .316, .158
        (0.624, {"top_p": 0.6}, 2), (0.626, {"top_p": 0.6}, 0), (0.9999, {"top_p": 0.4}, 2),
        (0.9999, {"top_p": 0.495}, 2), (0.9999, {"top_p": 0.505}, 0),  # .5 is enough for .495, and not for .505
        (0.525, {"top_p": 0.81}, 2), (0.841, {"top_p": 0.81}, 0), (0.843, {"top_p": 0.81}, 3),
        # at temperature 1/2 probabilities are .25 .09 .0225 .0025 over .365: F: .2466, .2534, .9384, 1
        (0.246, {"temperature": 0.5}, 0), (0.247, {"temperature": 0.5}, 1), (0.254, {"temperature": 0.5}, 2),
        (0.938, {"temperature": 0.5}, 2), (0.939, {"temperature": 0.5}, 3),
    ],
)  # fmt: skip
def test_the_draw_by_hand(u, options, token):
    import torch

    from discobeta.model.generation import InverseCDF

    settings = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} | options
    sampler = InverseCDF(np.array([[0.5, u]]), prompt_width=3, **settings)
    logits = torch.tensor([[0.3, 0.05, 0.5, 0.15]]).log() + 7
    left = sampler(torch.zeros(1, 4, dtype=torch.long), logits)  # one token was generated before
    assert left.isfinite().nonzero().tolist() == [[0, token]]


def test_a_token_without_probability_is_never_drawn():
    import torch

    from discobeta.model.generation import InverseCDF

    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    for u, token in ((0.0, 1), (0.4999, 1), (0.5, 3), (1 - 2**-53, 3)):
        left = InverseCDF(np.array([[u]]), 1, 1.0, 1.0, 0)(torch.zeros(1, 1, dtype=torch.long), logits)
        assert left.isfinite().nonzero().tolist() == [[0, token]]


def test_a_response_does_not_depend_on_its_batch(model):
    """Alone, in another order, in other batches, beside longer prompts: the same response to the same uniforms."""
    from discobeta.model.generation import generate
    from discobeta.seeds import uniforms

    network, tokenizer = model
    prompts = [[4, *range(6, 6 + size), 5] for size in (1, 3, 7, 2, 9, 4)] * 3
    draws = uniforms(3, "test", shape=(len(prompts), 10))
    together = generate(network, tokenizer, prompts, draws)
    backwards = generate(network, tokenizer, prompts[::-1], draws[::-1].copy(), batch_size=4)[::-1]
    alone = [generate(network, tokenizer, [prompt], draw[None])[0] for prompt, draw in zip(prompts, draws, strict=True)]
    assert all(map(np.array_equal, together, backwards)) and all(map(np.array_equal, together, alone))
    assert not all(map(np.array_equal, together[:6], together[6:12]))  # the same prompts, other uniforms


def test_a_prompt_that_leaves_no_room_is_refused(model):
    network, tokenizer = model  # context: 64 tokens
    assert len(sample(network, tokenizer, [[4] * 60], max_new_tokens=4)) == 1
    with pytest.raises(UserError, match="prompt of 61 tokens and max_new_tokens: 4 do not fit into the context of 64"):
        sample(network, tokenizer, [[4], [4] * 61], max_new_tokens=4)


def test_an_adapter_takes_part(model):
    """LoRA that adds nothing samples what the base samples; one that adds something does not."""
    import copy

    from peft import LoraConfig, get_peft_model

    network, tokenizer = copy.deepcopy(model[0]), model[1]
    plain = sample(network, tokenizer, PROMPTS)
    adapted = get_peft_model(network, LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj", "down_proj"]))
    assert all(map(np.array_equal, sample(adapted, tokenizer, PROMPTS), plain))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.fill_(1.0)
    changed = sample(adapted.train(), tokenizer, PROMPTS)
    assert not all(map(np.array_equal, changed, plain))
    assert all(map(np.array_equal, sample(adapted.eval(), tokenizer, PROMPTS), changed))  # no dropout in either mode
    with adapted.disable_adapter():
        assert all(map(np.array_equal, sample(adapted, tokenizer, PROMPTS), plain))


def test_response_text_drops_the_last_eos_and_nothing_else():
    from discobeta.model.generation import response_text

    tokenizer = build_tokenizer()
    ids = tokenizer("use <pad> basil <unk> . <eos>")["input_ids"]
    assert response_text(tokenizer, np.array(ids)) == "use <pad> basil <unk> ."
    assert response_text(tokenizer, np.array(ids[:-1])) == "use <pad> basil <unk> ."
    assert response_text(tokenizer, np.array([], np.int32)) == ""


@pytest.mark.parametrize("options", [{"top_p": 1.0, "top_k": 0}, {"top_p": 0.9, "top_k": 5}])
def test_logits_that_are_no_numbers_give_some_token(options):
    """A policy that has diverged is reported by training, and not by an index that is out of range."""
    import torch

    from discobeta.model.generation import InverseCDF

    logits, draws = torch.full((3, 20), torch.nan), np.array([[0.0], [0.5], [0.999]])
    left = InverseCDF(draws, 2, temperature=1.0, **options)(torch.zeros(3, 2, dtype=torch.long), logits)
    assert (left == 0).sum(1).tolist() == [1, 1, 1] and left.isneginf().sum(1).tolist() == [19, 19, 19]


def test_a_padding_token_that_the_model_lacks_pads_nothing_else(model):
    import copy

    network, tokenizer = model
    expected = sample(network, tokenizer, PROMPTS[:3] + [[4, 5]])
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"pad_token": "<another pad>"})
    assert other.pad_token_id == network.get_input_embeddings().num_embeddings
    for one, two in zip(expected, sample(network, other, PROMPTS[:3] + [[4, 5]]), strict=True):
        assert one.tolist() == two.tolist()


def test_a_tokenizer_without_an_end_leaves_it_to_the_model_or_is_refused(model):
    import copy

    network, tokenizer = model
    expected = sample(network, tokenizer, PROMPTS[:3])
    other = copy.deepcopy(tokenizer)
    other.eos_token = other.pad_token = None
    assert network.generation_config.eos_token_id == tokenizer.eos_token_id
    for one, two in zip(expected, sample(network, other, PROMPTS[:3]), strict=True):
        assert one.tolist() == two.tolist()
    silent = copy.deepcopy(network)
    silent.generation_config.eos_token_id = None
    with pytest.raises(UserError, match="has no end-of-sequence token"):
        sample(silent, other, PROMPTS[:3])


def test_what_closes_a_training_response_stops_generation(model):
    """A chat template that closes a turn with another token than <eos>, as base models with <|im_end|> have it."""
    import copy

    from discobeta.model.generation import has_ended, response_text, stop_ids

    network, tokenizer = model[0], copy.deepcopy(model[1])
    eos, end = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("?")
    assert stop_ids(network, tokenizer) == [eos]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }}{% if m.role == 'assistant' %} ? {% else %} {% endif %}"
        "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    )
    stops = stop_ids(network, tokenizer)
    assert stops == sorted([eos, end])
    responses = sample(network, tokenizer, PROMPTS * 8, max_new_tokens=30)
    assert {int(response[-1]) for response in responses if len(response) < 30} == {eos, end}
    assert not any(end in response[:-1] or eos in response[:-1] for response in responses)
    closed = next(response for response in responses if response[-1] == end)
    assert has_ended(closed, stops) and "?" not in response_text(tokenizer, closed)
    before = np.append(closed[:-1], eos)
    assert response_text(tokenizer, closed) == response_text(tokenizer, before) != ""


def test_whether_prompts_may_be_padded_is_tried_in_the_precision_of_the_weights(base):
    """Under autocast two kernels may differ by bfloat16's rounding, which is no reason to sample by length."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network, seen = AutoModelForCausalLM.from_pretrained(base).eval(), []
    network.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        sample(network, AutoTokenizer.from_pretrained(base), PROMPTS, max_new_tokens=3)
    assert seen[:2] == [False, False] and len(seen) > 2 and all(seen[2:])  # the trial's two passes, then the sampling's
