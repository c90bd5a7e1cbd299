"""By which kernels a GPU computes: those that repeat, and few where a model asks for many."""

from __future__ import annotations

import os
from copy import deepcopy
from functools import cache
from inspect import signature

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discobeta.design.config import RunConfig

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def choose_kernels(config: RunConfig) -> None:
    """To be called before anything is computed on a GPU.

    cuDNN's attention is left out: it plans anew for each shape that it has not seen, and every pass has another. With
    `deterministic: true` kernels repeat bit for bit. Two things that torch does then cost most of a step and are left
    out: it fills each new tensor with NaN, which only who reads what was never written needs, and parses `WORKSPACE` at
    each product of matrices. It insists on this variable once; the workspaces that it then makes stay.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    if not config.deterministic:
        return
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    if WORKSPACE in os.environ:
        return
    os.environ[WORKSPACE] = ":4096:8"
    if torch.cuda.is_available():
        one = torch.ones(1, 1, device="cuda")
        one @ one
        del os.environ[WORKSPACE]


def on_gpu(tensor: Tensor) -> bool:
    """Whether what is computed from the tensor is computed by a GPU's kernels."""
    return tensor.is_cuda


class FusedNorm(nn.Module):
    """Mixed into a model's RMSNorm, y = w x / sqrt(mean(x^2) + eps): on a GPU one kernel instead of six."""

    def forward(self, x: Tensor) -> Tensor:
        if not on_gpu(x) or x.dtype != self.weight.dtype:
            return super().forward(x)
        return F.rms_norm(x, self.weight.shape, self.weight, epsilon_of(self)).to(x.dtype)


def epsilon_of(norm: nn.Module) -> float | None:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


@cache
def _fused(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (FusedNorm, kind), {})


@torch.no_grad()
def fuse_norms(model: nn.Module) -> nn.Module:
    """Every RMSNorm of the model, which is on the CPU or without values, as a `FusedNorm`; not those that compute
    something else (Gemma's 1 + w), or of more than x (a gate). The two pass if || y_fused - y || <= 8 eps || y ||, eps
    being the distance of two numbers near 1: they round in different places."""
    for norm in model.modules():
        kind, weight = type(norm), getattr(norm, "weight", None)
        if not kind.__name__.endswith("RMSNorm") or weight is None or epsilon_of(norm) is None:
            continue
        if weight.ndim != 1 or len(signature(kind.forward).parameters) != 2:
            continue
        if [name for name, _ in (*norm.named_parameters(), *norm.named_buffers())] != ["weight"]:  # a bias
            continue
        tried = deepcopy(norm).to_empty(device="cpu")  # with weights of its own: it may have none yet
        tried.weight.copy_(torch.linspace(0.5, 1.5, len(weight), device="cpu"))
        x = torch.linspace(-2, 3, len(weight), dtype=weight.dtype, device="cpu")[None]
        plain, fused = tried(x).float(), F.rms_norm(x, weight.shape, tried.weight, epsilon_of(norm)).float()
        if (fused - plain).norm() <= 8 * torch.finfo(x.dtype).eps * plain.norm():
            norm.__class__ = _fused(kind)
    return model
