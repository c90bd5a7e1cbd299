"""Stage ppo: what a rollout is, what an update computes, and that it finds a known optimum."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import reseal
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Qwen3ForSequenceClassification

import discobeta
from discobeta.cli import main
from discobeta.data.batches import Pairs, pack
from discobeta.data.tokens import load_or_tokenise
from discobeta.design.config import RunConfig
from discobeta.errors import UserError
from discobeta.method.ppo import ProximalPolicy
from discobeta.model.forward import hidden_states, switch_off_dropout, token_logps
from discobeta.model.pretrained import load_tokenizer
from discobeta.run import load as runs
from discobeta.run.evaluate import evaluate
from discobeta.run.train import train

pytestmark = pytest.mark.numeric

DISCO = {"add_disco_head": True, "disco_pref": True}
LEDPO = {"add_beta_head": True, "use_dynamic_beta": True}
FILES = ("adapter/adapter_model.safetensors", "log.jsonl")


@pytest.fixture(scope="module")
def upstream(base, pairs, tmp_path_factory):
    """The runs that ppo is given: rm, with and without a Gaussian reward, and dpo with a Beta Head."""
    folder = tmp_path_factory.mktemp("upstream")
    wanted = {
        "rm": ("rm", {}), "rm-disco": ("rm", DISCO), "rm-idle": ("rm", {"add_disco_head": True}),
        "dpo": ("dpo", {}), "dpo-beta": ("dpo", LEDPO), "dpo-idle": ("dpo", {"add_beta_head": True}),
        "dpo-both": ("dpo", DISCO | LEDPO),
    }  # fmt: skip
    for name, (stage, flags) in wanted.items():
        settings = {
            "stage": stage, "model_name_or_path": str(base), "dataset": str(pairs["train"]), "cutoff_len": 32,
            "output_dir": str(folder / name), "per_device_train_batch_size": 8, "learning_rate": 1e-2,
            "max_steps": 6, "lora_rank": 4, "seed": 7, **flags,
        }  # fmt: skip
        train(RunConfig.from_mapping(settings)[0])
    return {name: folder / name for name in wanted}


@pytest.fixture
def ppo(settings, upstream):
    """ppo(**changes): the settings of a short ppo run."""

    def make(**changes) -> dict:
        ours = {
            "reward_model": str(upstream["rm"]), "max_new_tokens": 6, "logging_steps": 1, "max_steps": 3,
            "ppo_buffer_size": 2, "ppo_epochs": 2, "num_eval_generations": 8,
        }  # fmt: skip
        return settings("ppo", **(ours | changes))

    return make


@pytest.fixture
def go(ppo):
    """go(**changes): the directory of a short ppo run."""

    def run(**changes) -> Path:
        config, _ = RunConfig.from_mapping(ppo(**changes))
        train(config)
        return Path(config.output_dir)

    return run


@pytest.fixture
def started(ppo):
    """started(**changes): (stage, prompts) of a ppo run before its first update."""

    def start(**changes):
        config, _ = RunConfig.from_mapping(ppo(**changes))
        prompts = Pairs(load_or_tokenise(config, load_tokenizer(config)).train)
        return ProximalPolicy.fresh(config, {}, given=runs.given(config)), prompts

    return start


def collected(stage, prompts, step=0):
    return stage.collect(step, prompts, stage.schedule(prompts, 1), Accelerator())


def log_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def shaken(stage, scale=0.3):
    """The stage with weights that do something: policy, reference and value head say different things."""
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for group in stage.parameter_groups().values():
            for weight in group.weights:
                weight += scale * torch.randn(weight.shape, generator=noise)
    return stage


# --- rollouts


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_of_a_rollout_are_those_it_was_drawn_with(started, monkeypatch, temperature):
    """The log-probability under which generation drew each token (KV cache, left padding), against ours."""
    from discobeta.model import generation

    stage, prompts = started(temperature=temperature)
    shaken(stage)
    drawn: list[list[float]] = []
    original = generation.InverseCDF.__call__

    def recording(self, input_ids, logits):
        left = original(self, input_ids, logits)
        logps = (logits / self.temperature).log_softmax(-1)
        drawn.append(logps.gather(-1, left.argmax(-1, keepdim=True)).squeeze(-1).tolist())
        return left

    monkeypatch.setattr(generation.InverseCDF, "__call__", recording)
    rollouts = collected(stage, prompts).material
    order = sorted(range(16), key=lambda i: -len(rollouts.prompts[i]))  # the order that generation sees
    assert len(drawn) == 6 and len(rollouts.responses) == 16
    for place, i in enumerate(order):
        expected = [drawn[t][place] for t in range(len(rollouts.responses[i]))]
        torch.testing.assert_close(rollouts.columns["logps"][i], torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert len({len(ids) for ids in rollouts.prompts}) > 1  # some prompts were padded


def test_what_is_said_of_a_response_does_not_depend_on_its_batch(started):
    stage, prompts = started(per_device_eval_batch_size=16)
    shaken(stage)
    rollouts = collected(stage, prompts).material
    together = stage.judge(rollouts.prompts, rollouts.responses)
    stage.config = stage.config.replace(per_device_eval_batch_size=1)
    alone = stage.judge(rollouts.prompts[::-1], rollouts.responses[::-1])
    for name, values in together.items():
        for one, other in zip(values, list(alone[name])[::-1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)


def test_padding_on_the_left_says_the_same(started):
    stage, prompts = started()
    shaken(stage)
    rollouts = collected(stage, prompts).material
    with torch.no_grad():
        said = [
            (stage.reward.rewards(batch)[0], token_logps(stage.model, hidden_states(stage.model, batch), batch)[0])
            for batch in (
                pack(rollouts.prompts, rollouts.responses),
                pack(rollouts.prompts, rollouts.responses, side="left", pad_to=25),
            )
        ]
    for right, left in zip(*said, strict=True):
        torch.testing.assert_close(right, left, rtol=1e-4, atol=1e-5)


def test_the_cut_into_forward_passes_does_not_change_the_update(go):
    whole = go(name="whole", per_device_train_batch_size=8, learning_rate=1e-3)
    cut = go(name="cut", per_device_train_batch_size=2, gradient_accumulation_steps=4, learning_rate=1e-3)
    for one, other in zip(log_of(whole), log_of(cut), strict=True):
        for name in one:
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_update_starts_from_the_reference(started, temperature):
    """LoRA adds nothing yet, so KL is 0 and the ratio is 1."""
    stage, prompts = started(ppo_epochs=1, ppo_buffer_size=1, temperature=temperature)
    work = collected(stage, prompts)
    assert work.statistics["kl_per_sequence"].abs().max() < 1e-5
    _, found = stage(work.material.batch(np.arange(8)))
    assert found["clip_fraction"].sum() == 0 and found["approximate_kl"].abs().max() < 1e-6


@pytest.mark.parametrize("normalised", [False, True])
def test_a_value_starts_as_the_score_of_the_unfinished_response(started, normalised):
    """In the unit of the scaled scores, before each token: what the reward model says of the text so far."""
    stage, prompts = started(ppo_score_norm=normalised)
    rollouts = collected(stage, prompts).material
    mean, deviation = stage.score_scale
    assert (deviation != 1) == normalised
    for i in range(4):
        prompt, response = rollouts.prompts[i], rollouts.responses[i]
        for t in range(1, len(response)):
            so_far = stage.reward.rewards(pack([prompt], [response[:t]]))[0].item()
            assert rollouts.columns["values"][i][t].item() == pytest.approx((so_far - mean) / deviation, abs=1e-5)


# --- the buffer


def naive_buffer(stage, prompts, responses, judged):
    """The same numbers in plain Python, one response at a time. Returns (advantages, returns), whitened over all."""
    config, eos = stage.config, stage.tokenizer.eos_token_id
    mean, deviation = stage.score_scale
    rewards, advantages, returns = [], [], []
    for i, response in enumerate(responses):
        logps, reference = judged["logps"][i].tolist(), judged["reference_logps"][i].tolist()
        beta = stage.kl_coefficient * (float(judged["log_s"][i].exp()) if "log_s" in judged else 1.0)
        row = [-beta * (a - b) for a, b in zip(logps, reference, strict=True)]
        score = (float(judged["scores"][i]) - mean) / deviation
        row[-1] += score if response[-1] == eos else score - config.missing_eos_penalty
        rewards.append(row)
    if config.ppo_whiten_rewards:
        flat = np.concatenate(rewards)
        rewards = [[r / np.sqrt(flat.var(ddof=1) + 1e-8) for r in row] for row in rewards]
        shift = flat.mean() - flat.mean() / np.sqrt(flat.var(ddof=1) + 1e-8)
        rewards = [[r + shift for r in row] for row in rewards]
    for row, values in zip(rewards, judged["values"], strict=True):
        v, following, found = [*values.tolist(), 0.0], 0.0, []
        for t in reversed(range(len(row))):
            following = row[t] + config.gamma * v[t + 1] - v[t] + config.gamma * config.lam * following
            found.insert(0, following)
        advantages.append(found)
        returns.append([a + b for a, b in zip(found, v, strict=False)])
    flat = np.concatenate(advantages)
    white = [[(a - flat.mean()) / np.sqrt(flat.var(ddof=1) + 1e-8) for a in row] for row in advantages]
    return white, returns


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"missing_eos_penalty": 3.0, "gamma": 0.9, "lam": 0.5},
        {"ppo_score_norm": True, "ppo_whiten_rewards": True},
        {"pref_beta": 0.7, "beta_head": "dpo-beta", **LEDPO},
    ],
)
def test_advantages_and_returns_are_those_of_a_naive_implementation(started, upstream, changes):
    if "beta_head" in changes:
        changes = changes | {"beta_head": str(upstream[changes["beta_head"]])}
    stage, prompts = started(**changes)
    shaken(stage)
    rollouts = collected(stage, prompts).material
    judged = stage.judge(rollouts.prompts, rollouts.responses)
    advantages, returns = naive_buffer(stage, rollouts.prompts, rollouts.responses, judged)
    for name, expected in (("advantages", advantages), ("returns", returns)):
        for found, row in zip(rollouts.columns[name], expected, strict=True):
            assert found.tolist() == pytest.approx(row, rel=1e-3, abs=1e-4), name
    ended = [ids[-1] == stage.tokenizer.eos_token_id for ids in rollouts.responses]
    assert set(ended) == {True, False}  # the penalty was there to be seen


def test_a_chat_models_second_end_token_ends_a_response_too(started):
    """Chat models stop at several tokens: a response that ends with any of them pays no penalty."""
    stage, prompts = started(missing_eos_penalty=5.0, pref_beta=1e-6)
    rollouts = collected(stage, prompts).material
    judged = stage.judge(rollouts.prompts, rollouts.responses)
    last = [int(ids[-1]) for ids in rollouts.responses]
    other = next(token for token in last if token != 2)
    paid = []
    for stops in ([2], [2, other]):
        stage.model.get_base_model().generation_config.eos_token_id = stops
        _, statistics = stage.advantages(rollouts.prompts, rollouts.responses, judged)
        paid.append((statistics["reward"] - statistics["penalised_reward"] > 2.5).tolist())
    assert paid[0] == [token != 2 for token in last] and paid[1] == [token not in (2, other) for token in last]


def test_the_loss_is_that_of_a_naive_implementation(started):
    """After a change of policy and value head: clipped ratios and values, token by token, in plain Python."""
    stage, prompts = started(cliprange=0.1, cliprange_value=0.3)
    rollouts = collected(stage, prompts).material
    shaken(stage)
    changed = stage.judge(rollouts.prompts, rollouts.responses)
    mean_length = sum(map(len, rollouts.responses)) / len(rollouts.responses)
    expected, clipped = [], 0
    for i, response in enumerate(rollouts.responses):
        policy_loss = value_loss = 0.0
        for t in range(len(response)):
            old = {name: float(rollouts.columns[name][i][t]) for name in ("logps", "advantages", "values", "returns")}
            ratio, value = math.exp(changed["logps"][i][t] - old["logps"]), float(changed["values"][i][t])
            clip = min(max(ratio, 0.9), 1.1)
            clipped += clip != ratio
            policy_loss += max(-old["advantages"] * ratio, -old["advantages"] * clip)
            near = old["values"] + min(max(value - old["values"], -0.3), 0.3)
            value_loss += max((value - old["returns"]) ** 2, (near - old["returns"]) ** 2) / 2
        expected.append((policy_loss / mean_length, value_loss / mean_length))
    objective, found = stage(rollouts.batch(np.arange(16)))
    assert found["policy_loss"].tolist() == pytest.approx([policy for policy, _ in expected], rel=1e-3, abs=1e-4)
    assert found["value_loss"].tolist() == pytest.approx([value for _, value in expected], rel=1e-3, abs=1e-4)
    assert objective.tolist() == pytest.approx([sum(both) for both in expected], rel=1e-3, abs=1e-4)
    tokens = sum(map(len, rollouts.responses))
    assert 0 < clipped < tokens and found["clip_fraction"].mean().item() == pytest.approx(clipped / tokens, abs=1e-6)


def test_scores_are_standardised_by_the_references_own_responses(started):
    """Mean 0 and deviation 1 on fresh responses of the reference, to sampling error; off by default."""
    stage, prompts = started(ppo_score_norm=True, per_device_train_batch_size=128)
    scores = collected(stage, prompts).statistics["reward"]
    mean, deviation = stage.score_scale
    standard = (scores - mean) / deviation
    assert abs(standard.mean()) < 4 / 16 * 1.42 and abs(standard.std() - 1) < 0.25  # 256 responses against 256
    assert deviation != 1.0
    plain, prompts = started()
    collected(plain, prompts)
    assert plain.score_scale == (0.0, 1.0)


def test_every_prompt_is_answered_as_often_as_any_other(started):
    """Updates run through one permutation after the other without a gap."""
    stage, prompts = started()  # 40 prompts, 16 a step
    schedule = stage.schedule(prompts, 1)
    rows = np.concatenate([schedule.step_rows(step) for step in range(5)])
    assert np.bincount(rows).tolist() == [2] * 40
    assert sorted(rows[:40]) == list(range(40)) and rows[:40].tolist() != rows[40:].tolist()


def test_every_update_draws_its_own_numbers_and_the_same_ones_again(started, monkeypatch):
    from discobeta.method import ppo as module

    stage, prompts = started()
    drawn, original = [], module.generate

    def recording(model, tokenizer, prompt_ids, uniforms, **options):
        drawn.append(uniforms)
        return original(model, tokenizer, prompt_ids, uniforms, **options)

    monkeypatch.setattr(module, "generate", recording)
    for step in (0, 1, 0):
        collected(stage, prompts, step)
    assert np.array_equal(drawn[0], drawn[2])
    assert not set(drawn[0].flat) & set(drawn[1].flat)


def test_every_epoch_visits_every_response_once_in_another_order(started):
    stage, prompts = started(ppo_epochs=3, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    work = collected(stage, prompts)
    assert len(work.minibatches) == 3 * 2 and work.minibatch_rows == 8 and work.rows == 16
    epochs = [np.concatenate([np.concatenate(part) for part in work.minibatches[2 * e : 2 * e + 2]]) for e in range(3)]
    assert all(sorted(epoch) == list(range(16)) for epoch in epochs)
    assert len({tuple(sorted(np.concatenate(part))) for part in work.minibatches}) == 6


def test_the_kl_coefficient_is_steered_to_its_target(started):
    stage, prompts = started(ppo_target=1e-3, pref_beta=0.5)
    shaken(stage)  # far from the reference, so the error is clipped at .2
    collected(stage, prompts)
    assert stage.kl_coefficient == pytest.approx(0.5 * 1.02)
    stage.config = stage.config.replace(ppo_target=1e9)
    collected(stage, prompts, 1)
    assert stage.kl_coefficient == pytest.approx(0.5 * 1.02 * 0.98)
    stage.config = stage.config.replace(ppo_target=None)
    collected(stage, prompts, 2)
    assert stage.kl_coefficient == pytest.approx(0.5 * 1.02 * 0.98)


def test_frozen_weights_are_held_once(started, base):
    """Policy, reference and reward model on one base: each of its weights is there once, adapters apart."""
    stage, _ = started()
    size = sum(weight.numel() for weight in load_file(base / "model.safetensors").values())
    frozen = {w.data_ptr(): w.numel() for w in stage.parameters() if not w.requires_grad and w.numel() > 128}
    adapters = sum(w.numel() for name, w in stage.reward.model.named_parameters() if "lora" in name or "score" in name)
    assert size <= sum(frozen.values()) <= size + adapters
    trained = [w.data_ptr() for w in stage.parameters() if w.requires_grad]
    assert len(set(trained)) == len(trained) and not set(trained) & set(frozen)


# --- the arms


def test_s_of_one_everywhere_is_the_scalar_run_bit_for_bit(go, upstream, tmp_path):
    unit = tmp_path / "unit"
    shutil.copytree(upstream["dpo-beta"], unit)
    tensors = load_file(unit / "heads.safetensors")
    assert tensors["beta.weight"].abs().sum() > 0
    save_file(tensors | {"beta.weight": torch.zeros_like(tensors["beta.weight"])}, unit / "heads.safetensors")
    reseal(unit)
    scalar = go(name="scalar")
    ones = go(name="ones", beta_head=str(unit), **LEDPO)
    learned = go(name="learned", beta_head=str(upstream["dpo-beta"]), **LEDPO)
    weights = "adapter/adapter_model.safetensors"
    assert (ones / weights).read_bytes() == (scalar / weights).read_bytes() != (learned / weights).read_bytes()
    for one, other in zip(log_of(ones), log_of(scalar), strict=True):
        assert {name: one[name] for name in other} == other
        assert one["s"] == one["s_min"] == one["s_max"] == 1.0 and one["log_s"] == one["s_sd"] == 0.0


def test_the_beta_head_is_the_dpo_runs_and_stays_as_it_is(go, upstream):
    directory = go(beta_head=str(upstream["dpo-beta"]), **LEDPO)
    theirs, ours = (load_file(path / "heads.safetensors") for path in (upstream["dpo-beta"], directory))
    assert theirs.keys() == ours.keys() and all(theirs[name].equal(ours[name]) for name in theirs)
    last = log_of(directory)[-1]
    assert last["s_min"] < 1 < last["s_max"] and last["beta_eff"] == pytest.approx(0.5 * last["s"])
    assert "beta_grad_norm" not in last


def test_the_disco_state_is_the_reward_models(go, upstream, tmp_path):
    """The Gaussian reward model's mu is the reward, and not the score that its file holds for plain PEFT too."""
    directory = go(reward_model=str(upstream["rm-disco"]), **DISCO)
    assert load_file(directory / "heads.safetensors") == {}
    assert discobeta.load_policy(directory).heads.disco is None
    texts = ["user red assistant", "user green blue assistant"], ["one two .", "seven ?"]
    mean, variance = discobeta.load_reward_model(upstream["rm-disco"]).score(*texts)
    assert variance is not None and (variance > 0).all() and mean.std() > 0
    for name in ("no-score", "no-mean"):
        shutil.copytree(upstream["rm-disco"], tmp_path / name)
    _zero(tmp_path / "no-score" / "adapter" / "adapter_model.safetensors", "score")
    _zero(tmp_path / "no-mean" / "heads.safetensors", "disco.mean")
    for name in ("no-score", "no-mean"):
        reseal(tmp_path / name)
    same = go(name="same", reward_model=str(tmp_path / "no-score"), **DISCO)
    assert log_of(same)[0]["reward"] == log_of(directory)[0]["reward"]  # later ones feel where the values started
    none = go(name="none", reward_model=str(tmp_path / "no-mean"), **DISCO)
    assert {line["reward"] for line in log_of(none)} == {0.0}


