"""Controls beside the grid: other losses of rm and dpo, and rules that scale beta without a head."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from discobeta import record
from discobeta.data.batches import Pairs
from discobeta.data.tokens import load_or_tokenise
from discobeta.design.arms import Arm
from discobeta.design.config import RunConfig
from discobeta.errors import UserError
from discobeta.method.rules import BatchRule
from discobeta.method.stage import stage_class
from discobeta.model.pretrained import load_tokenizer
from discobeta.run import load as runs
from discobeta.run.evaluate import evaluate

pytestmark = pytest.mark.numeric

DISCO = {"add_disco_head": True, "disco_pref": True}
LEDPO = {"add_beta_head": True, "use_dynamic_beta": True}
BETA = 0.5  # pref_beta of the settings


@pytest.fixture
def fresh(settings):
    """fresh(stage, **changes): (stage, pairs), with weights that are not those of the start."""

    def make(stage, **changes):
        config, _ = RunConfig.from_mapping(settings(stage, **changes))
        data = load_or_tokenise(config, load_tokenizer(config))
        kind = stage_class(stage)
        columns = kind.columns(config, {"train": data.train})["train"]
        found = kind.fresh(config, columns)
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in found.model_parameters():
                weight += 0.1 * torch.randn(weight.shape, generator=noise)
        return found, Pairs(data.train, columns)

    return make


def log_of(directory):
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def plain_margin(stage, batch):
    """r_w - r_l of rm, the log-ratio margin of dpo."""
    with torch.no_grad():
        if stage.config.stage == "dpo":
            chosen, rejected = stage.evidence(batch).rewards
        else:
            chosen, rejected = stage.rewards(batch)[0].view(2, -1)
    return chosen - rejected


# --- losses


@pytest.mark.parametrize(("stage", "beta"), [("rm", 1.0), ("dpo", BETA)])
def test_probit_is_the_likelihood_of_gaussians_of_sigma0(fresh, stage, beta):
    """-log Phi(beta * margin / sqrt(8 / pi)), by erfc: the link of Disco without its variance."""
    found, pairs = fresh(stage, pref_loss="probit")
    batch = pairs.batch(np.arange(8))
    comparison, margin = found.compare(batch), plain_margin(found, batch)
    expected = -torch.log(0.5 * torch.erfc(-beta * margin.double() / (8 / np.pi) ** 0.5 / 2**0.5)).float()
    torch.testing.assert_close(comparison.loss, expected, rtol=1e-5, atol=1e-6)
    assert comparison.nll is comparison.loss and margin.abs().max() > 0.05 and not comparison.opinions


@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_probit_is_a_disco_arm_whose_variance_is_never_trained_bit_for_bit(run, stage):
    """A Disco Head that stays fresh says sigma0 of every response: what is left of the arm is the link."""
    weights = "adapter/adapter_model.safetensors"
    fixed = run(stage, name="fixed", disco_learning_rate=0.0, **DISCO)
    probit = run(stage, name="probit", pref_loss="probit")
    baseline = run(stage, name="baseline")
    assert (probit / weights).read_bytes() == (fixed / weights).read_bytes() != (baseline / weights).read_bytes()
    assert load_file(probit / "heads.safetensors") == {}


def test_ipo_has_a_margin_and_no_likelihood(fresh, run):
    """(margin - 1 / (2 beta))^2 = (margin - 1)^2 at beta 1/2; and held-out pairs have an accuracy alone."""
    found, pairs = fresh("dpo", pref_loss="ipo")
    batch = pairs.batch(np.arange(8))
    comparison, margin = found.compare(batch), plain_margin(found, batch)
    torch.testing.assert_close(comparison.loss, (margin - 1) ** 2, rtol=1e-6, atol=1e-6)
    assert comparison.nll is None and comparison.mean_margin.tolist() == pytest.approx((BETA * margin).tolist())
    measured = evaluate(run("dpo", pref_loss="ipo", num_eval_generations=4, max_new_tokens=4))
    assert 0 <= measured["accuracy"] <= 1 and "kl_per_sequence" in measured
    assert not {"nll", "brier", "ece"} & set(measured)


@pytest.mark.parametrize(("stage", "beta"), [("rm", 1.0), ("dpo", BETA)])
@pytest.mark.parametrize("loss", ["sigmoid", "robust"])
def test_smoothed_labels_change_the_loss_and_robust_ones_the_likelihood_too(fresh, stage, beta, loss):
    found, pairs = fresh(stage, pref_loss=loss, dpo_label_smoothing=0.2)
    batch = pairs.batch(np.arange(8))
    comparison, margin = found.compare(batch), beta * plain_margin(found, batch).double()
    right, flipped = torch.log1p(torch.exp(-margin)), torch.log1p(torch.exp(margin))
    expected = (0.8 * right - 0.2 * flipped) / 0.6 if loss == "robust" else 0.8 * right + 0.2 * flipped
    torch.testing.assert_close(comparison.loss.double(), expected, rtol=1e-4, atol=1e-5)
    observed = -torch.log(0.8 * torch.exp(-right) + 0.2 * torch.exp(-flipped))  # rDPO's of a label that may be flipped
    torch.testing.assert_close(comparison.nll.double(), observed if loss == "robust" else right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("stage", "changes", "says"),
    [
        ("dpo", {"pref_loss": "probit", **DISCO}, "pref_loss: probit is for arms without disco_pref: true"),
        ("rm", {"pref_loss": "robust", "dpo_label_smoothing": 0.1, **DISCO}, "pref_loss: robust is for arms without"),
        ("dpo", {"dpo_label_smoothing": 0.1, **DISCO}, "dpo_label_smoothing: 0.1 is for arms without disco_pref"),
        ("rm", {"pref_loss": "ipo"}, "stage rm has none"),
        ("dpo", {"pref_loss": "ipo", **LEDPO}, "pref_loss: ipo needs a fixed beta"),
        ("dpo", {"pref_loss": "ipo", "beta_rule": "batch"}, "pref_loss: ipo needs a fixed beta"),
        ("dpo", {"pref_loss": "robust"}, "robust needs dpo_label_smoothing above 0"),
        ("dpo", {"pref_loss": "probit", "dpo_label_smoothing": 0.1}, "needs pref_loss: sigmoid or robust, not probit"),
        ("dpo", {"dpo_label_smoothing": 0.5}, "dpo_label_smoothing: 0.5: below 0.5"),
        ("dpo", {"beta_rule": "learned", **LEDPO}, "beta_rule: learned is for arms without use_dynamic_beta: true"),
        ("dpo", {"beta_rule": "mallows", **LEDPO}, "beta_rule: mallows is for arms without use_dynamic_beta: true"),
        ("ppo", {"uncertainty_penalty": 0.5}, r"needs a reward model with a variance \(disco_pref: true\)"),
        ("ppo", {"reward_model": "a,b"}, "need ppo_score_norm: true"),
        ("ppo", {"reward_model": "a,a", "ppo_score_norm": True}, "names one of them twice"),
    ],
)
def test_a_control_that_means_nothing_in_its_arm_is_refused_in_one_line(settings, stage, changes, says):
    wanted = settings(stage) | ({"reward_model": "a"} if stage == "ppo" else {}) | changes
    with pytest.raises(UserError, match=says) as refusal:
        RunConfig.from_mapping(wanted)
    assert "\n" not in str(refusal.value)


def test_an_idle_head_leaves_controls_as_they_are(run):
    """None touches the four flags: with idle heads a control is the control, bit for bit."""
    for changes in ({"pref_loss": "ipo"}, {"beta_rule": "learned"}):
        plain = run("dpo", name="plain", overwrite_output_dir=True, **changes)
        idle = run("dpo", name="idle", overwrite_output_dir=True, add_disco_head=True, add_beta_head=True, **changes)
        for name in ("adapter/adapter_model.safetensors", "log.jsonl"):
            assert (plain / name).read_bytes() == (idle / name).read_bytes()


# --- rules of beta


def test_one_learned_number_scales_beta(fresh):
    """At w = .3: -log sigmoid(e^.3 / 2 * margin); at the start s = 1, and the gradient of w is beta * margin * dL."""
    found, pairs = fresh("dpo", beta_rule="learned")
    batch = pairs.batch(np.arange(8))
    margin = plain_margin(found, batch).double()
    objective, said = found(batch)
    torch.testing.assert_close(objective.double(), torch.log1p(torch.exp(-BETA * margin)), rtol=1e-5, atol=1e-6)
    assert said["log_s"].tolist() == [0.0] * 8 and said["beta_eff"].tolist() == [BETA] * 8
    objective.mean().backward()
    expected = (-BETA * margin / (1 + torch.exp(BETA * margin))).mean().item()  # d/dw of the loss at w = 0
    assert found.heads.rule.weight.grad.item() == pytest.approx(expected, rel=1e-4)
    with torch.no_grad():
        found.heads.rule.weight.fill_(0.3)
    objective, said = found(batch)
    scaled = BETA * np.exp(0.3) * margin
    torch.testing.assert_close(objective.double(), torch.log1p(torch.exp(-scaled)), rtol=1e-5, atol=1e-6)
    assert said["beta_eff"].tolist() == pytest.approx([BETA * np.exp(0.3)] * 8)


def test_the_learned_number_is_a_weight_of_the_run(run, monkeypatch):
    """Trained at the Beta Head's rate, logged, saved, reloaded bit for bit, and used where the run is measured."""
    kept = {}
    monkeypatch.setattr(stage_class("dpo"), "save", _keeping(kept, stage_class("dpo").save))
    directory = run("dpo", beta_rule="learned", beta_learning_rate=0.1, max_steps=6)
    (name,) = tensors = load_file(directory / "heads.safetensors")
    w = tensors[name].item()
    assert name == "rule.weight" and abs(w) > 0.05
    line = log_of(directory)[-1]
    assert line["beta_eff"] == pytest.approx(BETA * np.exp(line["log_s"]), rel=1e-2) and line["rule_grad_norm"] > 0
    stage = runs.load_stage(record.read(directory))
    assert torch.equal(stage.heads.rule.weight, kept["stage"].heads.rule.weight)
    measured = evaluate(directory)
    assert measured["mean_log_s"] == pytest.approx(w) and measured["sd_log_s"] == pytest.approx(0, abs=1e-9)
    rows = pd.read_parquet(directory / "examples.parquet")
    still = run("dpo", name="still", beta_rule="learned", beta_learning_rate=0.0, max_steps=6)
    assert load_file(still / "heads.safetensors")[name].item() == 0
    baseline = run("dpo", name="baseline", max_steps=6)
    weights = "adapter/adapter_model.safetensors"
    assert (still / weights).read_bytes() == (baseline / weights).read_bytes() != (directory / weights).read_bytes()
    assert np.log1p(np.exp(-rows["mean_margin"])).tolist() == pytest.approx(rows["nll"].tolist(), rel=1e-4)


