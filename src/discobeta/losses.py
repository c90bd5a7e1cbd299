"""Losses of preference alignment, as pure functions of tensors.

This module imports torch and nothing else, and knows no flag. Every loss is per pair (rm, dpo) or
per response token (ppo), in the shape of its inputs and float32: the caller averages, so that
reduction has one home.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def logistic_loss(margin: Tensor, beta: Tensor | float = 1.0) -> Tensor:
    """Per-pair Bradley-Terry loss, -log sigmoid(beta * margin).

    margin: (B,) chosen minus rejected. In dpo the policy-minus-reference log-ratio in nats
            (log pi_w/ref_w - log pi_l/ref_l); in rm the difference of scores, with beta = 1.
    beta:   scalar, or (B,) when each prompt brings its own.
    Returns (B,) float32, in nats; slope -beta/2 and curvature beta^2/4 at margin 0.
    Raises ValueError on any other shape: a (B, 1) beta would broadcast to (B, B) in silence.
    Source: Rafailov et al. 2023 (arXiv:2305.18290), eq. 7; Bradley & Terry 1952.
    """
    return -F.logsigmoid(_scaled(margin, beta))


def probit_loss(mean_margin: Tensor, variance_sum: Tensor) -> Tensor:
    """Per-pair Gaussian-reward loss, -log Phi((mu_w - mu_l) / sqrt(sigma_w^2 + sigma_l^2)).

    If the rewards of two responses are independent Gaussians, this is minus the log of the
    probability that the chosen one is larger.

    mean_margin:  (B,) mu_w - mu_l.
    variance_sum: (B,) sigma_w^2 + sigma_l^2, positive.
    Returns (B,) float32, in nats. At variance 8/pi it has the slope (1/2) and the curvature (1/4)
    of the logistic loss at 0. Computed by log_ndtr, which is finite far into the tail, where
    log(0.5 * (1 + erf(z / sqrt 2))) is -inf from z = -6 on.
    Raises ValueError on any other shape.
    Source: Thurstone 1927 (case of independent discriminal dispersions); Chu & Ghahramani 2005.
    """
    _same_shape(mean_margin, variance_sum, "variance_sum")
    z = mean_margin.float() * torch.rsqrt(variance_sum.float())
    return -torch.special.log_ndtr(z)


def ipo_loss(margin: Tensor, beta: float) -> Tensor:
    """Per-pair identity preference loss, (margin - 1 / (2 beta))^2. It is no likelihood of anything.

    margin: (B,) policy-minus-reference log-ratio in nats, summed over response tokens and not divided by their number.
    beta:   scalar; the margin that a pair is drawn to is 1 / (2 beta).
    Returns (B,) float32, in nats^2; slope -1 / beta at margin 0.
    Source: Azar et al. 2023 (arXiv:2310.12036), eq. 17, as it stands there. TRL and LLaMA-Factory divide each
    log-ratio by its response's number of tokens, so that their beta is another one.
    """
    return (margin.float() - 1 / (2 * beta)).square()


def conservative_logistic_loss(margin: Tensor, beta: Tensor | float, flips: float) -> Tensor:
    """Per-pair cDPO loss, -(1 - e) log sigmoid(beta * margin) - e log sigmoid(-beta * margin).

    The cross-entropy to a label that is right with probability 1 - e; least where sigmoid(beta * margin) = 1 - e.
    margin, beta: as for `logistic_loss`; flips: e, in [0, 1/2).
    Returns (B,) float32, in nats; slope -(1 - 2 e) beta / 2 at margin 0.
    Source: Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO".
    """
    return (1 - flips) * logistic_loss(margin, beta) + flips * logistic_loss(-margin, beta)


def robust_logistic_loss(margin: Tensor, beta: Tensor | float, flips: float) -> Tensor:
    """Per-pair rDPO loss, ((1 - e) l(margin) - e l(-margin)) / (1 - 2 e) with l = `logistic_loss`.

    If a label is flipped with probability e, its mean over the flips is the logistic loss of the label as it was. May
    be negative. margin, beta, flips: as for `conservative_logistic_loss`.
    Returns (B,) float32, in nats; slope -beta / (2 (1 - 2 e)) at margin 0.
    Source: Chowdhury et al. 2024 (arXiv:2403.00409); Natarajan et al. 2013, "Learning with noisy labels".
    """
    right, flipped = logistic_loss(margin, beta), logistic_loss(-margin, beta)
    return ((1 - flips) * right - flips * flipped) / (1 - 2 * flips)


def flipped_label_nll(margin: Tensor, beta: Tensor | float, flips: float) -> Tensor:
    """-log P(label) where a logistic label is flipped with probability e, P = (1 - e) sigmoid(z) + e sigmoid(-z).

    What rDPO believes of a label that it reads: z = beta * margin is of the label as it was before. Its mean over such
    labels is least at the z where that of `robust_logistic_loss` is.
    margin, beta: as for `conservative_logistic_loss`; flips: e, in (0, 1/2).
    Returns (B,) float32, in nats; at most -log e.
    Source: Natarajan et al. 2013, "Learning with noisy labels", whose noise of one rate for both labels this is.
    """
    right, flipped = logistic_loss(margin, beta), logistic_loss(-margin, beta)
    return -torch.logaddexp(math.log1p(-flips) - right, math.log(flips) - flipped)


def token_rewards(scores: Tensor, kl: Tensor, coefficient: Tensor | float, mask: Tensor) -> Tensor:
    """r_t = -coefficient * kl_t, plus the response's score at its last token.

    scores:      (N,) one number for each whole response.
    kl:          (N, T) log pi(y_t) - log ref(y_t), in nats, whose sum over t estimates the KL divergence.
    coefficient: scalar, or (N,) when each prompt brings its own.
    mask:        (N, T) True at the response's tokens, which start at t = 0.
    Returns (N, T) float32, 0 outside the mask.
    Source: Ziegler et al. 2019 (arXiv:1909.08593), eq. 2; Ouyang et al. 2022 (arXiv:2203.02155), eq. 2.
    """
    if isinstance(coefficient, Tensor) and coefficient.ndim:
        if coefficient.shape != scores.shape:
            raise ValueError(f"coefficient {tuple(coefficient.shape)} and scores {tuple(scores.shape)} must be (N,)")
        coefficient = coefficient.float()[:, None]
    rewards = -coefficient * kl.float() * mask
    last = mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores.float()[:, None])


def pessimistic_scores(mean: Tensor, uncertainty: Tensor, penalty: float) -> Tensor:
    """(N,) mean - k * uncertainty of N responses, in the unit of the mean.

    mean, uncertainty: (N,) mu and sigma of one Gaussian reward: a lower confidence bound; or mean and variance over
    several reward models (Coste et al. 2023, arXiv:2310.02743, UWO). penalty: k >= 0.
    """
    return mean - penalty * uncertainty


def generalised_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t = sum_k (gamma * lam)^k * delta_(t+k),  delta_t = r_t + gamma * V_(t+1) - V_t,  V = 0 after the end.

    rewards, values: (N, T) at each response token (the value is of the state before the token).
    mask:            (N, T) True at the response's tokens, which start at t = 0.
    Returns (N, T) float32 advantages, 0 outside the mask; A + V is the value function's target.
    Source: Schulman et al. 2016 (arXiv:1506.02438), eq. 16.
    """
    rewards, values = rewards.float() * mask, values.float() * mask  # so V and A are 0 after the end
    advantages = torch.zeros_like(rewards)
    following = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = advantages[:, t] = (delta + gamma * lam * following) * mask[:, t]
        next_value = values[:, t]
    return advantages