def _zero(path: Path, part: str) -> None:
    weights = load_file(path)
    assert any(part in name for name in weights)
    zeroed = {name: value * 0 if part in name else value for name, value in weights.items()}
    save_file(zeroed, path, metadata={"format": "pt"})


def test_killed_and_resumed_is_never_killed(go, upstream, monkeypatch):
    """With everything that an update carries over: the adaptive coefficient and the scale of the scores."""
    settings = {
        "ppo_target": 0.05, "ppo_score_norm": True, "save_steps": 1, "max_steps": 4, "logging_steps": 3,
        "lr_scheduler_type": "cosine", "beta_head": str(upstream["dpo-beta"]), **LEDPO,
    }  # fmt: skip
    whole = go(name="whole", **settings)
    count, original = 0, torch.optim.AdamW.step

    class Killed(BaseException):
        pass

    def dying(self, *arguments, **options):
        nonlocal count
        count += 1
        if count == 11:  # four optimiser steps an update: in the middle of the third
            raise Killed
        return original(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", dying)
        with pytest.raises(Killed):
            go(name="killed", **settings)
    killed = whole.with_name("killed")
    assert [path.name for path in (killed / "checkpoints").glob("*")] == ["step-2.pt"]
    go(name="killed", **settings)
    for name in FILES:
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name


def test_two_processes_train_as_one(ppo, upstream, tmp_path):
    """Each answers its share of the prompts, and both hold all answers: same buffer, same minibatches, one writer."""
    logs = {}
    for processes in (1, 2):
        wanted = ppo(
            name=f"p{processes}", per_device_train_batch_size=4 // processes, gradient_accumulation_steps=2,
            ppo_score_norm=True, ppo_target=0.05, beta_head=str(upstream["dpo-beta"]), **LEDPO,
        )  # fmt: skip
        path = tmp_path / f"{processes}.yaml"
        path.write_text(yaml.safe_dump(wanted))
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        words = ["-m", "discobeta.cli", "train", str(path)]
        done = subprocess.run(
            [sys.executable, *(launch if processes > 1 else []), *words],
            env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        logs[processes] = log_of(tmp_path / f"p{processes}")
        cost = json.loads((tmp_path / f"p{processes}" / "cost.json").read_text())
        assert cost["processes"] == processes and cost["rows"] == 3 * 16
        assert (tmp_path / f"p{processes}" / "metrics.json").exists()
    assert len(logs[1]) == len(logs[2]) == 3
    for one, two in zip(logs[1], logs[2], strict=True):
        assert one.keys() == two.keys()
        for name in one:
            # float32 sums in another order
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), (name, one["step"])


def test_a_llama_factory_config_runs_as_it_is(base, upstream, tmp_path, capsys):
    """The keys of their ppo example, paths and sizes aside, through their dataset_info.json."""
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"instruction": f"user {colour}", "input": "", "output": "one two"} for colour in ("red", "green", "blue")]
    (data / "alpaca_en_demo.json").write_text(json.dumps(rows * 8))
    (data / "dataset_info.json").write_text(json.dumps({"alpaca_en_demo": {"file_name": "alpaca_en_demo.json"}}))
    config = f"""
### model
model_name_or_path: {base}
reward_model: {upstream["rm"]}
trust_remote_code: true
### method
stage: ppo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
### dataset
dataset: alpaca_en_demo
dataset_dir: {data}
template: llama3
cutoff_len: 48
max_samples: 20
preprocessing_num_workers: 16
dataloader_num_workers: 4
### output
output_dir: {tmp_path / "saves"}
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
report_to: none
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-5
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
### generate
max_new_tokens: 8
top_k: 0
top_p: 0.9
"""
    (tmp_path / "llama3_lora_ppo.yaml").write_text(config)
    assert main(["train", str(tmp_path / "llama3_lora_ppo.yaml")]) == 0
    assert "template is ignored: the tokenizer's own chat template is used" in capsys.readouterr().err
    saved = {path.name for path in (tmp_path / "saves").iterdir()}
    assert {"adapter", "log.jsonl", "loss.png", "metrics.json", "generations.jsonl"} <= saved
    assert log_of(tmp_path / "saves")[-1]["step"] == 8  # 3 epochs of 20 prompts, 8 an update


