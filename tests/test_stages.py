"""Where gradients go, what comes back from disk, and that what is promised of a run directory holds."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import yaml
from conftest import preference_rows, write_rows
from safetensors.torch import load_file

import discobeta
from discobeta import record
from discobeta.data.batches import Pairs, pack
from discobeta.data.tokens import load_or_tokenise
from discobeta.design.arms import Arm, arms_of
from discobeta.design.config import RunConfig
from discobeta.errors import UserError
from discobeta.method.heads import Heads, build
from discobeta.method.rm import score_layer
from discobeta.method.signals import Evidence, Signals
from discobeta.method.stage import stage_class
from discobeta.model.pretrained import load_tokenizer
from discobeta.run import load as runs

pytestmark = pytest.mark.numeric

USED = {"add_disco_head": True, "disco_pref": True, "add_beta_head": True, "use_dynamic_beta": True}


@pytest.fixture
def fresh(settings):
    def make(stage, **changes):
        config, _ = RunConfig.from_mapping(settings(stage, **changes))
        data = load_or_tokenise(config, load_tokenizer(config))
        kind = stage_class(stage)
        columns = kind.columns(config, {"train": data.train})["train"]
        return kind.fresh(config, columns), Pairs(data.train, columns)

    return make


def moved(stage):
    """Every trained weight away from its start: at the start, zeros hide gradients."""
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for group in stage.parameter_groups().values():
            for weight in group.weights:
                weight += 0.1 * torch.randn(weight.shape, generator=noise)
    if stage.heads.disco is not None:
        stage.heads.disco.steps.fill_(1)  # after its first step
    return stage


@pytest.mark.parametrize("name", [arm.name for arm in arms_of("dpo")])
def test_gradient_reaches_a_head_exactly_if_it_is_used(fresh, name):
    arm = Arm.from_name(name)
    stage, pairs = fresh("dpo", **arm.flags)
    objective, _ = moved(stage)(pairs.batch(np.arange(8)))
    objective.mean().backward()
    for part, used in (("disco", "disco" in arm.used), ("beta", "beta" in arm.used)):
        head = getattr(stage.heads, part)
        if head is not None:
            reached = [weight.grad is not None and bool(weight.grad.abs().sum() > 0) for weight in head.parameters()]
            assert all(reached) if used else not any(reached), part
    assert stage.parameter_groups().keys() == {"model"} | set(stage.signals.groups())
    trained = {id(weight) for group in stage.parameter_groups().values() for weight in group.weights}
    assert {id(weight) for weight in stage.parameters() if weight.requires_grad} == trained


@pytest.mark.parametrize("name", [arm.name for arm in arms_of("rm")])
def test_rm_trains_the_score_or_the_mean_in_its_place(fresh, name):
    arm = Arm.from_name(name)
    stage, pairs = fresh("rm", **arm.flags)
    objective, _ = moved(stage)(pairs.batch(np.arange(8)))
    objective.mean().backward()
    used = "disco" in arm.used
    assert (score_layer(stage.model).weight.grad is None) == used
    if stage.heads.disco is not None:
        assert all((weight.grad is not None) == used for weight in stage.heads.disco.parameters())
    in_group = {id(weight) for weight in stage.parameter_groups()["model"].weights}
    assert (id(score_layer(stage.model).weight) in in_group) != used


def test_a_head_is_clipped_on_its_own():
    """Gradients (3, 4) of norm 5 and (0, 100) of norm 100, clipped to 1 and to 2, each by its own norm."""
    from discobeta.method.optim import clip_gradients, head_group, model_group

    model, head = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    model.grad, head.grad = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 100.0])
    config, _ = RunConfig.from_mapping(
        {"stage": "dpo", "model_name_or_path": "m", "max_grad_norm": 1.0, "head_max_grad_norm": 2.0}
    )
    norms = clip_gradients({"model": model_group([model], config), "disco": head_group([head], 1e-3, config)})
    assert {name: norm.item() for name, norm in norms.items()} == {"model": 5.0, "disco": 100.0}
    torch.testing.assert_close(model.grad, torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(head.grad, torch.tensor([0.0, 2.0]))


def test_rounding_does_not_move_a_head():
    """AdamW would make a whole step of a gradient of 1e-8; of the model's nothing is cut."""
    from discobeta.method.optim import clip_gradients, head_group, model_group

    weights = {name: torch.nn.Parameter(torch.zeros(2)) for name in ("model", "disco", "beta", "value")}
    for name, size in (("model", 1e-8), ("disco", 1e-8), ("beta", 1e-7), ("value", 1e-5)):
        weights[name].grad = torch.tensor([size, -size])
    config, _ = RunConfig.from_mapping({"stage": "dpo", "model_name_or_path": "m"})
    groups = {name: head_group([weight], 1e-3, config) for name, weight in weights.items()}
    norms = clip_gradients(groups | {"model": model_group([weights["model"]], config)})
    assert norms["beta"].item() == pytest.approx(2**0.5 * 1e-7)  # logged as it was
    left = {name: weight.grad.tolist() for name, weight in weights.items()}
    assert left["disco"] == left["beta"] == [0.0, 0.0]
    assert left["model"] == pytest.approx([1e-8, -1e-8]) and left["value"] == pytest.approx([1e-5, -1e-5])


