"""The operations of a fast step in plain torch: they run everywhere, and the Triton kernels are tested against them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_trainer.kernels.site import Site


class LoraLinear(torch.autograd.Function):
    """y = x Wᵀ + b + ((x Aᵀ) ∘ m s) Bᵀ, and only the gradients that a frozen W needs.

    x [M, in], W [out, in], A [r, in], B [out, r], s the scale, m the dropout mask. Kept for the backward pass: x and
    the rank-r product. The gradients of A and B go straight into the site's buffers.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, site: Site, down: Tensor, up: Tensor) -> Tensor:
        draw = site.draw(x.shape[0])
        factor = site.scale() if draw is None else draw.mask() * site.scale()
        low = x @ site.down.t() * factor
        y = F.linear(x, weight, bias).addmm_(low, site.up.t())
        ctx.save_for_backward(x, low, weight)
        ctx.site, ctx.factor = site, factor
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight = ctx.saved_tensors
        site = ctx.site
        # The fast paths of the products want rows that follow each other.
        dy = dy.contiguous()
        dlow = dy @ site.up * ctx.factor
        dx = (dy @ weight).addmm_(dlow, site.down) if ctx.needs_input_grad[0] else None
        put(site.grad_up, dy.t(), low)
        put(site.grad_down, dlow.t(), x)
        return dx, None, None, None, None, None


def put(target: Tensor, left: Tensor, right: Tensor) -> None:
    """left @ right into a gradient buffer: written over one of the compute dtype, added to an fp32 master's."""
    if target.dtype != left.dtype:
        target.add_(left @ right)
    elif target.dtype in (torch.float16, torch.bfloat16):
        torch.mm(left, right, out=target)
    else:
        target.addmm_(left, right)


class PlainOps:
    """Plain torch. `collects`: half-precision gradients are written to buffers of their own."""

    name = "plain torch"
    collects = True

    def lora_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, site: Site, residual: Tensor | None = None
    ) -> Tensor:
        """x [M, in] to [M, out], plus `residual` of that shape."""
        y = LoraLinear.apply(x, weight, bias, site, *site.parameters)
        return y if residual is None else y + residual

    def group_norm(
        self, x: Tensor, norm: nn.GroupNorm, *, silu: bool, shift: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """GroupNorm (and SiLU) of x [B, C, H, W] plus `shift` [B, C], and x itself for the residual path."""
        shifted = x if shift is None else x + shift[:, :, None, None]
        y = F.group_norm(shifted, norm.num_groups, like(norm.weight, x), like(norm.bias, x), norm.eps)
        return (F.silu(y) if silu else y).to(x.dtype), x

    def layer_norm(self, x: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """LayerNorm over the last dimension, and x itself for the residual path."""
        y = F.layer_norm(x, norm.normalized_shape, like(norm.weight, x), like(norm.bias, x), norm.eps)
        return y.to(x.dtype), x

    def geglu(self, x: Tensor) -> Tensor:
        """[M, 2 n] to [M, n]: the first half times GELU of the second (Shazeer 2020, arXiv:2002.05202)."""
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)

    def add(self, x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        """x + bias + residual for [B, C, H, W]."""
        return x + residual if bias is None else x + bias[None, :, None, None] + residual


def like(weight: Tensor, x: Tensor) -> Tensor:
    """`weight` in the dtype of `x`; the same tensor where it has it already."""
    return weight if weight.dtype == x.dtype else weight.to(x.dtype)
