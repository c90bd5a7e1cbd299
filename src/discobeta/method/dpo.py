"""Direct preference optimisation: the policy is its own reward model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from discobeta.data.batches import Batch, Pairs
from discobeta.data.rows import Rows
from discobeta.design.config import RunConfig
from discobeta.design.schedule import Schedule
from discobeta.inputs import reference
from discobeta.method import rules
from discobeta.method.heads import Heads
from discobeta.method.signals import Comparison, Evidence, scaled
from discobeta.method.stage import Stage, Work
from discobeta.model.forward import hidden_states, response_logps
from discobeta.model.layout import evaluating
from discobeta.model.pretrained import load_causal_lm

if TYPE_CHECKING:
    from accelerate import Accelerator


class DirectPreference(Stage):
    """-log sigmoid(beta * margin), or -log Phi(beta * margin / sqrt(sigma_w^2 + sigma_l^2)), or as pref_loss says.

    margin = (logp_w - ref_logp_w) - (logp_l - ref_logp_l), summed over response tokens; beta is
    pref_beta, or pref_beta * s(x), or what beta_rule makes of it.
    """

    task = "CAUSAL_LM"

    @classmethod
    def load_base(cls, config: RunConfig):
        return load_causal_lm(config)

    @classmethod
    def head_starts(cls, model: nn.Module, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"prompt_features": columns["prompt_features"]}

    @classmethod
    def fresh_heads(
        cls, config: RunConfig, model: nn.Module, columns: dict[str, Tensor], given: dict[str, Any]
    ) -> Heads:
        heads = super().fresh_heads(config, model, columns, given)
        heads.rule = rules.fresh(config.beta_rule, columns)
        return heads

    @classmethod
    def columns(cls, config: RunConfig, parts: dict[str, Rows], *, write: bool = True) -> dict[str, dict[str, Tensor]]:
        columns = reference.load_or_compute(config, parts, write=write)
        if config.beta_rule == "mallows":
            columns = {name: columns[name] | of_part for name, of_part in reference.entropies(config, parts).items()}
        return columns

    def collect(self, step: int, train: Pairs, schedule: Schedule, accelerator: Accelerator) -> Work:
        work = super().collect(step, train, schedule, accelerator)
        self.signals.begin_step(lambda: self.mean_margin(work, accelerator))
        return work

    @torch.no_grad()
    def mean_margin(self, work: Work, accelerator: Accelerator) -> Tensor:
        """(), in nats: the mean margin of a step's pairs, of all its passes and processes, without dropout."""
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        with evaluating(self):
            for indices in work.minibatches[0]:
                chosen, rejected = self.evidence(work.material.batch(indices).to(self.device)).rewards
                margin = (chosen - rejected).double()
                total += torch.stack([margin.sum(), torch.ones_like(margin).sum()])
        total = accelerator.reduce(total, "sum")
        return total[0] / total[1]

    def compare(self, batch: Batch) -> Comparison:
        return self.signals.compare(self.evidence(batch))

    def rewards_of_pairs(self, batch: Batch) -> Tensor:
        """beta * log(pi(y|x) / ref(y|x)), beta that of the prompt: nothing that depends on the pair is in it."""
        log_s = self.signals.log_scale(batch.columns["prompt_features"])
        return scaled(self.config.pref_beta, log_s) * self.evidence(batch).rewards

    def evidence(self, batch: Batch) -> Evidence:
        with self.autocast():
            hidden = hidden_states(self.model, batch)
            logps = response_logps(self.model, hidden, batch).view(2, -1)
        log_ratios = logps - batch.columns["reference_logps"].T
        return Evidence(log_ratios, batch, hidden, self.config.pref_beta, logps)
