"""The same loss and the same gradients as TRL's trainers, on the same model and batch.

Tolerances: TRL and we sum the same float32 terms in different orders; 1e-5 is about 100 units in
the last place of a loss near 1.
"""

import numpy as np
import pytest
import torch

from discobeta.data.batches import Pairs
from discobeta.data.tokens import load_or_tokenise
from discobeta.design.config import RunConfig
from discobeta.inputs.reference import compute
from discobeta.method.dpo import DirectPreference
from discobeta.method.heads import Heads
from discobeta.method.rm import RewardModelling
from discobeta.model.pretrained import load_causal_lm, load_scorer, load_tokenizer

pytestmark = pytest.mark.numeric

INDICES = np.arange(8)


@pytest.fixture
def prepared(settings):
    def make(stage, **changes):
        config, _ = RunConfig.from_mapping(settings(stage, finetuning_type="full", **changes))
        tokenizer = load_tokenizer(config)
        return config, tokenizer, load_or_tokenise(config, tokenizer).train

    return make


def trl_settings(tmp_path, **more):
    return {
        "output_dir": str(tmp_path / "trl"), "bf16": False, "gradient_checkpointing": False, "report_to": "none",
        "use_cpu": True, "max_length": None, **more,
    }  # fmt: skip


def gradients(model):
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same_gradients(ours, theirs):
    assert ours.keys() == theirs.keys() and ours
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6, msg=name)


def perturbed(model, seed=0):
    """Another policy than the reference: every weight moved a little."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=noise)
    return model


def raw_dataset():
    from datasets import Dataset

    return Dataset.from_list([{"prompt": "user red assistant", "chosen": "one .", "rejected": "two ."}] * 4)


@pytest.mark.parametrize(("loss", "flips"), [("sigmoid", 0.0), ("robust", 0.2)])
def test_dpo_loss_and_gradients_are_trls(prepared, tmp_path, loss, flips):
    from trl import DPOConfig, DPOTrainer

    config, tokenizer, rows = prepared("dpo", pref_beta=2.0, pref_loss=loss, dpo_label_smoothing=flips)
    columns = compute(load_causal_lm(config), rows, config, torch.device("cpu"))
    stage = DirectPreference(config, perturbed(load_causal_lm(config)), Heads())
    objective, _ = stage(Pairs(rows, columns).batch(INDICES))
    objective.mean().backward()

    policy = perturbed(load_causal_lm(config))
    trainer = DPOTrainer(
        policy, load_causal_lm(config),
        args=DPOConfig(**trl_settings(tmp_path, beta=2.0, loss_type=loss, label_smoothing=flips)),
        train_dataset=raw_dataset(), processing_class=tokenizer,
    )  # fmt: skip
    inputs = trainer.data_collator(
        [
            {
                "prompt_ids": rows.prompt_ids[i].tolist(),
                "chosen_ids": rows.chosen_ids[i].tolist(),
                "rejected_ids": rows.rejected_ids[i].tolist(),
            }
            for i in INDICES
        ]
    )
    said = trainer.compute_loss(trainer.model, inputs)
    said.backward()
    assert objective.mean().item() == pytest.approx(said.item(), rel=1e-5)
    assert abs(said.item() - np.log(2)) > 0.01  # the policy is not the reference
    assert_same_gradients(gradients(stage.model), gradients(policy))


def test_reward_loss_and_gradients_are_trls(prepared, tmp_path):
    from trl import RewardConfig, RewardTrainer

    config, tokenizer, rows = prepared("rm")
    stage = RewardModelling(config, perturbed(load_scorer(config)), Heads())
    objective, _ = stage(Pairs(rows).batch(INDICES))
    objective.mean().backward()

    scorer = perturbed(load_scorer(config))
    trainer = RewardTrainer(
        scorer, args=RewardConfig(**trl_settings(tmp_path)), train_dataset=raw_dataset(), processing_class=tokenizer
    )
    inputs = trainer.data_collator(
        [
            {
                "chosen_ids": [*rows.prompt_ids[i].tolist(), *rows.chosen_ids[i].tolist()],
                "rejected_ids": [*rows.prompt_ids[i].tolist(), *rows.rejected_ids[i].tolist()],
            }
            for i in INDICES
        ]
    )
    loss = trainer.compute_loss(scorer, inputs)
    loss.backward()
    assert objective.mean().item() == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(gradients(stage.model), gradients(scorer))
