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
        draw, scale = site.draw(x.shape[0]), site.scale()
        mask = None if draw is None else draw.mask()
        low = masked(x @ site.down.t(), mask)
        y = F.linear(x, weight, bias).addmm_(low, site.up.t(), alpha=scale)
        ctx.save_for_backward(x, low, weight, mask)
        ctx.site, ctx.scale = site, scale
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight, mask = ctx.saved_tensors
        site, scale = ctx.site, ctx.scale
        # The fast paths of the products want rows that follow each other.
        dy = dy.contiguous()
        dlow = masked(dy @ site.up, mask)
        dx = (dy @ weight).addmm_(dlow, site.down, alpha=scale) if ctx.needs_input_grad[0] else None
        put(site.grad_up, dy.t(), low, scale)
        put(site.grad_down, dlow.t(), x, scale)
        return dx, None, None, None, None, None


def masked(low: Tensor, mask: Tensor | None) -> Tensor:
    """The rank-r product without what is dropped of it."""
    return low if mask is None else low.mul_(mask)


def put(target: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """scale left @ right into a gradient buffer: written over one of the compute dtype, added to an fp32 master's."""
    if target.dtype != left.dtype:
        target.add_(left @ right, alpha=scale)
    elif target.dtype in (torch.float16, torch.bfloat16):
        torch.addmm(target, left, right, beta=0, alpha=scale, out=target)
    else:
        target.addmm_(left, right, alpha=scale)


class GroupNorm(torch.autograd.Function):
    """(gate(norm(x + shift)), x) for x [B, C, H, W] and shift [B, C] or None; backward adds both gradients.

    On a GPU torch norms contiguous pictures alone. What is done before and after it anyway, in a channels-last network,
    also changes the layout: the shift, the gate, and the sum of the gradients.
    """

    @staticmethod
    def forward(ctx, x: Tensor, shift: Tensor | None, norm: nn.GroupNorm, silu: bool) -> tuple[Tensor, Tensor]:
        weight, bias = like(norm.weight, x), like(norm.bias, x)
        moved = x.contiguous() if shift is None else torch.add(x, shift[:, :, None, None], out=contiguous(x))
        ctx.sizes = *x.shape[:2], x.shape[2:].numel(), norm.num_groups
        normed, *stats = torch.native_group_norm(moved, weight, bias, *ctx.sizes, norm.eps)
        y = torch.empty_like(x)
        torch.ops.aten.silu.out(normed, out=y) if silu else y.copy_(normed)
        ctx.save_for_backward(moved, weight, *stats, normed if silu else None)
        ctx.set_materialize_grads(False)
        return y, x.view_as(x)

    @staticmethod
    def backward(ctx, dy: Tensor | None, residual: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return residual, None, None, None
        moved, weight, mean, rstd, normed = ctx.saved_tensors
        if normed is None:
            slope = dy.contiguous()
        else:
            slope = torch.ops.aten.silu_backward.grad_input(dy, normed, grad_input=torch.empty_like(normed))
        wanted = (True, False, False)
        dx = torch.ops.aten.native_group_norm_backward(slope, moved, mean, rstd, weight, *ctx.sizes, wanted)[0]
        shift = dx.sum((2, 3)) if ctx.needs_input_grad[1] else None
        return dx if residual is None else torch.add(dx, residual, out=torch.empty_like(residual)), shift, None, None


def contiguous(x: Tensor) -> Tensor:
    """Room for a tensor of this kind in the contiguous layout."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


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
        if x.is_meta:
            # Shapes alone, of which torch 2.1 computes no operation into a given tensor.
            return x.clone(), x
        return GroupNorm.apply(x, shift, norm, silu)

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
