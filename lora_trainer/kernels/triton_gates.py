"""GEGLU and the sum that ends a residual block, each one pass over memory, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_trainer.kernels.launch import launch


@triton.jit
def _geglu(x, y, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < N
    value = tl.load(x + row * 2 * N + columns, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(x + row * 2 * N + N + columns, mask=mask, other=0.0).to(tl.float32)
    cdf = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
    tl.store(y + row * N + columns, (value * gate * cdf).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _geglu_back(x, dy, dx, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < N
    value = tl.load(x + row * 2 * N + columns, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(x + row * 2 * N + N + columns, mask=mask, other=0.0).to(tl.float32)
    slope = tl.load(dy + row * N + columns, mask=mask, other=0.0).to(tl.float32)
    cdf = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    tl.store(dx + row * 2 * N + columns, (slope * gate * cdf).to(dx.dtype.element_ty), mask=mask)
    of_gate = slope * value * (cdf + gate * density)
    tl.store(dx + row * 2 * N + N + columns, of_gate.to(dx.dtype.element_ty), mask=mask)


class TritonGeglu(torch.autograd.Function):
    """x [M, 2 n] to x[:, :n] · gelu(x[:, n:])."""

    @staticmethod
    def forward(ctx, x):
        M, N = x.shape[0], x.shape[1] // 2
        y = x.new_empty(M, N)
        launch(_geglu, (M, triton.cdiv(N, 1024)))(x, y, N, BLOCK=1024)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        M, N = x.shape[0], x.shape[1] // 2
        dx = torch.empty_like(x)
        launch(_geglu_back, (M, triton.cdiv(N, 1024)))(x, dy.contiguous(), dx, N, BLOCK=1024)
        return dx


@triton.jit
def _add(x, bias, residual, y, count, C, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + (at % C), mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


class TritonAdd(torch.autograd.Function):
    """x + bias + residual for channels-last [B, C, H, W]; the gradient passes through."""

    @staticmethod
    def forward(ctx, x, bias, residual):
        y = torch.empty_like(x)
        count = x.numel()
        given = x if bias is None else bias
        launch(_add, (triton.cdiv(count, 1024),))(
            x, given, residual, y, count, x.shape[1], BLOCK=1024, HAS_BIAS=bias is not None
        )
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, Tensor]:
        return dy, None, dy