def test_disco_starts_with_the_baselines_gradient(fresh):
    """At step 0 the margin is 0 and sigma = sigma0: same slope, so the same gradient of the adapter."""
    gradients = []
    for name in ("baseline", "disco-used_beta-used"):
        stage, pairs = fresh("dpo", **Arm.from_name(name).flags)
        objective, _ = stage(pairs.batch(np.arange(8)))
        objective.mean().backward()
        gradients.append([weight.grad for weight in stage.parameter_groups()["model"].weights])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_dynamic_beta_scales_beta_and_not_the_variance(fresh):
    """By hand from its parts: -log Phi(pref_beta * s * margin / sqrt(sigma_w^2 + sigma_l^2))."""
    stage, pairs = fresh("dpo", **USED)
    with torch.no_grad():
        comparison = moved(stage).compare(pairs.batch(np.arange(8)))
        baseline, _ = fresh("dpo")
        baseline.model.load_state_dict(stage.model.state_dict())
        margin = baseline.compare(pairs.batch(np.arange(8))).mean_margin / 0.5  # pref_beta of the settings
        log_s, log_sigma = comparison.opinions["beta"].log_scale, comparison.opinions["disco"].log_sigma
        sigma = 2 / np.pi**0.5 * log_sigma.exp()
        z = 0.5 * log_s.exp() * margin / (sigma**2).sum(0).sqrt()
        expected = -torch.log(0.5 * torch.erfc(-z / 2**0.5))
    torch.testing.assert_close(comparison.loss, expected, rtol=1e-5, atol=1e-6)
    assert log_s.abs().max() > 0.01 and log_sigma.abs().max() > 0.01


def _logp(model, ids, prompt_length):
    """log pi(response | prompt) of one sequence, from the whole model's logits."""
    logps = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return sum(logps[place - 1, ids[place]].item() for place in range(prompt_length, len(ids)))


def _sequences(rows, index):
    """(side, token ids, length of the prompt) of a pair."""
    prompt = rows.prompt_ids[index].tolist()
    for side, responses in (("chosen", rows.chosen_ids), ("rejected", rows.rejected_ids)):
        yield side, prompt + responses[index].tolist(), len(prompt)


@torch.no_grad()
def test_dpo_says_both_rewards_and_log_probabilities(fresh, base):
    """By hand from the logits of policy and base: pref_beta * s(x) * (log pi - log ref), with an s for each prompt."""
    from transformers import AutoModelForCausalLM

    stage, pairs = fresh("dpo", **USED)
    comparison = moved(stage).eval().compare(pairs.batch(np.arange(4)))
    said, log_s = comparison.statistics(), comparison.opinions["beta"].log_scale
    reference = AutoModelForCausalLM.from_pretrained(base).eval()
    for index in range(4):
        for side, ids, prompt_length in _sequences(pairs.rows, index):
            logp, before = (_logp(model, ids, prompt_length) for model in (stage.model, reference))
            beta = 0.5 * log_s[index].exp().item()  # pref_beta of the settings
            assert said[f"logp_{side}"][index].item() == pytest.approx(logp, abs=1e-4)
            assert said[f"reward_{side}"][index].item() == pytest.approx(beta * (logp - before), abs=1e-4)
    assert log_s.abs().min() > 1e-3
    torch.testing.assert_close(said["reward_chosen"] - said["reward_rejected"], said["margin"], rtol=1e-5, atol=1e-6)


