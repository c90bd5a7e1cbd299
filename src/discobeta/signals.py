"""Which outputs of the heads the algorithm sees. This is the only reader of the use (`Arm.used`).

A head that is not used is not called, not optimised and not mentioned in a log: from here on the
run is the run without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from discobeta.config import RunConfig
from discobeta.design.arms import Arm
from discobeta.heads import SIGMA0, Heads
from discobeta.losses import log_scale_penalty, logistic_loss, probit_loss
from discobeta.metrics import correctness

TIE = 2.0**-20
"""A margin that is this part (9.5e-7) or less of the log-probabilities that it is the difference of is rounding, and 0.

Two float32 passes of one model whose batches differ were found to leave margins of up to 3.8e-7 of the sum
|log pi(y_w)| + |log pi(y_l)|, with plain, AVX2 and AVX-512 kernels alike: 2.9e-6 nats for pairs of 7 nats, 2.4e-4 for
pairs of 4,700, so that no number of nats fits all. A first step at a learning rate of 1e-5 gave pairs of 46 nats
margins of 6e-4, 14 times the limit there. In bfloat16 passes differ by more than this and than first steps.
"""


@dataclass
class Comparison:
    """How a run sees B pairs of responses. Every tensor is float32, (B,) unless said."""

    mean_margin: Tensor  # mean reward of chosen minus rejected (r_w - r_l, or beta * margin; 0 if rounding), detached
    loss: Tensor  # -log P(chosen wins), in nats
    penalty: Tensor | None  # what keeps the used heads around their start
    log_sigma: Tensor | None  # (2, B): log(sigma/sigma0) of chosen and rejected; None if a reward is a number
    log_s: Tensor | None  # None if beta is one number
    rewards: Tensor  # (2, B) mean rewards of chosen and rejected, whose difference is the margin, detached
    logps: Tensor | None = None  # (2, B) log pi(y|x) of chosen and rejected, detached; None if there is no policy

    @property
    def objective(self) -> Tensor:
        return self.loss if self.penalty is None else self.loss + self.penalty

    @property
    def sigma(self) -> Tensor | None:
        """(2, B) standard deviations of chosen and rejected."""
        return None if self.log_sigma is None else SIGMA0 * self.log_sigma.exp()

    def sides(self) -> dict[str, Tensor]:
        """What stands behind the margin, as (B,) of the chosen and of the rejected responses."""
        both = {"reward": self.rewards} | ({} if self.logps is None else {"logp": self.logps})
        return {
            f"{name}_{side}": of_side
            for name, values in both.items()
            for side, of_side in zip(("chosen", "rejected"), values, strict=True)
        }

    def statistics(self) -> dict[str, Tensor]:
        """Per-pair quantities whose means are logged; those of heads only if the head is used."""
        values = {"loss": self.loss, "accuracy": correctness(self.mean_margin), "margin": self.mean_margin}
        values |= self.sides()
        if self.penalty is not None:
            values["penalty"] = self.penalty
        if self.log_sigma is not None:
            values["log_sigma"] = self.log_sigma.mean(0)
        if self.log_s is not None:
            values["log_s"] = self.log_s
        return {name: value.detach() for name, value in values.items()}


class Signals:
    """The view of the heads that an arm's algorithm has."""

    def __init__(self, arm: Arm, heads: Heads, config: RunConfig):
        self.disco = heads.disco if "disco" in arm.used else None
        self.beta_head = heads.beta if "beta" in arm.used else None
        self.config = config

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """Parameters of each used head, by head; the Disco Head's mean belongs to `reward_map`."""
        used = {}
        if self.disco is not None:
            used["disco"] = list(self.disco.net.parameters())
        if self.beta_head is not None:
            used["beta"] = list(self.beta_head.parameters())
        return used

    def reward_map(self, score: nn.Linear) -> nn.Linear:
        """hidden -> mean reward: the scalar score, or the Disco Head's mean in its place.

        The one that is used is trained as a part of the model (learning rate and clipping of the
        adapter), so that the two arms treat it alike.
        """
        return score if self.disco is None else self.disco.mean

    def log_sigma(self, pooled: Callable[[], Tensor]) -> Tensor | None:
        """(N,) from the (N, hidden) states that `pooled` makes on demand."""
        return None if self.disco is None else self.disco.log_sigma(pooled())

    def log_s(self, prompt_features: Tensor | None) -> Tensor | None:
        """(B,) from the reference's states at the end of each prompt."""
        return None if self.beta_head is None else self.beta_head.log_s(prompt_features)

    def compare(
        self,
        rewards: Tensor,
        beta: float,
        log_sigma: Tensor | None,
        log_s: Tensor | None,
        logps: Tensor | None = None,
    ) -> Comparison:
        """-log P(chosen wins) of B pairs.

        rewards: (2, B) of chosen and rejected per unit of beta (rm: the scores, with beta = 1); their
        difference is the margin.
        logps: (2, B) log pi(y|x) that the rewards were made of, if they were: their size is that of the rounding.
        log_sigma: (2B,) of the responses, the chosen ones first.
        Gaussian rewards have P = Phi(beta * margin / sqrt(sigma_w^2 + sigma_l^2)); rewards that are
        numbers have P = sigmoid(beta * margin). With log s, beta is beta * s(x), per prompt.
        """
        chosen, rejected = rewards
        margin, scale = chosen - rejected, scaled(beta, log_s)
        log_sigma = None if log_sigma is None else log_sigma.view(2, -1)
        mean_margin = scale * margin.float()
        is_number = log_sigma is None
        loss = logistic_loss(margin, scale) if is_number else probit_loss(mean_margin, variance_sum(log_sigma))
        with torch.no_grad():
            size = (rewards if logps is None else logps).float().abs().sum(0)
            mean_margin = mean_margin.masked_fill(margin.float().abs() <= TIE * size, 0)
            rewards, logps = scale * rewards.float(), None if logps is None else logps.detach()
        return Comparison(mean_margin, loss, self._penalty(log_sigma, log_s), log_sigma, log_s, rewards, logps)

    def _penalty(self, log_sigma: Tensor | None, log_s: Tensor | None) -> Tensor | None:
        """(B,) what keeps the used heads around their start; None without one, or without training."""
        config, terms = self.config, []
        if not torch.is_grad_enabled():
            return None
        if log_s is not None:
            terms.append(_around_zero(log_s, config.beta_mean_penalty, config.beta_spread_penalty))
        if log_sigma is not None:
            both = _around_zero(log_sigma, config.disco_mean_penalty, config.disco_spread_penalty)
            terms.append(both.mean(0))
        return sum(terms) if terms else None


def scaled(beta: float, log_s: Tensor | None) -> Tensor | float:
    """beta, or (B,) beta * s(x): in dpo the weight of the margin, in ppo the coefficient of the KL penalty."""
    return beta if log_s is None else beta * log_s.exp()


def variance_sum(log_sigma: Tensor) -> Tensor:
    """(B,) sigma_w^2 + sigma_l^2 from (2, B) log(sigma/sigma0)."""
    return (SIGMA0 * log_sigma.exp()).square().sum(0)


def _around_zero(values: Tensor, mean_weight: float, spread_weight: float) -> Tensor:
    """The penalty of each element, with the batch mean taken over all processes."""
    batch_mean = values.detach().mean()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(batch_mean)
        batch_mean /= torch.distributed.get_world_size()
    return log_scale_penalty(values, mean_weight, spread_weight, batch_mean)
