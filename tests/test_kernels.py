"""Which kernels a GPU computes with, as far as that can be seen without one."""

import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from discobeta.design.config import RunConfig
from discobeta.model import kernels

SMALL = {
    "vocab_size": 16, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4,
}  # fmt: skip


def model_of(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model.eval()


def fused(model):
    return [name for name, part in model.named_modules() if isinstance(part, kernels.FusedNorm)]


@pytest.mark.parametrize(("kind", "count"), [("qwen3", 5), ("qwen2", 3), ("llama", 3), ("mistral", 3)])
def test_the_norms_of_a_model_are_fused_and_nothing_changes_on_a_cpu(kind, count):
    plain, model, ids = model_of(kind), kernels.fuse_norms(model_of(kind)), torch.tensor([[1, 2, 3, 4]])
    assert len(fused(model)) == count
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert [type(a).__name__ for a in model.modules()] == [type(a).__name__ for a in plain.modules()]
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_a_norm_that_is_another_is_left_alone():
    assert fused(kernels.fuse_norms(model_of("gemma"))) == []  # x (1 + w)


class PlainRMSNorm(nn.Module):
    def __init__(self, width=8, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(width) + 0.5), eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class GatedRMSNorm(PlainRMSNorm):
    def forward(self, x, gate=None):
        return super().forward(x if gate is None else x * gate)


class WeightlessRMSNorm(PlainRMSNorm):
    def __init__(self):
        super().__init__()
        self.weight = None

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)


class OtherEpsRMSNorm(PlainRMSNorm):
    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps + 1e-3)


class BiasedRMSNorm(PlainRMSNorm):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return super().forward(x) + self.bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_a_norm_of_x_alone_with_a_weight_and_this_epsilon_is_fused(dtype):
    kinds = PlainRMSNorm, GatedRMSNorm, WeightlessRMSNorm, OtherEpsRMSNorm, BiasedRMSNorm
    model = nn.ModuleList([kind() for kind in kinds]).to(dtype)
    assert fused(kernels.fuse_norms(model)) == ["0"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_norm_is_one_function_of_the_same_value(dtype, monkeypatch):
    class OnGpu(torch.Tensor):
        is_cuda = True

    model = kernels.fuse_norms(model_of("qwen3").to(dtype))
    norm, x = model.model.norm, torch.randn(5, 8).to(dtype)
    wanted, asked, plain = norm(x), [], F.rms_norm

    def watched(x, *more):
        asked.append(more)
        return plain(x.as_subclass(torch.Tensor), *more)

    monkeypatch.setattr(F, "rms_norm", watched)
    found = norm(x.as_subclass(OnGpu))
    assert len(asked) == 1 and found.dtype == dtype
    torch.testing.assert_close(found, wanted)
    other = torch.float64 if dtype == torch.float32 else torch.float32
    norm(x.to(other).as_subclass(OnGpu))
    assert len(asked) == 1  # of two dtypes: the model's own


def test_deterministic_is_asked_for_and_nothing_is_filled(settings, monkeypatch):
    monkeypatch.delenv(kernels.WORKSPACE, raising=False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.cudnn_sdp_enabled()
    torch.use_deterministic_algorithms(False)  # whatever another test's study has asked for
    try:
        kernels.choose_kernels(RunConfig.from_mapping(settings("dpo"))[0])
        assert not torch.are_deterministic_algorithms_enabled() and kernels.WORKSPACE not in os.environ
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        kernels.choose_kernels(RunConfig.from_mapping(settings("dpo", deterministic=True))[0])
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ.pop(kernels.WORKSPACE) == ":4096:8"  # no GPU is there, which would have been asked once
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cuda.enable_cudnn_sdp(before[1])
