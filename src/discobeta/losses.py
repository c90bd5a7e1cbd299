"""Losses of preference alignment, as pure functions of tensors.

This module imports torch and nothing else, and knows no flag. Every loss is per pair, `(B,)` in
and `(B,)` float32 out: the caller averages, so that reduction has one home.
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


def log_scale_penalty(log_values: Tensor, mean_weight: float, spread_weight: float, batch_mean: Tensor) -> Tensor:
    """Per-example penalty m * (batch mean of l)^2 + v * l^2, whose mean keeps exp(l) around 1.

    log_values: (N,) l = log(sigma / sigma0), or log s.
    batch_mean: scalar, the mean of l over the whole batch (over all processes), detached.
    Returns (N,) float32. Its mean has the value and the gradient of m * mean(l)^2 + v * mean(l^2):
    the first term is written as 2 * b * l - b^2 with b = batch_mean held fixed, so that each
    process can hold a part of the batch.
    """
    values = log_values.float()
    return mean_weight * (2 * batch_mean * values - batch_mean**2) + spread_weight * values**2


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
