"""What must not change what a model says: padding, its side, the batch, the order of the rows."""

import json

import numpy as np
import pytest
import torch

from discobeta.data.batches import Pairs
from discobeta.data.rows import Rows
from discobeta.data.tokens import load_or_tokenise
from discobeta.design.config import RunConfig
from discobeta.design.schedule import Schedule
from discobeta.inputs.reference import compute
from discobeta.method.dpo import DirectPreference
from discobeta.method.heads import build
from discobeta.method.rm import RewardModelling
from discobeta.model.forward import hidden_states, response_logps, token_logps
from discobeta.model.pretrained import load_causal_lm, load_scorer, load_tokenizer

pytestmark = pytest.mark.numeric

INDICES = np.array([3, 0, 5, 8, 11, 2])
USED = {"add_disco_head": True, "disco_pref": True, "add_beta_head": True, "use_dynamic_beta": True}
BOTH = ("disco", "beta")


@pytest.fixture(params=["last", "mean"])
def prepared(settings, request):
    """(stage, rows, columns) of an arm that uses both heads, with weights that are not the fresh ones."""

    def make(kind):
        config, _ = RunConfig.from_mapping(settings(kind, finetuning_type="full", head_pooling=request.param, **USED))
        rows = load_or_tokenise(config, load_tokenizer(config)).train
        columns = compute(load_causal_lm(config), rows, config, torch.device("cpu"))
        if kind == "dpo":
            heads = build(BOTH, 32, 1, prompt_features=columns["prompt_features"])
            stage = DirectPreference(config, load_causal_lm(config), heads)
        else:
            model = load_scorer(config)
            heads = build(BOTH, 32, 1, score_weight=model.score.weight)
            stage = RewardModelling(config, model, heads)
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in stage.parameters():
                weight += 0.1 * torch.randn(weight.shape, generator=noise)
        return stage.eval(), rows, columns if kind == "dpo" else {}

    return make


def said(stage, batch):
    with torch.no_grad():
        comparison = stage.compare(batch)
    heads = {name: values for opinion in comparison.opinions.values() for name, values in opinion.measured.items()}
    sigma = torch.stack([heads["sigma_chosen"], heads["sigma_rejected"]], 1)
    values = {"loss": comparison.loss, "margin": comparison.mean_margin, "sigma": sigma}
    return values | ({"log_s": heads["log_s"]} if "log_s" in heads else {})


