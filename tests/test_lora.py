"""LoRA as one step of autograd: PEFT's layer, computed otherwise."""

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear
from torch import nn

from discobeta.model.lora import FusedLinear, _LowRankUpdate, fuse

pytestmark = pytest.mark.numeric


class Model(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.first, self.second = nn.Linear(6, 10, bias=bias), nn.Linear(10, 4, bias=bias)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def adapted(fused, bias=True, **settings):
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["first", "second"], **settings)
    if fused:
        fuse(lora)
    model = peft.get_peft_model(Model(bias), lora)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape))
    return model


def kinds(model):
    return {type(part) for part in model.modules() if isinstance(part, Linear)}


def gradients(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    (y.float() ** 2).sum().backward()
    return y, x.grad, {name: w.grad for name, w in model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6)])
def test_values_and_gradients_are_pefts(bias, shape):
    ours, theirs = adapted(True, bias), adapted(False, bias)
    assert kinds(ours) == {FusedLinear} and kinds(theirs) == {Linear}
    x = torch.randn(shape)
    (y, of_x, of_weights), (y2, of_x2, of_weights2) = gradients(ours, x), gradients(theirs, x)
    torch.testing.assert_close(y, y2)
    torch.testing.assert_close(of_x, of_x2)
    assert of_weights.keys() == of_weights2.keys() and len(of_weights) == 4
    for name, gradient in of_weights.items():
        assert (gradient - of_weights2[name]).norm() < 1e-5 * gradient.norm(), name  # float32 sums in another order
        assert gradient.is_contiguous()


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    x, weight, bias, a, b = (torch.randn(*size, dtype=torch.float64) for size in ((7, 6), (5, 6), (5,), (2, 6), (5, 2)))
    for part in (x, a, b):
        part.requires_grad_()
    torch.autograd.gradcheck(lambda x, a, b: _LowRankUpdate.apply(x, weight, bias, a, b, 1.7), (x, a, b))


def test_it_is_what_computes(monkeypatch):
    monkeypatch.setattr(Linear, "forward", None)  # PEFT's own would fail
    adapted(True)(torch.randn(2, 6))


def test_bfloat16_autocast_is_pefts_to_its_rounding():
    ours, theirs, x = adapted(True), adapted(False), torch.randn(9, 6)
    with torch.autocast("cpu", torch.bfloat16):
        (y, _, of_weights), (y2, _, of_weights2) = gradients(ours, x), gradients(theirs, x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, y2, rtol=0.03, atol=0.03 * y2.abs().max().item())  # 8 bits: 1 in 256 a step
    for name, gradient in of_weights.items():
        assert gradient.dtype == torch.float32
        assert (gradient - of_weights2[name]).norm() < 0.03 * of_weights2[name].norm(), name


def test_dropout_is_on_the_adapters_input_alone():
    x = torch.randn(400, 6)
    ours, theirs = adapted(True, lora_dropout=0.5), adapted(False, lora_dropout=0.5)
    outputs = []
    for model in (ours, theirs):
        model.train()
        torch.manual_seed(1)
        outputs.append(model(x))
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    assert not torch.allclose(outputs[0], ours(x))


def test_what_is_not_plain_is_left_to_peft():
    ours, theirs, x = adapted(True), adapted(False), torch.randn(5, 6)
    with ours.disable_adapter(), theirs.disable_adapter():
        torch.testing.assert_close(ours(x), theirs(x))
    seen = []
    ours.base_model.model.first.base_layer.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(ours(x), theirs(x))
    assert seen == [1]
    ours.merge_adapter()
    torch.testing.assert_close(ours(x), theirs(x))
    dora, theirs = adapted(True, use_dora=True), adapted(False, use_dora=True)
    torch.testing.assert_close(dora(x), theirs(x))


def test_a_saved_adapter_is_plain_peft(tmp_path):
    ours, x = adapted(True), torch.randn(5, 6)
    ours.save_pretrained(tmp_path)
    torch.manual_seed(0)
    plain = peft.PeftModel.from_pretrained(Model(True), tmp_path)
    assert kinds(plain) == {Linear}
    torch.testing.assert_close(plain(x), ours(x))


@pytest.mark.parametrize("fused", [True, False])
def test_fused_lora_says_which(settings, fused):
    from discobeta.design.config import RunConfig
    from discobeta.method.dpo import DirectPreference

    config, _ = RunConfig.from_mapping(settings("dpo", fused_lora=fused))
    assert kinds(DirectPreference.start(config)) == {FusedLinear if fused else Linear}
