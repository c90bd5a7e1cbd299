"""LoRA as one step of autograd: PEFT's layer, weights, names and files, in fewer passes over memory."""

from __future__ import annotations

import torch
from peft import PeftConfig
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn import functional as F


class _LowRankUpdate(torch.autograd.Function):
    """y = W x + c + s B A x for (..., in) inputs, with frozen W and c.

    Scale and sum are done within the matrix products. Given g = dL/dy: dL/dB = s g (A x)', dL/dA = s B' g x',
    dL/dx = W' g + s A' B' g.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        inner = a @ x.reshape(-1, x.shape[-1]).T  # (r, tokens): with r rows, products are quicker
        ctx.save_for_backward(x, weight, a, b, inner)
        ctx.scale = scale
        y = F.linear(x, weight, bias)
        y.view(-1, y.shape[-1]).addmm_(inner.T, b.T, alpha=scale)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, inner = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        of_inner = b.T.contiguous() @ flat.T
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (flat @ weight).addmm_(of_inner.T, a, alpha=ctx.scale).view(x.shape)
        of_a = torch.addmm(a, of_inner, x.reshape(-1, x.shape[-1]), beta=0, alpha=ctx.scale)
        of_b = torch.addmm(b.T, inner, flat, beta=0, alpha=ctx.scale).T.contiguous()
        return of_x, None, None, of_a, of_b, None


def fuse(settings: PeftConfig) -> None:
    """Have PEFT take `FusedLinear` for the nn.Linear layers of an adapter that is made by these settings."""
    settings._register_custom_module({nn.Linear: FusedLinear})  # PEFT's way to bring a layer, not kept in any file


class FusedLinear(Linear):
    """PEFT's LoRA of an nn.Linear. Whatever is not plain about it is left to PEFT."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        base = self.get_base_layer()
        if not self._is_plain(base) or args or kwargs:
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        a, b, scale = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        weight, bias = base.weight, base.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, a, b = (tensor.to(dtype) for tensor in (x, weight, a, b))
            bias = None if bias is None else bias.to(dtype)
        if not x.dtype == weight.dtype == a.dtype == b.dtype:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            if self.training and getattr(self.lora_dropout[name], "p", 0):  # an Identity has none
                inner = F.linear(self.lora_dropout[name](x), a) * scale
                return F.linear(x, weight, bias) + F.linear(inner, b)
            return _LowRankUpdate.apply(x, weight, bias, a, b, scale)

    def _is_plain(self, base: nn.Module) -> bool:
        """One active adapter, W + s B A and nothing else, on a frozen nn.Linear that nobody listens to."""
        return (
            type(base) is nn.Linear
            and not (self.disable_adapters or self.merged or self.lora_variant or self.fan_in_fan_out)
            and not base.weight.requires_grad
            and len(self.active_adapters) == 1
            and self.active_adapters[0] in self.lora_A
            and not self.lora_bias[self.active_adapters[0]]
            and not (base._forward_hooks or base._forward_pre_hooks)
        )
