"""Direct preference optimisation: the policy is its own reward model."""

from __future__ import annotations

from torch import Tensor, nn

from discobeta.data.batches import Batch
from discobeta.data.rows import Rows
from discobeta.design.config import RunConfig
from discobeta.inputs import reference
from discobeta.method.signals import Comparison, Evidence, scaled
from discobeta.method.stage import Stage
from discobeta.model.forward import hidden_states, response_logps
from discobeta.model.pretrained import load_causal_lm


class DirectPreference(Stage):
    """-log sigmoid(beta * margin), or -log Phi(beta * margin / sqrt(sigma_w^2 + sigma_l^2)).

    margin = (logp_w - ref_logp_w) - (logp_l - ref_logp_l), summed over response tokens; beta is
    pref_beta, or pref_beta * s(x).
    """

    task = "CAUSAL_LM"

    @classmethod
    def load_base(cls, config: RunConfig):
        return load_causal_lm(config)

    @classmethod
    def head_starts(cls, model: nn.Module, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"prompt_features": columns["prompt_features"]}

    @classmethod
    def columns(cls, config: RunConfig, parts: dict[str, Rows], *, write: bool = True) -> dict[str, dict[str, Tensor]]:
        return reference.load_or_compute(config, parts, write=write)

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
