"""What is trained together: the parameter groups of a run, their clipping, and the optimiser."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from discobeta.design.config import RunConfig

ROUNDING = 1e-6
"""A head's gradient of a smaller norm counts as zero. In dpo margins are 0 at step 0, and so is the gradient of both
heads, but for rounding; AdamW divides a gradient by its own size and would make a whole step of that."""


@dataclass(frozen=True)
class Group:
    """Weights with a learning rate, a decay and a clipping of their own."""

    weights: list[nn.Parameter]
    learning_rate: float
    weight_decay: float
    max_norm: float  # to which the gradient is scaled down; 0: no clipping
    rounding: float = 0.0  # a gradient whose norm is no more than this becomes 0


def model_group(weights: Iterable[nn.Parameter], config: RunConfig) -> Group:
    return Group(list(weights), config.learning_rate, config.weight_decay, config.max_grad_norm)


def head_group(weights: Iterable[nn.Parameter], learning_rate: float, config: RunConfig) -> Group:
    """A head's: never decayed, and moved by no gradient that is only rounding."""
    return Group(list(weights), learning_rate, 0.0, config.head_max_grad_norm, ROUNDING)


def optimizer_of(groups: dict[str, Group], config: RunConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [
            {"params": group.weights, "lr": group.learning_rate, "weight_decay": group.weight_decay}
            for group in groups.values()
        ],
        lr=config.learning_rate,  # every group has its own; a schedule may ask for it
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def clip_gradients(groups: dict[str, Group]) -> dict[str, Tensor]:
    """Scale each group's gradient down to its largest norm, on its own; returns the norms before.

    One norm over all groups would let a head change how the model is clipped.
    """
    norms = {
        name: torch.nn.utils.clip_grad_norm_(group.weights, group.max_norm or math.inf)
        for name, group in groups.items()
    }
    for name, group in groups.items():
        if group.rounding:
            is_more = norms[name] > group.rounding
            for weight in group.weights:
                weight.grad.mul_(is_more)
    return norms
