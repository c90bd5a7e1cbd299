"""The heads as modules of a run: what exists. This is the only reader of the architecture (`Arm.heads_in`).

Whether an algorithm reads a head is decided in `signals`, never here. Heads live outside the
language model, so no adapter can wrap or freeze them, and have a file of their own, because PEFT's
`modules_to_save` silently drops what the base model does not have. They compute in float32
whatever the model's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from discobeta.errors import telling
from discobeta.files import read_mapping, replacing, write_json
from discobeta.method import rules
from discobeta.seeds import global_stream

BOUND = math.log(3.0)
"""k: log s stays within [-k, k], a factor of 3 either way, also for a prompt unlike those of the training."""

SIGMA0 = 2 / math.sqrt(math.pi)
"""sigma of a fresh Disco Head. Two fresh responses have sigma_w^2 + sigma_l^2 = 8/pi, at which the
probit loss has the slope (1/2) and the curvature (1/4) of the logistic one at margin 0: arms differ
in the shape of the loss and not in a hidden beta."""

NEWEST = 0.1
"""Weight of an optimiser step in the running mean of the Disco Head's states."""

WIDTH = 64
"""Hidden units of the Disco Head's variance network."""


def bounded(x: Tensor) -> Tensor:
    """k * tanh(x / k): the identity near 0, with slope 1, and never beyond +-k."""
    return BOUND * torch.tanh(x / BOUND)


def full_precision(like: Tensor) -> torch.autocast:
    """Context in which float32 stays float32, also under autocast."""
    return torch.autocast(like.device.type, enabled=False)