def test_dropout_is_off(go):
    """The ratio compares two passes of one network: lora_dropout has nothing to act on in ppo."""
    with_dropout, without = (go(name=f"d{dropout}", lora_dropout=dropout) for dropout in (0.5, 0.0))
    for name in FILES:
        assert (with_dropout / name).read_bytes() == (without / name).read_bytes(), name


def test_dropout_is_off_where_a_model_calls_the_function():
    """OPT has no module of dropout, and a rate of 0.1 that applies in training mode."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 19}
    model = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16, dropout=0.5, init_std=0.5)).train()
    tokens = torch.tensor([[1, 4, 5, 6]])

    def says() -> torch.Tensor:
        return model(tokens).logits

    assert not torch.equal(says(), says())
    switch_off_dropout(model)
    assert torch.equal(says(), says()) and model.training


# --- a known optimum


@pytest.fixture
def steep_base(base, tmp_path):
    """The base with larger embeddings: with the fresh ones no two tokens' logits can lie more than 1.3 apart."""
    folder = tmp_path / "steep"
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    larger = {name: 4 * value if "embed" in name else value for name, value in weights.items()}
    save_file(larger, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_bandit_ends_at_its_known_optimum(go, steep_base, upstream, tmp_path, monkeypatch, dynamic):
    """One token per response: the optimum of E[r] - beta(x) KL is ref(y|x) exp(r(x, y) / beta(x)) / Z.

    Two prompts want different tokens; with dynamic beta they also have different coefficients.
    """
    from discobeta.method.rm import RewardModelling

    prompts = {"red": [4, 6, 5], "blue": [4, 8, 5]}  # user <colour> assistant
    wanted = {"red": [9, 10], "blue": [15]}  # tokens with reward 1; the others have 0
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"user {colour} assistant"}) + "\n" for colour in prompts))

    def rewards_of(self, hidden, batch):
        colour, answer = batch.input_ids[:, 1], batch.target_ids
        hits = [(colour == prompts[name][1]) & (answer == token) for name in wanted for token in wanted[name]]
        return torch.stack(hits).any(0).float(), None

    monkeypatch.setattr(RewardModelling, "rewards_of", rewards_of)
    changes, betas = {}, {"red": 0.3, "blue": 0.3}
    if dynamic:
        s = _give_s(upstream["dpo-beta"], tmp_path / "head", steep_base, prompts)
        betas = {name: 0.3 * s[name] for name in prompts}
        assert betas["red"] > 1.5 * betas["blue"]
        changes = {"beta_head": str(tmp_path / "head"), **LEDPO}
    directory = go(
        model_name_or_path=str(steep_base), dataset=str(data), eval_dataset=None, max_new_tokens=1,
        finetuning_type="full", missing_eos_penalty=0.0, pref_beta=0.3, per_device_train_batch_size=64,
        ppo_buffer_size=4, max_steps=40, learning_rate=2e-3, value_learning_rate=1e-2, lr_scheduler_type="linear",
        per_device_eval_batch_size=64, **changes,
    )  # fmt: skip
    before, after = _causal_lm(steep_base), _causal_lm(directory / "model")
    for name, prompt in prompts.items():
        with torch.no_grad():
            reference, policy = (
                m(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1) for m in (before, after)
            )
        reward = torch.zeros(len(reference), dtype=torch.float64).index_fill(0, torch.tensor(wanted[name]), 1.0)
        optimum = (reference + reward / betas[name]).log_softmax(-1)
        left, whole = (torch.sum(p.exp() * (p - optimum)).item() for p in (policy, reference))
        assert whole > 0.1 and left < 0.01 * whole, name  # 99 % of the way, in KL; .002 % were left in a longer run