def _keeping(kept, original):
    def save(self, directory):
        kept["stage"] = self
        return original(self, directory)

    return save


def entropy_of(model, prompt, response):
    """Mean over the response's tokens of the entropy of what the model would say there, in units of log V."""
    ids = torch.tensor([[*prompt, *response]])
    logits = model(ids).logits[0, len(prompt) - 1 : -1].double()
    p = logits.softmax(-1)
    return (-(p * p.log()).sum(-1).mean() / np.log(logits.shape[-1])).item()


@torch.no_grad()
def test_mallows_scales_beta_by_the_dispersion_of_the_reference(fresh, base, settings):
    """By brute force, from whole logits, a sequence at a time: -log of the pair's entropy, over its mean over all."""
    from transformers import AutoModelForCausalLM

    found, pairs = fresh("dpo", beta_rule="mallows")
    reference, rows = AutoModelForCausalLM.from_pretrained(base).eval(), pairs.rows
    entropies = [
        np.mean([entropy_of(reference, prompt, response) for response in both])
        for prompt, *both in zip(rows.prompt_ids, rows.chosen_ids, rows.rejected_ids, strict=True)
    ]
    s = -np.log(entropies) / np.mean(-np.log(entropies))
    assert s.mean() == pytest.approx(1) and s.std() > 0.01
    every = np.arange(len(rows))
    said = found.compare(pairs.batch(every))
    assert said.opinions["rule"].log_scale.exp().tolist() == pytest.approx(s.tolist(), rel=1e-4)
    expected = np.log1p(np.exp(-BETA * s * plain_margin(found, pairs.batch(every)).double().numpy()))
    assert said.loss.tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert "rule" not in found.parameter_groups()


