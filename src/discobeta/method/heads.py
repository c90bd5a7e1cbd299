"""The heads as modules of a run: what exists. This is the only reader of the architecture (`Arm.heads_in`).

Whether an algorithm reads a head is decided in `signals`, never here. Heads live outside the
language model, so no adapter can wrap or freeze them, and have a file of their own, because PEFT's
`modules_to_save` silently drops what the base model does not have. They compute in float32
whatever the model's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from discobeta.errors import telling
from discobeta.files import read_mapping, replacing, write_json
from discobeta.seeds import global_stream

BOUND = math.log(3.0)
"""k: log sigma/sigma0 and log s stay within [-k, k], a factor of 3 either way."""

SIGMA0 = 2 / math.sqrt(math.pi)
"""sigma of a fresh Disco Head. Two fresh responses have sigma_w^2 + sigma_l^2 = 8/pi, at which the
probit loss has the slope (1/2) and the curvature (1/4) of the logistic one at margin 0: arms differ
in the shape of the loss and not in a hidden beta."""

WIDTH = 64
"""Hidden units of the Disco Head's variance network."""


def bounded(x: Tensor) -> Tensor:
    """k * tanh(x / k): the identity near 0, with slope 1, and never beyond +-k."""
    return BOUND * torch.tanh(x / BOUND)


def full_precision(like: Tensor) -> torch.autocast:
    """Context in which float32 stays float32, also under autocast."""
    return torch.autocast(like.device.type, enabled=False)


class DiscoHead(nn.Module):
    """N(mu, sigma^2) instead of a number: sigma = sigma0 * exp(l), l = k * tanh(net(h) / k).

    h is (N, hidden_size), the trunk's last hidden state pooled over a response. The last layer of
    net starts at zero, so sigma starts at sigma0 for every response.

    score_weight: (1, hidden_size) for a reward model, whose mean is mu = mean(h), a linear map that
                  starts as a copy of the scalar score, so that both arms start from equal rewards.
                  None for dpo, where the mean of the reward is beta * log(pi / ref).
    """

    def __init__(self, hidden_size: int, score_weight: Tensor | None = None):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(hidden_size, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)
        self.mean = None
        if score_weight is not None:
            self.mean = nn.Linear(hidden_size, 1, bias=False)
            self.mean.weight.data.copy_(score_weight.float())

    @classmethod
    def fresh(cls, hidden_size: int, *, score_weight: Tensor | None = None, **_) -> Self:
        return cls(hidden_size, score_weight)

    @classmethod
    def described(cls, description: dict) -> Self:
        size = description["hidden_size"]
        return cls(size, torch.zeros(1, size) if description["mean"] else None)

    def description(self) -> dict:
        return {"hidden_size": self.net[0].in_features, "mean": self.mean is not None}

    def log_sigma(self, hidden: Tensor) -> Tensor:
        """(N,) float32, l = log(sigma / sigma0), in [-k, k]."""
        with full_precision(hidden):
            return bounded(self.net(hidden.float())).squeeze(-1)


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
    """The heads that a run has, as attributes named by the key of their idea; None where it has none."""

    def __init__(self, **modules: nn.Module | None):
        super().__init__()
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
    write_json(directory / "heads.json", {key: head.description() for key, head in heads.present().items()})


def load(directory: Path) -> Heads:
    """The heads of a run directory, bit for bit as they were saved."""
    from safetensors.torch import load_file

    descriptions = read_mapping(directory / "heads.json")
    with telling(f"{directory}/heads.json describes no heads"):
        heads = Heads(**{key: HEADS[key].described(description) for key, description in descriptions.items()})
    with telling(f"{directory}/heads.safetensors does not fit heads.json"):
        heads.load_state_dict(load_file(directory / "heads.safetensors"))
    return heads