def assert_same(one, other):
    """Equal to the rounding of float32 sums, whose order depends on the shape of the batch."""
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["rm", "dpo"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("padding", [{}, {"pad_to": 49}, {"side": "left"}, {"side": "left", "pad_to": 51}])
def test_padding_and_a_shared_prompt_change_nothing(prepared, kind, shared, padding):
    stage, rows, columns = prepared(kind)
    other = Pairs(rows, columns, shared=shared).batch(INDICES, **padding)
    assert_same(said(stage, Pairs(rows, columns).batch(INDICES)), said(stage, other))


@pytest.mark.parametrize("kind", ["rm", "dpo"])
def test_the_pad_id_changes_nothing(prepared, kind):
    stage, rows, columns = prepared(kind)
    plain = Pairs(rows, columns).batch(INDICES, pad_to=30)
    real = torch.zeros_like(plain.input_ids, dtype=torch.bool)
    for row, end in enumerate(plain.response_end):
        real[row, : end % 30 + 1] = True
    other = Pairs(rows, columns).batch(INDICES, pad_to=30)
    other.input_ids = torch.where(real, plain.input_ids, 2)  # <eos> as padding, as many tokenizers have it
    assert_same(said(stage, plain), said(stage, other))


@pytest.mark.parametrize("kind", ["rm", "dpo"])
def test_batch_and_order_change_nothing(prepared, kind):
    stage, rows, columns = prepared(kind)
    whole = said(stage, Pairs(rows, columns).batch(INDICES))
    alone = [said(stage, Pairs(rows, columns).batch(INDICES[i : i + 1])) for i in range(len(INDICES))]
    assert_same(whole, {name: torch.cat([part[name] for part in alone]) for name in whole})
    order = np.array([4, 2, 0, 5, 1, 3])
    assert_same(
        {name: value[order] for name, value in whole.items()}, said(stage, Pairs(rows, columns).batch(INDICES[order]))
    )


@pytest.mark.parametrize("kind", ["rm", "dpo"])
def test_swapping_chosen_and_rejected_mirrors_everything(prepared, kind):
    stage, rows, columns = prepared(kind)
    swapped_rows = Rows(rows.prompt_ids, rows.rejected_ids, rows.chosen_ids)
    swapped_columns = dict(columns)
    if kind == "dpo":
        swapped_columns["reference_logps"] = columns["reference_logps"].flip(1)
    one, other = (
        said(stage, Pairs(rows, columns).batch(INDICES)),
        said(stage, Pairs(swapped_rows, swapped_columns).batch(INDICES)),
    )
    torch.testing.assert_close(one["margin"], -other["margin"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one["sigma"], other["sigma"].flip(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((-one["loss"]).exp() + (-other["loss"]).exp(), torch.ones(6), rtol=1e-5, atol=1e-5)


def test_response_logps_are_the_models_own(settings):
    """Against the plain definition: log_softmax of the full logits, one response at a time."""
    config, _ = RunConfig.from_mapping(settings("dpo"))
    rows = load_or_tokenise(config, load_tokenizer(config)).train
    model = load_causal_lm(config)
    batch = Pairs(rows).batch(INDICES)
    with torch.no_grad():
        found = response_logps(model, hidden_states(model, batch), batch)
        for place, index in enumerate(INDICES):
            for side, responses in enumerate((rows.chosen_ids, rows.rejected_ids)):
                prompt, response = rows.prompt_ids[index].tolist(), responses[index].tolist()
                logps = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
                expected = sum(logps[len(prompt) - 1 + i, token].item() for i, token in enumerate(response))
                assert found[side * 6 + place].item() == pytest.approx(expected, abs=1e-4)


def test_logits_in_chunks_give_the_same_gradient(settings, monkeypatch):
    config, _ = RunConfig.from_mapping(settings("dpo", finetuning_type="full"))
    rows = load_or_tokenise(config, load_tokenizer(config)).train
    batch, gradients = Pairs(rows).batch(INDICES), []
    for tokens in (10_000, 7):
        model = load_causal_lm(config)
        vocabulary = model.get_output_embeddings().weight.shape[0]
        monkeypatch.setattr("discobeta.model.forward.LOGITS_AT_ONCE", tokens * vocabulary)
        response_logps(model, hidden_states(model, batch), batch).sum().backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_the_prompt_ends_where_it_ends():
    """Positions by length: a prompt that holds the pad id 0 and a response that ends in it."""
    rows = Rows([[5, 0, 7], [5]], [[0, 8, 0], [9, 9]], [[8], [0]])
    batch = Pairs(rows).batch(np.array([0, 1]))
    assert batch.prompt_end.tolist() == [2, 6, 14, 18] and batch.response_end.tolist() == [5, 8, 15, 19]
    assert batch.target_ids.tolist() == [0, 8, 0, 9, 9, 8, 0]
    assert batch.predictor_index.tolist() == [2, 3, 4, 6, 7, 14, 18]
    assert batch.sequence_index.tolist() == [0, 0, 0, 1, 1, 2, 3]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_an_epoch_visits_each_row_once_whatever_the_processes(processes):
    schedule = Schedule(rows=50, rows_per_step=12, processes=processes, seed=1)
    lengths = np.arange(50) % 13
    seen = []
    for step in range(schedule.steps_per_epoch):
        shares = [schedule.share(schedule.step_rows(step), lengths, process) for process in range(processes)]
        assert len(set(map(len, shares))) == 1
        seen += np.concatenate(shares).tolist()
    assert len(seen) == len(set(seen)) == 50 - 50 % processes
    assert sorted(schedule.step_rows(0)) != sorted(schedule.step_rows(schedule.steps_per_epoch))  # another epoch


def test_two_processes_share_the_rows_of_one_and_have_much_the_same_to_do():
    one = Schedule(rows=40, rows_per_step=16, processes=1, seed=1)
    two = Schedule(rows=40, rows_per_step=16, processes=2, seed=1)
    lengths = np.random.default_rng(0).integers(1, 30, 40)
    for step in range(2):
        shares = [two.share(two.step_rows(step), lengths, process) for process in (0, 1)]
        assert sorted(np.concatenate(shares)) == sorted(one.step_rows(step))
        assert abs(lengths[shares[0]].sum() - lengths[shares[1]].sum()) <= lengths.max()


USED = {"add_disco_head": True, "disco_pref": True, "add_beta_head": True, "use_dynamic_beta": True}


@pytest.mark.parametrize("tokens", [100, 1])
@pytest.mark.parametrize("stage, flags", [("rm", {}), ("rm", USED), ("dpo", {}), ("dpo", USED)])
def test_cutting_a_step_into_passes_leaves_the_run_the_same(run, stage, flags, tokens):
    """8 pairs per step in one pass, in several, or each alone: the same losses and weights, to rounding."""
    from safetensors.torch import load_file

    every = {"max_steps": 12, "logging_steps": 1, "per_device_train_batch_size": 8, **flags}
    whole = run(stage, name="whole", **every)
    parts = run(stage, name="parts", tokens_per_pass=tokens, **every)
    logs = [[json.loads(line) for line in (path / "log.jsonl").open()] for path in (whole, parts)]
    assert len(logs[0]) == 12
    for one, other in zip(*logs, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5), one["step"]
    for name in ("adapter/adapter_model.safetensors", "heads.safetensors"):
        one, other = (load_file(path / name) for path in (whole, parts))
        # AdamW's first steps are lr * sign(gradient): compare far below the learning rate of 1e-3
        for weight, value in one.items():
            torch.testing.assert_close(other[weight], value, rtol=0, atol=5e-5, msg=weight)
    if flags:
        assert abs(logs[0][-1]["log_sigma"]) > 1e-4  # the head says something


def test_what_a_shell_says_to_accelerate_changes_nothing(run, monkeypatch):
    """It would divide every gradient by 4, before it is clipped."""
    changes = {"max_steps": 3, "logging_steps": 1, "max_grad_norm": 0.5}
    plain = run("dpo", name="plain", **changes)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    other = run("dpo", name="other", **changes)
    for name in ("log.jsonl", "adapter/adapter_model.safetensors"):
        assert (plain / name).read_bytes() == (other / name).read_bytes()


def test_schedules_are_transformers_own_and_warm_up_that_never_ends_is_said(run, capsys):
    """Polynomial from 1e-3 to 1e-7 in 4 steps: what is left is 3/4, 1/2, 1/4 of the way. Warm-up of 9: k/9."""
    short = {"max_steps": 4, "logging_steps": 1, "learning_rate": 1e-3}
    found = run("dpo", name="a", lr_scheduler_type="polynomial", **short)
    rates = [json.loads(line)["learning_rate"] for line in (found / "log.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([1e-3, *(1e-7 + left * (1e-3 - 1e-7) for left in (0.75, 0.5, 0.25))], rel=1e-12)
    assert "are warm-up" not in capsys.readouterr().out
    found = run("dpo", name="b", warmup_steps=9, **short)
    rates = [json.loads(line)["learning_rate"] for line in (found / "log.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([0, 1e-3 / 9, 2e-3 / 9, 3e-3 / 9], rel=1e-12)
    assert "all 4 steps are warm-up: the learning rate never reaches 0.001" in capsys.readouterr().out


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropies_are_those_of_the_whole_distribution(settings, temperature):
    """Against the plain definition, from transformers' own logits, one response at a time."""
    config, _ = RunConfig.from_mapping(settings("dpo"))
    rows, model = load_or_tokenise(config, load_tokenizer(config)).train, load_causal_lm(config)
    batch, expected = Pairs(rows).batch(INDICES), []
    with torch.no_grad():
        _, found = token_logps(model, hidden_states(model, batch), batch, temperature, with_entropy=True)
        for responses in (rows.chosen_ids, rows.rejected_ids):
            for index in INDICES:
                prompt, response = rows.prompt_ids[index].tolist(), responses[index].tolist()
                p = (model(torch.tensor([prompt + response])).logits[0] / temperature).softmax(-1)
                expected.append(-(p * p.log()).sum(-1)[len(prompt) - 1 : -1])
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)