def test_a_margin_that_is_only_rounding_is_a_tie():
    """In units of what it is the difference of: the limit is 2^-20 of 20 nats (1.9e-5), of 4,000 nats (3.8e-3)."""
    config, _ = RunConfig.from_mapping({"stage": "dpo", "model_name_or_path": "m"})
    signals = Signals(Arm.from_name("baseline"), Heads(), config)
    logps = torch.tensor([-10.0, -10, -10, -2000, -2000, -2000]).expand(2, 6)
    chosen = torch.tensor([1e-5, -1e-5, 3e-5, 3e-3, -5e-3, 0.0], requires_grad=True)
    comparison = signals.compare(Evidence(torch.stack([chosen, torch.zeros(6)]), None, None, 0.5, logps))
    assert comparison.statistics()["accuracy"].tolist() == [0.5, 0.5, 1, 0.5, 0, 0.5]
    assert comparison.mean_margin.tolist() == pytest.approx([0, 0, 1.5e-5, 0, -2.5e-3, 0])
    comparison.loss.sum().backward()  # which sees every margin as it is: slope -beta/2 at 0
    assert chosen.grad.tolist() == pytest.approx([-0.25] * 6, rel=1e-2)
    scores = torch.tensor([[1.0, 1e-9], [1.0 - 1e-7, 0.0]])
    assert signals.compare(Evidence(scores, None, None)).statistics()["accuracy"].tolist() == [0.5, 1]


def test_comparing_waits_for_no_value(monkeypatch):
    """A device that had to hand over a value would stop here: these tensors have none."""
    config, _ = RunConfig.from_mapping({"stage": "dpo", "model_name_or_path": "m", **USED})
    monkeypatch.setattr("discobeta.method.heads.full_precision", lambda like: nullcontext())  # meta has no autocast
    heads = build(["disco", "beta"], 8, seed=1).to("meta")
    signals = Signals(config.arm, heads, config)
    rewards, logps = (torch.empty(2, 6, device="meta") for _ in range(2))
    batch = pack([[1, 2]] * 12, [[3]] * 12, columns={"prompt_features": torch.empty(6, 8)}).to("meta")
    comparison = signals.compare(Evidence(rewards, batch, torch.empty(12, 3, 8, device="meta"), 0.5, logps))
    said = comparison.statistics()
    assert {value.device.type for value in said.values()} == {"meta"} and comparison.loss.shape == (6,)
    assert {"accuracy", "margin", "reward_chosen", "logp_rejected", "log_sigma", "log_s"} <= set(said)


def test_sigma_of_a_reward_model_does_not_run_away(run, tmp_path):
    """Where labels are coin flips, a larger sigma for all lowers the loss of random scores at once."""
    coin = np.random.default_rng(1)
    rows = preference_rows(320, seed=3)
    for row in rows:
        if coin.random() < 0.5:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    flags = {"add_disco_head": True, "disco_pref": True, "dataset": str(write_rows(tmp_path / "flips.jsonl", rows))}
    directory = run("rm", max_steps=40, logging_steps=1, disco_learning_rate=1e-2, **flags)
    log_sigma = [json.loads(line)["log_sigma"] for line in (directory / "log.jsonl").open()]
    assert max(map(abs, log_sigma)) < 0.5 and any(log_sigma), log_sigma


@pytest.mark.parametrize("arm", ["baseline", "disco-used_beta-used"])
def test_a_policy_that_is_its_reference_is_right_in_half(run, tmp_path, arm):
    """Its passes hold other pairs than the reference's, which leaves rounding; 1e-30 is a step that does nothing."""
    from discobeta.run.evaluate import evaluate

    settings = {
        "reference_path": str(tmp_path / "reference"),
        "learning_rate": 1e-30,
        "max_steps": 1,
        "logging_steps": 1,
    }
    run("dpo", name="reference-pass", per_device_eval_batch_size=16, **settings)
    directory = run("dpo", per_device_eval_batch_size=3, eval_strategy="steps", **settings, **Arm.from_name(arm).flags)
    line, held_out = (json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines())
    assert line["accuracy"] == held_out["eval_accuracy"] == evaluate(directory)["accuracy"] == 0.5


@torch.no_grad()
def test_rm_says_both_rewards(fresh):
    """The scores that transformers gives the sequences one by one; there is no policy."""
    stage, pairs = fresh("rm")
    said = moved(stage).eval().compare(pairs.batch(np.arange(4))).statistics()
    for index in range(4):
        for side, ids, _ in _sequences(pairs.rows, index):
            score_of_whole = stage.model(input_ids=torch.tensor([ids])).logits.item()
            assert said[f"reward_{side}"][index].item() == pytest.approx(score_of_whole, abs=1e-5)
    assert not any("logp" in name for name in said)