class DiscoHead(nn.Module):
    """N(mu, sigma^2) instead of a number: sigma = sigma0 * exp(l), l = net(h - m).

    h is (N, hidden_size), the trunk's last hidden state pooled over a response; m is its mean over the responses of
    the earlier optimiser steps, a plain one over the first 1 / NEWEST of them and an exponential one from there on.
    net is linear, tanh, linear, and has no bias. So net(h - m) is 0 at the mean state: a larger sigma of *all*
    responses, which comparisons cannot tell from a smaller scale of mu, is nothing that net could learn
    (docs/decisions/0023). What m is made of are whole steps, so it does not depend on how a step is cut into passes.
    The last layer of net starts at zero, so sigma starts at sigma0 for every response; it has no gradient in the
    first step, whose m is not known.

    score_weight: (1, hidden_size) for a reward model, whose mean is mu = mean(h), a linear map that
                  starts as a copy of the scalar score, so that both arms start from equal rewards.
                  None for dpo, where the mean of the reward is beta * log(pi / ref).
    """

    def __init__(self, hidden_size: int, score_weight: Tensor | None = None):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(hidden_size, WIDTH, bias=False), nn.Tanh(), nn.Linear(WIDTH, 1, bias=False))
        nn.init.zeros_(self.net[-1].weight)
        self.register_buffer("state_mean", torch.zeros(hidden_size))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.seen: list[tuple[Tensor, int]] = []  # sum and number of states of each pass of this step
        self.mean = None
        if score_weight is not None:
            self.mean = nn.Linear(hidden_size, 1, bias=False)
            self.mean.weight.data.copy_(score_weight.float())

    @classmethod
    def fresh(cls, hidden_size: int, *, score_weight: Tensor | None = None, **_) -> Self:
        return cls(hidden_size, score_weight)

    @classmethod
    def described(cls, description: dict) -> Self:
        if not description.get("centred"):
            raise ValueError("its Disco Head is not centred: train the run again")
        size = description["hidden_size"]
        return cls(size, torch.zeros(1, size) if description["mean"] else None)

    def description(self) -> dict:
        return {"hidden_size": len(self.state_mean), "mean": self.mean is not None, "centred": True}

    def log_sigma(self, hidden: Tensor) -> Tensor:
        """(N,) float32, l = log(sigma / sigma0). In training, what `end_step` averages is kept."""
        with full_precision(hidden):
            states = hidden.float()
            if self.training and torch.is_grad_enabled():
                self.seen.append((states.detach().double().sum(0), len(states)))
            is_centred = self.steps > 0
            return self.net(states - self.state_mean).squeeze(-1) * is_centred

    @torch.no_grad()
    def end_step(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Move m by the mean state of the optimiser step that ends. reduce: the sum of a tensor over all processes."""
        sums, numbers = zip(*self.seen, strict=True)
        self.seen.clear()
        total = reduce(torch.cat([sum(sums), sums[0].new_full((1,), sum(numbers))]))
        newest = (1 / self.steps.add_(1)).clamp_min(NEWEST)
        self.state_mean.add_(newest * (total[:-1] / total[-1] - self.state_mean).float())


class BetaHead(nn.Module):
    """s(x) = exp(k * tanh(w . z / k)): how far beta is scaled for a prompt.

    z = (h - mean) / std, per dimension over the training prompts, where h (N, hidden_size) is the
    frozen reference's last hidden state at the last prompt token. All prompts end in the same
    token, so without this standardisation the component that they share drowns the rest. w starts
    at 0, so s = 1 exactly.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.register_buffer("feature_mean", torch.zeros(hidden_size))
        self.register_buffer("feature_std", torch.ones(hidden_size))

    @classmethod
    def fresh(cls, hidden_size: int, *, prompt_features: Tensor | None = None, **_) -> Self:
        head = cls(hidden_size)
        if prompt_features is not None:
            head.standardise_by(prompt_features)
        return head

    @classmethod
    def described(cls, description: dict) -> Self:
        return cls(description["hidden_size"])

    def description(self) -> dict:
        return {"hidden_size": self.weight.numel()}

    def standardise_by(self, features: Tensor) -> None:
        """Store mean and standard deviation of (N, hidden_size) training features."""
        values = features.double()
        self.feature_mean.copy_(values.mean(0))
        self.feature_std.copy_(values.std(0, correction=0).clamp_min(1e-6))

    def log_s(self, features: Tensor) -> Tensor:
        """(N,) float32, log s(x), in [-k, k]."""
        with full_precision(features):
            z = (features.float() - self.feature_mean) / self.feature_std
            return bounded(z @ self.weight)


HEADS = {"disco": DiscoHead, "beta": BetaHead}
"""Key of an idea -> its head: a module with

fresh(hidden_size, **starts)    at step 0; `starts` as for `build`
description()                   what `described` needs to build the module again, without its weights
"""


class Heads(nn.Module):
    """The heads that a run has, as attributes named by the key of their idea; None where it has none.

    rule: what scales beta in their place (`rules.RULES`), which is no idea's and of no flag; None if nothing does.
    """

    def __init__(self, rule: nn.Module | None = None, **modules: nn.Module | None):
        super().__init__()
        self.rule = rule
        for key in HEADS:
            setattr(self, key, modules.pop(key, None))
        if modules:
            raise TypeError(f"no head is called {min(modules)}")

    def present(self) -> dict[str, nn.Module]:
        """Key -> head of those that are there."""
        return {key: head for key in HEADS if (head := getattr(self, key)) is not None}


def build(present: Collection[str], hidden_size: int, seed: int, **starts: Tensor | None) -> Heads:
    """Fresh heads, each from a random stream of its own.

    present: keys of the ideas whose heads there are (`Arm.heads_in`).
    starts: what they start from: `score_weight`, (1, hidden_size), a reward model's scalar score, which the Disco
            Head's mean copies; `prompt_features`, (N, hidden_size) of the training prompts, for the Beta Head's
            standardisation.
    """
    modules = {}
    for key in present:
        with global_stream(seed, f"{key} head"):
            modules[key] = HEADS[key].fresh(hidden_size, **starts)
    return Heads(**modules)


def save(heads: Heads, directory: Path) -> None:
    """heads.safetensors and heads.json, also when there is no head (then both are empty)."""
    from safetensors.torch import save_file

    tensors = {name: value.detach().cpu().contiguous() for name, value in heads.state_dict().items()}
    with replacing(directory / "heads.safetensors") as temporary:
        save_file(tensors, temporary)
    descriptions = {key: head.description() for key, head in heads.present().items()}
    if heads.rule is not None:
        descriptions["rule"] = {"name": rules.name_of(heads.rule)}
    write_json(directory / "heads.json", descriptions)


def load(directory: Path) -> Heads:
    """The heads of a run directory, bit for bit as they were saved."""
    from safetensors.torch import load_file

    descriptions = read_mapping(directory / "heads.json")
    with telling(f"{directory}/heads.json describes no heads of this version"):
        rule = rules.RULES[descriptions.pop("rule")["name"]]() if "rule" in descriptions else None
        heads = Heads(rule, **{key: HEADS[key].described(description) for key, description in descriptions.items()})
    with telling(f"{directory}/heads.safetensors does not fit heads.json"):
        heads.load_state_dict(load_file(directory / "heads.safetensors"))
    return heads