def test_mallows_is_measured_by_the_mean_of_its_training(run, monkeypatch):
    """The mean that makes s is saved with the run: held-out pairs have no mean of their own."""
    kept = {}
    monkeypatch.setattr(stage_class("dpo"), "save", _keeping(kept, stage_class("dpo").save))
    directory = run("dpo", beta_rule="mallows")
    mean = load_file(directory / "heads.safetensors")["rule.mean"]
    assert mean == kept["stage"].heads.rule.mean and mean != 1
    measured = evaluate(directory)
    assert measured["mean_log_s"] != 0 and measured["sd_log_s"] > 0 and "log_s_noise" in measured
    rows = pd.read_parquet(directory / "examples.parquet")
    again = runs.load_stage(record.read(directory))
    columns = again.columns(again.config, {"eval": _held_out(again.config)}, write=False)["eval"]
    expected = np.log(-np.log(columns["entropy"].double().numpy()) / mean.item())
    assert rows["log_s"].tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)


def _held_out(config):
    return load_or_tokenise(config, load_tokenizer(config), write=False).held_out


def test_no_other_run_asks_the_reference_for_entropies(run, tmp_path, monkeypatch):
    from discobeta.inputs import reference

    monkeypatch.setattr(reference, "entropies", None)
    baseline = run("dpo", reference_path=str(tmp_path / "reference"))
    assert {*load_file(tmp_path / "reference" / "train.safetensors")} == {
        "reference_logps", "prompt_features", "fingerprints",
    }  # fmt: skip
    monkeypatch.undo()
    before = {path: path.read_bytes() for path in (tmp_path / "reference").iterdir()}
    run("dpo", name="mallows", beta_rule="mallows", reference_path=str(tmp_path / "reference"))
    assert before == {path: path.read_bytes() for path in (tmp_path / "reference").iterdir()} and baseline.exists()