@pytest.mark.parametrize(("stage", "names"), [("rm", {"reward"}), ("dpo", {"reward", "logp"})])
def test_what_stands_behind_the_margin_is_logged_beside_it(run, stage, names):
    directory = run(stage, **USED)
    line = json.loads((directory / "log.jsonl").read_text().splitlines()[0])
    assert {f"{name}_{side}" for name in names for side in ("chosen", "rejected")} == {
        name for name in line if name.endswith(("_chosen", "_rejected"))
    }
    assert line["reward_chosen"] - line["reward_rejected"] == pytest.approx(line["margin"], abs=1e-6)
    assert stage == "rm" or (line["logp_chosen"] < 0 and line["logp_rejected"] < 0)


@pytest.mark.parametrize("finetuning", ["lora", "full"])
@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_save_and_load_give_the_same_outputs_bitwise(run, fresh, stage, finetuning, monkeypatch):
    kept = {}
    original = stage_class(stage).save

    def keep(self, directory):
        kept["stage"] = self
        return original(self, directory)

    monkeypatch.setattr(stage_class(stage), "save", keep)
    directory = run(stage, finetuning_type=finetuning, **USED)
    _, pairs = fresh(stage, **USED)
    batch = pairs.batch(np.arange(8))
    with torch.no_grad():
        one, other = kept["stage"].eval().compare(batch), runs.load_stage(record.read(directory)).compare(batch)
    assert torch.equal(one.loss, other.loss)
    assert torch.equal(one.opinions["disco"].log_sigma, other.opinions["disco"].log_sigma)
    assert stage == "rm" or torch.equal(one.opinions["beta"].log_scale, other.opinions["beta"].log_scale)


def test_a_reward_model_scores_texts_and_loads_in_plain_peft(run, base):
    from peft import AutoPeftModelForSequenceClassification

    directory = run("rm", **USED)
    reward_model = discobeta.load_reward_model(directory)
    prompts, responses = ["user red assistant", "user blue green assistant"], ["one two .", "seven ?"]
    mean, variance = reward_model.score(prompts, responses)
    assert mean.shape == variance.shape == (2,) and (variance > 0).all()
    plain = AutoPeftModelForSequenceClassification.from_pretrained(directory / "adapter", num_labels=1).eval()
    for index, text in enumerate(zip(prompts, responses, strict=True)):
        ids = reward_model.tokenizer(" ".join(text))["input_ids"] + [reward_model.tokenizer.eos_token_id]
        with torch.no_grad():
            scalar = plain(input_ids=torch.tensor([ids])).logits.item()
        assert scalar == pytest.approx(mean[index].item(), abs=1e-5)  # other padding, other order of sums
    with pytest.raises(UserError, match="prompt fills cutoff_len"):
        reward_model.score(["user " * 40], ["one"])


def test_a_scalar_reward_model_has_no_variance(run):
    assert discobeta.load_reward_model(run("rm")).score(["user red assistant"], ["one ."])[1] is None


def test_a_policy_is_an_ordinary_peft_model(run, base):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    directory = run("dpo", **USED)
    policy = discobeta.load_policy(directory)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory / "adapter")
    ids = torch.tensor([[4, 6, 5, 9, 17]])
    with torch.no_grad():
        torch.testing.assert_close(policy.model(ids).logits, plain.eval()(ids).logits)  # it sums in another order
    assert policy.heads.disco is not None and policy.heads.beta is not None
    with pytest.raises(UserError, match="is a run of stage dpo, not rm"):
        discobeta.load_reward_model(directory)
    with pytest.raises(UserError, match="is not a finished run"):
        discobeta.load_policy(base)


def test_an_adapter_to_start_from_is_the_reference_too(run):
    """The second run's policy starts where the first ended, and so does its reference: margin 0."""
    first = run("dpo", name="first")
    second = run("dpo", name="second", adapter_name_or_path=str(first / "adapter"), logging_steps=1, learning_rate=1e-4)
    line = json.loads((second / "log.jsonl").read_text().splitlines()[0])
    assert line["margin"] == pytest.approx(0, abs=1e-5) and line["loss"] == pytest.approx(np.log(2), abs=1e-5)


