"""The first promise: an idle head leaves the run bit for bit what it is without the head."""

import json
from functools import cache

import pytest
from safetensors.torch import load_file

from discobeta.design.arms import Arm, State, arms_of
from discobeta.design.config import RunConfig
from discobeta.design.stages import STAGES
from discobeta.run.evaluate import evaluate
from discobeta.run.train import train

pytestmark = pytest.mark.numeric

IDLE = [(stage, arm.name) for stage in STAGES for arm in arms_of(stage) if arm.is_idle]
COMPARED = (
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
    "log.jsonl",
    "metrics.json",
    "examples.parquet",
)


@pytest.fixture(scope="module")
def trained(base, pairs, tmp_path_factory):
    """trained(stage, arm, dropout): the directory of a short run, trained and measured once."""

    @cache
    def get(stage: str, arm: str, dropout: float):
        settings = {
            "stage": stage, "model_name_or_path": str(base), "dataset": str(pairs["train"]),
            "eval_dataset": str(pairs["eval"]), "output_dir": str(tmp_path_factory.mktemp("runs") / arm),
            "cutoff_len": 32, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2, "weight_decay": 0.1, "max_steps": 4, "logging_steps": 1, "lora_rank": 4,
            "lora_dropout": dropout, "max_grad_norm": 0.5, "num_eval_generations": 4, "max_new_tokens": 5,
            "eval_strategy": "steps", "eval_steps": 2, "seed": 3, **Arm.from_name(arm).flags,
        }  # fmt: skip
        if stage == "ppo":
            settings |= {"eval_strategy": "no", "max_steps": 2, "ppo_buffer_size": 2, "ppo_epochs": 2}
            settings["reward_model"] = str(get("rm", Arm.from_name(arm).trained_as("rm").name, dropout))
            if Arm.from_name(arm).has("beta"):
                settings["beta_head"] = str(get("dpo", arm, dropout))
        config, _ = RunConfig.from_mapping(settings)
        train(config)
        evaluate(config.output_dir)
        from pathlib import Path

        return Path(config.output_dir)

    return get


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(("stage", "arm"), IDLE)
def test_idle_equals_absent(trained, stage, arm, dropout):
    idle = trained(stage, arm, dropout)
    absent = trained(stage, Arm.from_name(arm).twin.name, dropout)
    for name in COMPARED:
        assert (idle / name).read_bytes() == (absent / name).read_bytes(), name
    heads = [set(load_file(run / "heads.safetensors")) for run in (idle, absent)]
    has_no_head = stage == "ppo" and Arm.from_name(arm).state("beta") is not State.IDLE  # it is the reward model's
    assert heads[0] == heads[1] if has_no_head else heads[0] > heads[1]


@pytest.mark.parametrize("stage", ["dpo", "ppo"])
@pytest.mark.parametrize("arm", ["disco-used_beta-absent", "disco-absent_beta-used", "disco-used_beta-used"])
def test_used_differs(trained, arm, stage):
    used, baseline = (trained(stage, name, 0.0) for name in (arm, "baseline"))
    for name in ("adapter/adapter_model.safetensors", "log.jsonl", "metrics.json"):
        assert (used / name).read_bytes() != (baseline / name).read_bytes(), name


def test_used_differs_in_rm(trained):
    used, baseline = (trained("rm", name, 0.0) for name in ("disco-used_beta-absent", "baseline"))
    assert (used / "log.jsonl").read_bytes() != (baseline / "log.jsonl").read_bytes()


def test_an_idle_head_is_saved_as_it_was_built(trained):
    """Neither trained nor decayed: it starts, and ends, as a head built from the same seed."""
    from discobeta.method.heads import build

    found = load_file(trained("dpo", "disco-idle_beta-used", 0.0) / "heads.safetensors")
    fresh = build(["disco"], 32, seed=3).state_dict()
    assert fresh and all(found[name].equal(value) for name, value in fresh.items())


def test_dropout_was_live(trained):
    with_dropout, without = (trained("dpo", "baseline", dropout) / "log.jsonl" for dropout in (0.2, 0.0))
    assert with_dropout.read_text() != without.read_text()


@pytest.mark.parametrize("arm", ["disco-absent_beta-used", "disco-idle_beta-used"])
def test_dynamic_beta_starts_at_the_baselines_loss(trained, arm):
    """s = 1 exactly at step 0, so the first loss equals the baseline's bit for bit."""
    first = [
        json.loads((trained("dpo", name, 0.0) / "log.jsonl").read_text().splitlines()[0]) for name in (arm, "baseline")
    ]
    assert first[0]["loss"] == first[1]["loss"] and first[0]["log_s"] == 0.0


def test_disco_rm_starts_from_the_baselines_rewards(trained):
    first = [
        json.loads((trained("rm", name, 0.0) / "log.jsonl").read_text().splitlines()[0])
        for name in ("disco-used_beta-absent", "baseline")
    ]
    assert first[0]["margin"] == first[1]["margin"]