def test_the_batchs_beta_follows_its_mean_margin():
    """By hand: means 1, 3 and -9 move M0 to .1, .39 and -.549, so 1 + .6 * (.9, 2.61, -8.451); the last is below 0."""
    rule = BatchRule()
    for mean, factor in ((1.0, 1.54), (3.0, 2.566), (-9.0, 1e-3 / BETA)):
        rule.see(torch.tensor(mean), BETA)
        assert rule.log_s({}, 3).exp().tolist() == pytest.approx([factor] * 3, rel=1e-5)
    assert rule.margin_mean.item() == pytest.approx(-0.549, rel=1e-5)
    assert rule.eval().log_s({}, 3) is None


@pytest.mark.parametrize("tokens", [1024, 60])
def test_the_batchs_rule_sees_the_whole_step(fresh, tokens):
    """Whatever the cut into passes: beta * (1 + .6 * .9 * mean) of the mean over the step's 16 pairs, in every pass."""
    from accelerate import Accelerator

    found, pairs = fresh("dpo", beta_rule="batch", tokens_per_pass=tokens, per_device_train_batch_size=16)
    schedule = found.schedule(pairs, 1)
    mean = plain_margin(found, pairs.batch(np.sort(schedule.step_rows(0)))).double().mean().item()
    work = found.train().collect(0, pairs, schedule, Accelerator())
    assert (len(work.minibatches[0]) > 3) == (tokens == 60) and abs(mean) > 1e-3 and found.model.training
    for indices in work.minibatches[0]:
        _, said = found(pairs.batch(indices))
        assert said["beta_eff"].tolist() == pytest.approx([BETA * (1 + 0.54 * mean)] * len(indices), rel=1e-4)