def _give_s(dpo_run, folder, base, prompts) -> dict[str, float]:
    """A copy of a dpo run whose Beta Head gives the two prompts log s that lie 1.2 apart; returns their s."""
    from discobeta.identity import weights_hash

    shutil.copytree(dpo_run, folder)
    policy = discobeta.load_policy(folder)
    head, config = policy.heads.beta, policy.config.replace(model_name_or_path=str(base))
    model = _causal_lm(base).model
    with torch.no_grad():
        features = torch.stack([model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in prompts.values()])
        z = (features - head.feature_mean) / head.feature_std
        head.weight.copy_(1.2 * (z[0] - z[1]) / (z[0] - z[1]).square().sum())
        s = head.log_s(features).exp().tolist()
    tensors = load_file(folder / "heads.safetensors")
    save_file(tensors | {"beta.weight": head.weight.detach().contiguous()}, folder / "heads.safetensors")
    reseal(folder, base=weights_hash(config))
    return dict(zip(prompts, s, strict=True))


def _causal_lm(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


# --- data, measurements, other makes of reward model


def test_instructions_alone_are_enough(go, tmp_path):
    """A prompt-only set in alpaca's format; without held-out rows the run is measured on its own prompts."""
    rows = [{"instruction": f"user {colour}", "input": "assistant", "output": "one"} for colour in ("red", "blue")] * 6
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    directory = go(dataset=str(tmp_path / "alpaca.json"), eval_dataset=None)
    measured = evaluate(directory)
    answers = [json.loads(line) for line in (directory / "generations.jsonl").read_text().splitlines()]
    assert measured["generations"] == len(answers) == 2
    assert {"prompt", "response", "reference_response", "reward", "reference_reward"} <= set(answers[0])
    assert measured["reward"] == pytest.approx(np.mean([row["reward"] for row in answers]))


def test_a_ppo_run_is_measured_with_its_own_reward_model(go, upstream):
    directory = go(beta_head=str(upstream["dpo-beta"]), **LEDPO)
    measured = evaluate(directory)
    answers = [json.loads(line) for line in (directory / "generations.jsonl").read_text().splitlines()]
    judge = discobeta.load_reward_model(upstream["rm"])
    ended = [row for row in answers if row["ended"]]
    assert ended
    mean, variance = judge.score([row["prompt"] for row in ended], [row["response"] for row in ended])
    assert variance is None
    assert [row["reward"] for row in ended] == pytest.approx(mean.tolist(), rel=1e-4, abs=1e-5)
    gain = np.mean([row["reward"] - row["reference_reward"] for row in answers])
    deviation = np.std([row["reference_reward"] for row in answers], ddof=1)
    assert measured["reward_gain"] == pytest.approx(gain / deviation, rel=1e-6)
    assert measured["mean_log_s"] == pytest.approx(np.mean([row["log_s"] for row in answers]))
    again = evaluate(directory)
    assert again == measured


def test_policy_and_reference_draw_apart(go):
    """A policy that is still the reference answers otherwise than it: a win rate needs independent samples."""
    directory = go(learning_rate=0.0, max_steps=1, num_eval_generations=12)
    evaluate(directory)
    answers = [json.loads(line) for line in (directory / "generations.jsonl").read_text().splitlines()]
    assert sum(row["response"] == row["reference_response"] for row in answers) < 4
    assert all(abs(row["log_ratio"]) < 1e-5 for row in answers)


def test_a_score_does_not_depend_on_its_batch(upstream):
    judge = discobeta.load_reward_model(upstream["rm-disco"])
    generator = torch.Generator().manual_seed(0)  # six steps have hardly moved sigma
    torch.nn.init.normal_(judge.heads.disco.net[-1].weight, std=0.2, generator=generator)
    prompts = [f"user {' '.join(['red'] * n)} assistant" for n in (1, 4, 2, 3)]
    responses = ["one two .", "seven ?", "eight eight eight .", "one ."]
    mean, variance = judge.score(prompts, responses, batch_size=3)
    assert len({round(value, 4) for value in variance.tolist()}) == 4
    for i in range(4):
        alone = judge.score(prompts[i : i + 1], responses[i : i + 1])
        torch.testing.assert_close(torch.stack([mean[i], variance[i]]), torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_log_s_of_the_measurement_is_that_of_the_training(go, upstream):
    directory = go(beta_head=str(upstream["dpo-beta"]), **LEDPO)
    evaluate(directory)
    rows = {row["prompt"]: row["log_s"] for row in map(json.loads, (directory / "generations.jsonl").open())}
    config = discobeta.load_policy(directory).config
    stage = ProximalPolicy.fresh(config, {}, given=runs.given(config))
    tokenizer = stage.tokenizer
    prompts = [np.array(tokenizer(prompt)["input_ids"], np.int32) for prompt in rows]
    judged = stage.judge(prompts, [np.array([9, 2], np.int32)] * len(prompts))
    assert [value.item() for value in judged["log_s"]] == pytest.approx(list(rows.values()), abs=1e-5)


def test_reward_models_of_all_makes_say_the_same(upstream, tmp_path):
    """Our run, its adapter as plain PEFT, and the two merged into one model."""
    ours = discobeta.load_reward_model(upstream["rm"])
    adapter = discobeta.load_reward_model(upstream["rm"] / "adapter")
    merged = discobeta.load_reward_model(upstream["rm"]).model.merge_and_unload()
    merged.score = merged.score.modules_to_save["default"] if hasattr(merged.score, "modules_to_save") else merged.score
    merged.save_pretrained(tmp_path / "merged")
    ours.tokenizer.save_pretrained(tmp_path / "merged")
    whole = discobeta.load_reward_model(tmp_path / "merged")
    texts = ["user red assistant", "user green blue red assistant"], ["one two .", "seven ?"]
    expected, variance = ours.score(*texts)
    assert variance is None and expected.std() > 0
    torch.testing.assert_close(adapter.score(*texts)[0], expected, rtol=0, atol=0)
    torch.testing.assert_close(whole.score(*texts)[0], expected, rtol=1e-4, atol=1e-5)


def test_ppo_takes_reward_models_of_all_makes(go, upstream, tmp_path):
    ours = go(name="ours")
    adapter = go(name="adapter", reward_model=str(upstream["rm"] / "adapter"))
    for name in FILES:
        assert (ours / name).read_bytes() == (adapter / name).read_bytes()
    judge = discobeta.load_reward_model(upstream["rm"])
    merged = judge.model.merge_and_unload()
    merged.score = merged.score.modules_to_save["default"] if hasattr(merged.score, "modules_to_save") else merged.score
    merged.save_pretrained(tmp_path / "merged")
    judge.tokenizer.save_pretrained(tmp_path / "merged")
    whole = go(name="whole", reward_model=str(tmp_path / "merged"))
    assert log_of(whole)[0]["reward"] == pytest.approx(log_of(ours)[0]["reward"], rel=1e-4)


# --- rewards that are uncertain


SEVERAL = {"ppo_score_norm": True, "uncertainty_penalty": 0.5}


@pytest.fixture
def three(upstream, base, pairs, tmp_path):
    """Comma-separated: the rm run of `upstream`, and two of other seeds and learning rates."""
    names = [str(upstream["rm"])]
    for seed, rate in ((8, 3e-2), (9, 1e-1)):
        settings = {
            "stage": "rm", "model_name_or_path": str(base), "dataset": str(pairs["train"]), "cutoff_len": 32,
            "output_dir": str(tmp_path / f"rm-{seed}"), "per_device_train_batch_size": 8, "learning_rate": rate,
            "max_steps": 6, "lora_rank": 4, "seed": seed,
        }  # fmt: skip
        train(RunConfig.from_mapping(settings)[0])
        names.append(settings["output_dir"])
    return ",".join(names)


def wide(directory: Path, folder: Path) -> Path:
    """A copy of a Disco reward model whose sigma differs between responses: six steps have hardly moved it."""
    shutil.copytree(directory, folder)
    tensors = load_file(folder / "heads.safetensors")
    noise = torch.Generator().manual_seed(0)
    tensors["disco.net.2.weight"] = torch.randn(tensors["disco.net.2.weight"].shape, generator=noise)
    save_file(tensors, folder / "heads.safetensors")
    reseal(folder)
    return folder


def said_by(judge, prompts, responses):
    """(N,) means and variances that a reward model gives the token ids of responses, one by one."""
    said = [judge.score_ids([prompt], [ids]) for prompt, ids in zip(prompts, responses, strict=True)]
    return [torch.cat(values) if values[0] is not None else None for values in zip(*said, strict=True)]


@pytest.mark.parametrize("normalised", [False, True])
def test_a_score_is_lower_where_the_reward_is_uncertain(started, upstream, tmp_path, normalised):
    """mu - k sigma, of mu and sigma as `load_reward_model` gives them, in the unit of the reference's responses."""
    judge = discobeta.load_reward_model(wide(upstream["rm-disco"], tmp_path / "wide"))
    settings = {"reward_model": str(tmp_path / "wide"), "ppo_score_norm": normalised, "missing_eos_penalty": 0.0}
    stage, prompts = started(**settings, uncertainty_penalty=0.7, **DISCO)
    work = collected(stage, prompts)
    rollouts, found = work.material, work.statistics
    mean, variance = said_by(judge, rollouts.prompts, rollouts.responses)
    assert variance.sqrt().std() > 0.05
    torch.testing.assert_close(found["reward"], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["uncertainty"], variance.sqrt(), rtol=1e-4, atol=1e-5)
    center, deviation = stage.score_scale
    expected = (mean - 0.7 * variance.sqrt() - center) / deviation  # KL is 0 before the first update
    torch.testing.assert_close(found["penalised_reward"], expected, rtol=1e-4, atol=1e-4)
    if normalised:  # of what is maximised, the mean of 256 others
        scale = stage.units_of_scores(prompts.rows)
        assert scale[0] == stage.score_scale and scale[1][0][0] > scale[0][0] + 0.3


def test_no_penalty_is_the_run_without_it_bit_for_bit(go, upstream):
    plain = go(name="plain", reward_model=str(upstream["rm-disco"]), ppo_score_norm=True, **DISCO)
    zero = go(name="zero", reward_model=str(upstream["rm-disco"]), ppo_score_norm=True, uncertainty_penalty=0, **DISCO)
    some = go(
        name="some", reward_model=str(upstream["rm-disco"]), ppo_score_norm=True, uncertainty_penalty=1.0, **DISCO
    )
    for name in FILES:
        assert (plain / name).read_bytes() == (zero / name).read_bytes() != (some / name).read_bytes()
    assert "uncertainty" in log_of(some)[0] and "uncertainty" not in log_of(plain)[0]


@pytest.mark.parametrize("twin", ["another spelling", "copy"])
def test_one_reward_model_does_not_count_as_two(go, upstream, tmp_path, twin):
    """Their variance would be zero, and the penalty nothing."""
    one = upstream["rm"]
    other = f"{one.parent}/./{one.name}"
    if twin == "copy":
        other = str(shutil.copytree(one, tmp_path / "copy"))
    with pytest.raises(UserError, match=f"reward_model: {one} and {other} are one model and say what one says"):
        go(reward_model=f"{one},{other}", **SEVERAL)


def test_several_reward_models_give_the_mean_less_their_disagreement(started, three):
    """By hand: each model's scores in the units of its own on 256 of the reference's responses; mean - k variance."""
    stage, prompts = started(reward_model=three, missing_eos_penalty=0.0, **SEVERAL)
    work = collected(stage, prompts)
    rollouts, found = work.material, work.statistics
    judges = [discobeta.load_reward_model(name) for name in three.split(",")]
    raw = torch.stack([said_by(judge, rollouts.prompts, rollouts.responses)[0] for judge in judges]).double().numpy()
    units = np.array(stage.unit_of_each)
    assert len(units) == 3 and units[:, 1].max() > 1.2 * units[:, 1].min()
    each = (raw - units[:, :1]) / units[:, 1:]
    mean, variance = each.mean(0), ((each - each.mean(0)) ** 2).sum(0) / 3
    assert variance.max() > 0.05
    assert found["reward"].tolist() == pytest.approx(mean.tolist(), rel=1e-3, abs=1e-4)
    assert found["uncertainty"].tolist() == pytest.approx(variance.tolist(), rel=1e-3, abs=1e-4)
    center, deviation = stage.score_scale
    expected = (mean - 0.5 * variance - center) / deviation
    assert found["penalised_reward"].tolist() == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-3)


def test_the_units_of_several_are_those_of_their_own_scores(started, three):
    """Each model alone, under ppo_score_norm, finds its own mean and deviation on the same 256 responses."""
    stage, prompts = started(reward_model=three, **SEVERAL)
    collected(stage, prompts)
    for name, unit in zip(three.split(","), stage.unit_of_each, strict=True):
        alone, prompts = started(reward_model=name, ppo_score_norm=True)
        collected(alone, prompts)
        assert alone.score_scale == pytest.approx(unit, rel=1e-6)


def test_a_run_with_several_reward_models_is_resumed_and_theirs(go, three, monkeypatch):
    """Killed in the second update and resumed; and refused once one of them has changed."""
    settings = {"reward_model": three, "save_steps": 1, **SEVERAL}
    whole, original, count = go(name="whole", **settings), torch.optim.AdamW.step, 0

    class Killed(BaseException):
        pass

    def dying(self, *arguments, **options):
        nonlocal count
        count += 1
        if count == 6:  # four optimiser steps an update
            raise Killed
        return original(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", dying)
        with pytest.raises(Killed):
            go(name="killed", **settings)
    killed = go(name="killed", **settings)
    for name in FILES:
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
    weights = Path(three.split(",")[2]) / "adapter" / "adapter_model.safetensors"
    _zero(weights, "score")
    reseal(weights.parent.parent)
    with pytest.raises(UserError, match="was trained with another reward model"):
        evaluate(whole)


def test_several_reward_models_measure_by_their_mean(go, three, monkeypatch):
    """Each in deviations of its scores of the reference's responses from their mean, and no penalty."""
    from discobeta.inputs import answers

    sampled, original = {}, answers.sample

    def recording(config, model, tokenizer, prompts, name, each):
        sampled[name] = prompts, original(config, model, tokenizer, prompts, name, each)
        return sampled[name][1]

    monkeypatch.setattr(answers, "sample", recording)
    directory = go(reward_model=three, **SEVERAL)
    evaluate(directory)
    rows = [json.loads(line) for line in (directory / "generations.jsonl").read_text().splitlines()]
    expected = {"policy": np.zeros(8), "reference": np.zeros(8)}
    for judge in map(discobeta.load_reward_model, three.split(",")):
        scores = {name: said_by(judge, *texts)[0].double().numpy() for name, texts in sampled.items()}
        for name, of_texts in scores.items():
            expected[name] += (of_texts - scores["reference"].mean()) / scores["reference"].std() / 3
    assert [row["reward"] for row in rows] == pytest.approx(expected["policy"].tolist(), rel=1e-3, abs=1e-4)
    assert [row["reference_reward"] for row in rows] == pytest.approx(
        expected["reference"].tolist(), rel=1e-3, abs=1e-4
    )


# --- refused


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"reward_model": None}, "stage ppo needs reward_model"),
        ({"reward_model": "./nowhere"}, "there is no directory ./nowhere"),
        ({"reward_model": "rm-disco"}, r"is of arm disco-used_beta-absent, and this run of baseline"),
        (DISCO, r"is of arm baseline, and this run of disco-used_beta-absent"),
        ({"reward_model": "adapter", **DISCO}, "needs an rm run that used its Disco Head"),
        ({"reward_model": "dpo"}, "is a run of stage dpo, not rm"),
        ({"reward_model": "base"}, "is no reward model: it has no trained `score`"),
        ({"reward_model": "dpo-adapter"}, "has no `score`"),
        ({"reward_model": "empty"}, "is no run of stage rm, no PEFT adapter and no transformers model"),
        (LEDPO, "needs beta_head"),
        ({"beta_head": "dpo-idle", **LEDPO}, "was idle there"),
        ({"beta_head": "dpo", **LEDPO}, "not a dpo run with this head"),
        ({"beta_head": "rm", **LEDPO}, "not a dpo run with this head"),
        ({"beta_head": "other-base", **LEDPO}, "was trained on another base"),
        ({"beta_head": "dpo-both", **LEDPO}, "both must have used the same other heads"),
        ({"eval_strategy": "steps"}, "set eval_strategy: no"),
        ({"max_new_tokens": 60}, "do not fit into the context of 64 tokens"),
        ({"cutoff_len": 3}, "prompt fills cutoff_len: 40"),
        (
            {"reward_model": "huge"},
            r"gives \d+ of 16 responses a score that is no finite number, the first one \(-?inf",
        ),
        ({"reward_model": "constant", "ppo_score_norm": True}, "the same score"),
        ({"reward_model": "rm,rm-disco", "ppo_score_norm": True}, "is of arm disco-used_beta-absent, and this run of"),
        ({"reward_model": "rm,./nowhere", "ppo_score_norm": True}, "there is no directory ./nowhere"),
        ({"reward_model": "two-labels"}, "has a `score` of another size than a reward model's"),
        ({"eval_dataset": "long-prompt"}, "a prompt of 62 tokens and max_new_tokens: 6 do not fit"),
    ],
)
def test_bad_input_is_refused(go, upstream, base, tmp_path, changes, says):
    places = upstream | {
        "adapter": upstream["rm"] / "adapter", "dpo-adapter": upstream["dpo"] / "adapter", "base": base,
        "empty": tmp_path / "empty", "huge": tmp_path / "huge", "constant": tmp_path / "constant",
        "other-base": tmp_path / "other-base",
        "two-labels": tmp_path / "two-labels", "long-prompt": tmp_path / "long-prompt.jsonl",
    }  # fmt: skip
    (tmp_path / "empty").mkdir()
    for name, factor in (("huge", 3e38), ("constant", 0.0)):
        shutil.copytree(upstream["rm"], tmp_path / name)
        path = tmp_path / name / "adapter" / "adapter_model.safetensors"
        weights = load_file(path)
        save_file({key: value * factor if "score" in key else value for key, value in weights.items()}, path)
        reseal(tmp_path / name)
    if changes.get("beta_head") == "other-base":
        shutil.copytree(upstream["dpo-beta"], tmp_path / "other-base")
        reseal(tmp_path / "other-base", base="0" * 64)
    if changes.get("reward_model") == "two-labels":
        Qwen3ForSequenceClassification(AutoConfig.from_pretrained(base, num_labels=2)).save_pretrained(
            tmp_path / "two-labels"
        )
    if changes.get("eval_dataset") == "long-prompt":
        words = f"user {' '.join(['red'] * 60)} assistant"
        (tmp_path / "long-prompt.jsonl").write_text(json.dumps({"prompt": words}) + "\n")
        changes = changes | {"cutoff_len": 64}
    keys = ("reward_model", "beta_head", "eval_dataset")
    changes = {
        name: ",".join(str(places.get(part, part)) for part in value.split(",")) if name in keys and value else value
        for name, value in changes.items()
    }
    with pytest.raises(UserError, match=says) as refusal:
        go(name="refused", **changes)
    assert len(str(refusal.value)) < 400 and str(refusal.value).count("\n") <= 1
    assert not (tmp_path / "refused" / "provenance.json").exists()


def test_no_gradient_is_held_while_responses_are_sampled(go, monkeypatch):
    respond, held = ProximalPolicy.respond, []

    def watched(stage, *given):
        held.append(sum(weight.grad is not None for weight in stage.parameters()))
        return respond(stage, *given)

    monkeypatch.setattr(ProximalPolicy, "respond", watched)
    go(ppo_score_norm=False)
    assert held == [0, 0, 0]
