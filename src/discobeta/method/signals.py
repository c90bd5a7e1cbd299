"""What the algorithm reads of the heads, and the loss that follows. This is the only reader of the use (`Arm.used`).

A stage brings evidence: rewards, the batch, hidden states, beta. A head that is not used is not called, not optimised
and not mentioned in a log: from here on the run is the run without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor, nn

from discobeta.data.batches import Batch
from discobeta.design.arms import Arm
from discobeta.design.config import RunConfig
from discobeta.losses import (
    conservative_logistic_loss,
    flipped_label_nll,
    ipo_loss,
    logistic_loss,
    probit_loss,
    robust_logistic_loss,
)
from discobeta.method.heads import SIGMA0, Heads
from discobeta.method.optim import Group, head_group
from discobeta.method.rules import BatchRule
from discobeta.metrics import correctness
from discobeta.model.forward import pooled

TIE = 2.0**-20
"""A margin that is this part (9.5e-7) or less of the log-probabilities that it is the difference of is rounding, and 0.

Two float32 passes of one model whose batches differ were found to leave margins of up to 3.8e-7 of the sum
|log pi(y_w)| + |log pi(y_l)|, with plain, AVX2 and AVX-512 kernels alike: 2.9e-6 nats for pairs of 7 nats, 2.4e-4 for
pairs of 4,700, so that no number of nats fits all. A first step at a learning rate of 1e-5 gave pairs of 46 nats
margins of 6e-4, 14 times the limit there. In bfloat16 passes differ by more than this and than first steps.
"""


@dataclass
class Evidence:
    """What a stage has of B pairs of responses; in the batch the B chosen ones come first."""

    rewards: Tensor  # (2, B) mean rewards of chosen and rejected per unit of beta; their difference is the margin
    batch: Batch
    hidden: Tensor  # (R, T, hidden_size), the trunk's last hidden states
    beta: float = 1.0
    logps: Tensor | None = None  # (2, B) log pi(y|x) that the rewards were made of; their size is that of the rounding


@dataclass
class Opinion:
    """What one used head says of B pairs. Every tensor is float32; what is None leaves the comparison as it is."""

    log_scale: Tensor | None = None  # (B,) log of a factor of beta
    log_sigma: Tensor | None = None  # (2, B) log(sigma/sigma0) of the chosen and the rejected reward
    logged: dict[str, Tensor] = field(default_factory=dict)  # (B,) whose means are logged
    measured: dict[str, Tensor] = field(default_factory=dict)  # (B,) that evaluation writes of each pair


class Signal:
    """How the algorithm reads the head of one idea. Its defaults say nothing."""

    def __init__(self, head: nn.Module, config: RunConfig):
        self.head, self.config = head, config

    def group(self) -> Group:
        """The head's weights, and how they are trained."""
        raise NotImplementedError

    def opinion(self, evidence: Evidence) -> Opinion:
        return Opinion()

    def begin_step(self, mean_margin: Callable[[], Tensor]) -> None:
        """Take note that an optimiser step begins. mean_margin: computes (), the mean log-ratio margin of all its
        pairs, at the price of a forward pass over them."""

    def end_step(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Take note that an optimiser step has ended. reduce: the sum of a tensor over all processes."""

    def log_sigma(self, hidden: Tensor, batch: Batch) -> Tensor | None:
        """(N,) log(sigma/sigma0) of single responses."""

    def log_scale(self, prompt_features: Tensor) -> Tensor | None:
        """(N,) log of a factor of beta, from the reference's states at the end of each prompt."""

    def reward_map(self, score: nn.Linear) -> nn.Linear:
        """hidden -> mean reward."""
        return score


class GaussianReward(Signal):
    """Disco: the reward of a response is N(mean, sigma^2), with sigma from its Disco Head."""

    def group(self) -> Group:
        """The head's mean is trained as a part of the model (`reward_map`)."""
        return head_group(self.head.net.parameters(), self.config.rate("disco_learning_rate"), self.config)

    def reward_map(self, score: nn.Linear) -> nn.Linear:
        """The head's mean in the place of the score, and trained like it: so that the two arms treat it alike."""
        return self.head.mean

    def log_sigma(self, hidden: Tensor, batch: Batch) -> Tensor:
        return self.head.log_sigma(pooled(hidden, batch, self.config.head_pooling))

    def opinion(self, evidence: Evidence) -> Opinion:
        log_sigma = self.log_sigma(evidence.hidden, evidence.batch).view(2, -1)
        sigma = SIGMA0 * log_sigma.detach().exp()
        return Opinion(
            log_sigma=log_sigma,
            logged={"log_sigma": log_sigma.mean(0)},
            measured={
                "variance_sum": sigma.square().sum(0),
                "sigma_chosen": sigma[0],
                "sigma_rejected": sigma[1],
            },
        )

    def end_step(self, reduce: Callable[[Tensor], Tensor]) -> None:
        self.head.end_step(reduce)


class PromptScale(Signal):
    """Dynamic beta: beta * s(x), with s from the Beta Head on the reference's state at the end of the prompt."""

    def group(self) -> Group:
        return head_group(self.head.parameters(), self.config.rate("beta_learning_rate"), self.config)

    def log_scale(self, prompt_features: Tensor) -> Tensor:
        return self.head.log_s(prompt_features)

    def opinion(self, evidence: Evidence) -> Opinion:
        log_s = self.log_scale(evidence.batch.columns["prompt_features"])
        return Opinion(log_scale=log_s, logged={"log_s": log_s}, measured={"log_s": log_s})


class Rule(Signal):
    """A control beside dynamic beta: beta * s by a rule that is no head of an idea (`rules.RULES`)."""

    def group(self) -> Group:
        """A weight of a rule is trained as the Beta Head is."""
        return PromptScale.group(self)

    def begin_step(self, mean_margin: Callable[[], Tensor]) -> None:
        if isinstance(self.head, BatchRule):
            self.head.see(mean_margin(), self.config.pref_beta)

    def opinion(self, evidence: Evidence) -> Opinion:
        log_s = self.head.log_s(evidence.batch.columns, evidence.rewards.shape[1])
        if log_s is None:
            return Opinion()
        said = {"log_s": log_s}
        return Opinion(log_scale=log_s, logged=said | {"beta_eff": scaled(evidence.beta, log_s)}, measured=said)


SIGNALS: dict[str, type[Signal]] = {"disco": GaussianReward, "beta": PromptScale}
"""Key of an idea -> how its head is read."""


@dataclass
class Comparison:
    """How a run sees B pairs of responses. Every tensor is float32, (B,) unless said."""

    mean_margin: Tensor  # mean reward of chosen minus rejected (r_w - r_l, or beta * margin; 0 if rounding), detached
    loss: Tensor  # what is minimised
    nll: Tensor | None  # -log P(chosen wins), in nats; None of a loss that is no likelihood
    rewards: Tensor  # (2, B) mean rewards of chosen and rejected, whose difference is the margin, detached
    logps: Tensor | None = None  # (2, B) log pi(y|x) of chosen and rejected, detached; None if there is no policy
    opinions: dict[str, Opinion] = field(default_factory=dict)  # of the used heads, by key
    evidence: Evidence | None = None  # what it was made from

    def sides(self) -> dict[str, Tensor]:
        """What stands behind the margin, as (B,) of the chosen and of the rejected responses."""
        both = {"reward": self.rewards} | ({} if self.logps is None else {"logp": self.logps})
        return {
            f"{name}_{side}": of_side
            for name, values in both.items()
            for side, of_side in zip(("chosen", "rejected"), values, strict=True)
        }

    def measured(self) -> dict[str, Tensor]:
        """What is written of each pair: the likelihood, the margin and its sides, and what the used heads said."""
        values = {} if self.nll is None else {"nll": self.nll}
        values |= {"mean_margin": self.mean_margin, **self.sides()}
        for opinion in self.opinions.values():
            values |= opinion.measured
        return values

    def statistics(self) -> dict[str, Tensor]:
        """Per-pair quantities whose means are logged; those of heads only if the head is used."""
        values = {"loss": self.loss, "accuracy": correctness(self.mean_margin), "margin": self.mean_margin}
        values |= self.sides()
        for opinion in self.opinions.values():
            values |= opinion.logged
        return {name: value.detach() for name, value in values.items()}


class Signals:
    """The view of the heads that an arm's algorithm has."""

    def __init__(self, arm: Arm, heads: Heads, config: RunConfig):
        used = {key: head for key, head in heads.present().items() if key in arm.used}
        self.config = config
        self.used = {key: SIGNALS[key](head, config) for key, head in used.items()}
        if heads.rule is not None:
            self.used["rule"] = Rule(heads.rule, config)

    def groups(self) -> dict[str, Group]:
        """Key -> the weights of each used head that has any."""
        return {key: signal.group() for key, signal in self.used.items() if any(True for _ in signal.head.parameters())}

    def begin_step(self, mean_margin: Callable[[], Tensor]) -> None:
        """Tell the used heads that an optimiser step begins."""
        for signal in self.used.values():
            signal.begin_step(mean_margin)

    def end_step(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Tell the used heads that an optimiser step has ended."""
        for signal in self.used.values():
            signal.end_step(reduce)

    def reward_map(self, score: nn.Linear) -> nn.Linear:
        """hidden -> mean reward: the scalar score, or what a used head has in its place."""
        for signal in self.used.values():
            score = signal.reward_map(score)
        return score

    def log_sigma(self, hidden: Tensor, batch: Batch) -> Tensor | None:
        """(N,) log(sigma/sigma0) of N responses; None if a reward is a number."""
        return _only(signal.log_sigma(hidden, batch) for signal in self.used.values())

    def log_scale(self, prompt_features: Tensor) -> Tensor | None:
        """(N,) log s(x) of N prompts, from the reference's states at their ends; None if beta is one number."""
        return _sum(signal.log_scale(prompt_features) for signal in self.used.values())

    def compare(self, evidence: Evidence) -> Comparison:
        """How likely the chosen response wins, of B pairs.

        Gaussian rewards have P = Phi(beta * margin / sqrt(sigma_w^2 + sigma_l^2)); rewards that are
        numbers have P = sigmoid(beta * margin), or, with pref_loss: probit, Phi of Gaussians of sigma0 each.
        With log s, beta is beta * s(x), per prompt.
        """
        opinions = {key: signal.opinion(evidence) for key, signal in self.used.items()}
        log_scale = _sum(opinion.log_scale for opinion in opinions.values())
        log_sigma = _only(opinion.log_sigma for opinion in opinions.values())
        chosen, rejected = evidence.rewards
        margin, scale = chosen - rejected, scaled(evidence.beta, log_scale)
        mean_margin = scale * margin.float()
        if log_sigma is None and self.config.pref_loss == "probit":
            log_sigma = torch.zeros_like(evidence.rewards, dtype=torch.float32)
        is_number = log_sigma is None
        nll = logistic_loss(margin, scale) if is_number else probit_loss(mean_margin, variance_sum(log_sigma))
        loss, nll = self.objective(nll, margin, scale)
        with torch.no_grad():
            logps = evidence.logps
            size = (evidence.rewards if logps is None else logps).float().abs().sum(0)
            mean_margin = mean_margin.masked_fill(margin.float().abs() <= TIE * size, 0)
            rewards, logps = scale * evidence.rewards.float(), None if logps is None else logps.detach()
        return Comparison(mean_margin, loss, nll, rewards, logps, opinions, evidence)

    def objective(self, nll: Tensor, margin: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor | None]:
        """(B,) what is minimised, and the likelihood that a run of this loss is measured by; None where there is none.

        rDPO and cDPO minimise what is no likelihood: an unbiased estimate that may be negative, and a cross-entropy to
        a soft label. rDPO has a model of the labels that it reads all the same, logistic ones of which a share is
        flipped; cDPO has none beside sigmoid(beta * margin).
        """
        flips = self.config.dpo_label_smoothing
        if self.config.pref_loss == "ipo":
            return ipo_loss(margin, scale), None
        if self.config.pref_loss == "robust":
            return robust_logistic_loss(margin, scale, flips), flipped_label_nll(margin, scale, flips)
        return (conservative_logistic_loss(margin, scale, flips) if flips else nll), nll


def scaled(beta: float, log_s: Tensor | None) -> Tensor | float:
    """beta, or (B,) beta * s(x): in dpo the weight of the margin, in ppo the coefficient of the KL penalty."""
    return beta if log_s is None else beta * log_s.exp()


def variance_sum(log_sigma: Tensor) -> Tensor:
    """(B,) sigma_w^2 + sigma_l^2 from (2, B) log(sigma/sigma0)."""
    return (SIGMA0 * log_sigma.exp()).square().sum(0)


def _sum(terms: Iterable[Tensor | None]) -> Tensor | None:
    there = [term for term in terms if term is not None]
    return reduce(torch.add, there) if there else None


def _only(terms: Iterable[Tensor | None]) -> Tensor | None:
    """The term that is there, which only one signal may give; None without any."""
    there = [term for term in terms if term is not None]
    if len(there) > 1:
        raise TypeError("two heads say what sigma is")
    return there[0] if there else None
