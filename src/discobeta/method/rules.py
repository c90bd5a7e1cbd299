"""Rules that scale beta without a head: controls beside dynamic beta, each with what of it must be kept.

A rule is a module among a run's heads (`Heads.rule`), so its weight and its buffers are saved, reloaded and kept in
checkpoints with theirs; `beta_rule: fixed` has none, and leaves no trace in a run.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ALPHA, MEMORY, LEAST_BETA = 0.6, 0.9, 1e-3
"""Of beta-DPO: the gain alpha and the momentum of M0 in the paper, the floor of beta in its code."""

NEAR = 1e-6
"""A normalised entropy is taken to be this far from 0 and 1 at least, so that log s is a number."""


class LearnedScale(nn.Module):
    """s = exp(w), one number for all prompts, w trained with the policy; 0 at the start, so s = 1."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def log_s(self, columns: dict[str, Tensor], pairs: int) -> Tensor:
        """(B,) float32."""
        return self.weight.expand(pairs)


class Dispersion(nn.Module):
    """MallowsPO: s(x) = -log H(x) / c, H in (0, 1) the reference's predictive entropy in the pair's responses.

    H is a mean over response tokens, in units of log V, V the vocabulary, and over the two responses
    (`reference.entropies`); -log H is large where the reference is sure of what it says. No label is read. c, the mean
    of -log H over the training pairs, is ours: so that s has mean 1, and the rule is no larger or smaller beta.
    Source: Chen et al. 2024 (arXiv:2405.14953), whose code has a constant factor in the place of 1 / c.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(()))

    def normalise_by(self, entropy: Tensor) -> None:
        """Take c from (N,) entropies H of the training pairs."""
        self.mean.copy_(dispersion(entropy).double().mean())

    def log_s(self, columns: dict[str, Tensor], pairs: int) -> Tensor:
        """(B,) float32, from the column `entropy`, H."""
        return (dispersion(columns["entropy"]) / self.mean).log()


class BatchRule(nn.Module):
    """beta-DPO: beta of a step = beta * (1 + alpha * (mean margin of the step - M0)), and no less than 1e-3.

    The margin is the policy-minus-reference log-ratio in nats, without beta. M0 starts at 0 and takes the step's mean
    in before it is subtracted, M0 <- .9 M0 + .1 mean, as in the authors' code. The filter of pairs by how far their
    margin is from M0 is left out: it trains on other pairs. In evaluation there is no step, and beta is pref_beta.
    Source: Wu et al. 2024 (arXiv:2407.08639).
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("margin_mean", torch.zeros(()))
        self.log_scale: Tensor | None = None  # of the step that is trained on

    @torch.no_grad()
    def see(self, mean_margin: Tensor, beta: float) -> None:
        """Set the scale of the step to come. mean_margin: (), over all pairs of the step, of all processes."""
        self.margin_mean.mul_(MEMORY).add_((1 - MEMORY) * mean_margin.float())
        factor = 1 + ALPHA * (mean_margin.float() - self.margin_mean)
        self.log_scale = factor.clamp_min(LEAST_BETA / beta).log()

    def log_s(self, columns: dict[str, Tensor], pairs: int) -> Tensor | None:
        """(B,) float32, in a step of training; None in evaluation."""
        return self.log_scale.expand(pairs) if self.training and self.log_scale is not None else None


RULES = {"learned": LearnedScale, "mallows": Dispersion, "batch": BatchRule}
"""`beta_rule` -> its module, with `log_s`; `fixed` has none."""


def name_of(rule: nn.Module) -> str:
    """As it is called in RULES."""
    return next(name for name, kind in RULES.items() if type(rule) is kind)


def dispersion(entropy: Tensor) -> Tensor:
    """-log H of entropies H in units of log V."""
    return -entropy.float().clamp(NEAR, 1 - NEAR).log()


def fresh(name: str, columns: dict[str, Tensor]) -> nn.Module | None:
    """The rule at step 0; columns: of the training rows."""
    rule = RULES[name]() if name in RULES else None
    if isinstance(rule, Dispersion) and "entropy" in columns:
        rule.normalise_by(columns["entropy"])
    return rule