def test_the_batchs_rule_leaves_evaluation_at_pref_beta(run):
    directory = run("dpo", beta_rule="batch", learning_rate=1e-2, max_steps=6, logging_steps=1)
    lines = log_of(directory)
    assert lines[0]["beta_eff"] == pytest.approx(BETA) and abs(lines[-1]["log_s"]) > 1e-3
    assert lines[-1]["reward_chosen"] - lines[-1]["reward_rejected"] == pytest.approx(lines[-1]["margin"], abs=1e-5)
    measured, rows = evaluate(directory), pd.read_parquet(directory / "examples.parquet")
    assert "mean_log_s" not in measured and "log_s" not in rows
    stage = runs.load_stage(record.read(directory))
    columns = stage.columns(stage.config, {"eval": _held_out(stage.config)}, write=False)["eval"]
    margin = plain_margin(stage, Pairs(_held_out(stage.config), columns).batch(np.arange(12)))
    assert rows["mean_margin"].tolist() == pytest.approx((BETA * margin).tolist(), abs=1e-5)


@pytest.mark.parametrize("rule", ["learned", "batch", "mallows"])
def test_cutting_a_step_into_passes_leaves_a_rule_the_same(run, rule):
    """As of the heads (test_invariance): the same losses, betas and weights, to rounding."""
    every = {"max_steps": 8, "logging_steps": 1, "beta_rule": rule}
    whole, parts = run("dpo", name="whole", **every), run("dpo", name="parts", tokens_per_pass=60, **every)
    for one, other in zip(log_of(whole), log_of(parts), strict=True):
        for name in ("loss", "beta_eff", "log_s"):
            assert other[name] == pytest.approx(one[name], abs=1e-5), (name, one["step"])
    one, other = (load_file(path / "heads.safetensors") for path in (whole, parts))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=5e-5, msg=name)
    assert max(abs(line["log_s"]) for line in log_of(whole)) > 1e-5


def test_two_processes_see_one_step(settings, tmp_path):
    """Two CPU processes (gloo): the batch's rule takes the mean over the pairs of both."""
    logs = {}
    for processes in (1, 2):
        wanted = settings(
            "dpo", name=f"p{processes}", per_device_train_batch_size=8 // processes, logging_steps=1,
            learning_rate=1e-2, beta_rule="batch",
        )  # fmt: skip
        path = tmp_path / f"{processes}.yaml"
        path.write_text(yaml.safe_dump(wanted))
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        words = ["-m", "discobeta.cli", "train", str(path), "--no-evaluate"]
        done = subprocess.run(
            [sys.executable, *(launch if processes > 1 else []), *words],
            env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        logs[processes] = log_of(tmp_path / f"p{processes}")
    assert abs(logs[1][-1]["log_s"]) > 1e-3
    for one, two in zip(logs[1], logs[2], strict=True):
        for name in ("loss", "beta_eff", "margin"):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-4), (name, one["step"])


def test_a_comma_in_the_directory_of_a_sweep_separates_no_reward_models(settings):
    """`key=value` behind a comma is the rest of a variant's name."""
    named = "runs/rm/baseline/probit,pref_beta=0.35/seed-1, runs/rm/b/seed-2,c"
    config, _ = RunConfig.from_mapping(settings("ppo", reward_model=named, ppo_score_norm=True))
    assert config.reward_models == ["runs/rm/baseline/probit,pref_beta=0.35/seed-1", "runs/rm/b/seed-2", "c"]
    assert RunConfig.from_mapping(settings("rm"))[0].reward_models == []


def test_the_arm_of_a_control_is_that_of_its_flags(settings):
    wanted = {"pref_loss": "probit", "beta_rule": "learned"}
    assert RunConfig.from_mapping(settings("dpo") | wanted)[0].arm == Arm.from_name("baseline")