def test_a_reward_model_starts_from_the_adapter_of_a_policy(run, fresh):
    """The usual flow: SFT adapter -> reward model. Trunk weights are the adapter's, the score is fresh."""
    first = run("dpo", name="first")
    stage, _ = fresh("rm", adapter_name_or_path=str(first / "adapter"))
    saved = load_file(first / "adapter/adapter_model.safetensors")
    found = dict(stage.model.named_parameters())
    for name, value in saved.items():
        assert torch.equal(found[name.replace(".weight", ".default.weight")], value), name
    assert all(found[name.replace(".weight", ".default.weight")].requires_grad for name in saved)
    assert score_layer(stage.model).weight.requires_grad and score_layer(stage.model).weight.abs().sum() > 0


def test_a_run_that_was_moved_is_measured_where_it_is(run, tmp_path):
    from discobeta.run.evaluate import evaluate

    directory = run("dpo")
    moved_to = directory.rename(tmp_path / "moved")
    evaluate(moved_to)
    assert (moved_to / "metrics.json").exists() and not directory.exists()


def test_a_run_directory_holds_what_is_promised(run):
    directory = run("dpo", eval_strategy="steps", eval_steps=2, report_to="tensorboard", **USED)
    names = {path.name for path in directory.iterdir()}
    assert names == {
        "config.yaml", "adapter", "heads.safetensors", "heads.json", "log.jsonl", "speed.jsonl", "cost.json",
        ".discobeta.json", "provenance.json", ".finished.json", "reference", "tracker",
    }  # fmt: skip
    resolved = yaml.safe_load((directory / "config.yaml").read_text())
    assert resolved["disco_pref"] is True and resolved["disco_learning_rate"] is None
    again, _ = RunConfig.from_mapping(resolved)
    assert again.resolved() == resolved
    provenance = json.loads((directory / "provenance.json").read_text())
    assert provenance["seed"] == 7 and len(provenance["base"]) == len(provenance["data"]) == 64
    log = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "eval_loss" in line] == [2, 4]
    assert not any("second" in key for line in log for key in line)


def test_bf16_keeps_sums_losses_and_heads_in_float32(fresh):
    stage, pairs = fresh("dpo", bf16=True, **USED)
    assert next(stage.model.get_base_model().parameters()).dtype == torch.bfloat16
    assert all(weight.dtype == torch.float32 for group in stage.parameter_groups().values() for weight in group.weights)
    comparison = stage.compare(pairs.batch(np.arange(8)))
    log_sigma, log_s = comparison.opinions["disco"].log_sigma, comparison.opinions["beta"].log_scale
    assert comparison.loss.dtype == log_sigma.dtype == log_s.dtype == torch.float32
    assert comparison.loss.mean().item() == pytest.approx(np.log(2), abs=1e-3)  # policy = reference, also in bf16


def test_a_model_that_changes_its_logits_is_refused(base, monkeypatch):
    from discobeta.model import pretrained

    model = pretrained.load_causal_lm(RunConfig.from_mapping({"stage": "dpo", "model_name_or_path": str(base)})[0])
    original = model.forward

    def capped(*words, **options):
        output = original(*words, **options)
        output.logits = 0.5 * torch.tanh(output.logits / 0.5)
        return output

    monkeypatch.setattr(model, "forward", capped)
    with pytest.raises(UserError, match="or its logits after it, in a way that is not known"):
        pretrained.check_output_layer(model, "capped")


def test_two_processes_train_as_one(settings, tmp_path):
    """Two CPU processes (gloo), as torchrun starts them: same global batch, same losses, one writer."""
    logs = {}
    for processes in (1, 2):
        wanted = settings(
            "dpo", name=f"p{processes}", per_device_train_batch_size=8 // processes, logging_steps=1, **USED,
            gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=2, save_steps=3,
        )  # fmt: skip
        path = tmp_path / f"{processes}.yaml"
        path.write_text(yaml.safe_dump(wanted))
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        words = ["-m", "discobeta.cli", "train", str(path), "--no-evaluate"]
        command = [sys.executable, *(launch if processes > 1 else []), *words]
        done = subprocess.run(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        logs[processes] = [
            json.loads(line) for line in (tmp_path / f"p{processes}" / "log.jsonl").read_text().splitlines()
        ]
        cost = json.loads((tmp_path / f"p{processes}" / "cost.json").read_text())
        assert cost["processes"] == processes and cost["rows"] == 4 * 16 - 16 + 8  # 40 rows: the third step has 8
    assert len(logs[1]) == len(logs[2])
    for one, two in zip(logs[1], logs[2], strict=True):
        assert one.keys() == two.keys()
        for name in one:
            # float32 sums in another order
            assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5), (name, one["step"])