def clipped_policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, cliprange: float) -> Tensor:
    """max(-A * ratio, -A * clip(ratio, 1 - c, 1 + c)) with ratio = exp(log pi - log pi_old), per token.

    (M,) in, (M,) float32 out. Source: Schulman et al. 2017 (arXiv:1707.06347), eq. 7.
    """
    ratio = (logps.float() - old_logps.float()).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange))


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float) -> Tensor:
    """1/2 max((V - R)^2, (V_clipped - R)^2) with V_clipped = V_old + clip(V - V_old, -c, c), per token.

    (M,) in, (M,) float32 out. Source: the PPO of Dhariwal et al. 2017 (openai/baselines); Huang et al.
    2022, "The 37 Implementation Details of Proximal Policy Optimization", detail 9.
    """
    values, old_values = values.float(), old_values.float()
    clipped = old_values + (values - old_values).clamp(-cliprange, cliprange)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def whiten(values: Tensor, mask: Tensor, *, keep_mean: bool = False) -> Tensor:
    """Scale the masked values to variance 1 (and mean 0, unless keep_mean); 0 outside the mask.

    The variance is that of the sample (n - 1), and 1e-8 is added to it: values that are all equal
    stay finite. Source: Ziegler et al. 2019 (openai/lm-human-preferences).
    """
    inside = values[mask]
    mean, variance = inside.mean(), inside.var() if len(inside) > 1 else torch.zeros_like(inside.sum())
    white = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (white + mean if keep_mean else white) * mask


def earlier_probit_loss(margin: Tensor, beta: float) -> Tensor:
    """-log Phi(0.6 * beta * margin / sqrt 2): the scale of the study's first version.

    Kept only to relate old numbers to new ones; nothing in this package trains with it. Its slope
    at 0 is 0.6 / sqrt(pi) = 0.339 beta, 0.68 of the logistic loss's: a hidden, smaller beta.
    """
    return -torch.special.log_ndtr(0.6 * beta * margin.float() / math.sqrt(2))


def _scaled(margin: Tensor, beta: Tensor | float) -> Tensor:
    if isinstance(beta, Tensor) and beta.ndim:
        _same_shape(margin, beta, "beta")
        beta = beta.float()
    return beta * margin.float()


def _same_shape(margin: Tensor, other: Tensor, name: str) -> None:
    if margin.ndim != 1 or other.shape != margin.shape:
        raise ValueError(f"margin {tuple(margin.shape)} and {name} {tuple(other.shape)} must both be (B,)")
