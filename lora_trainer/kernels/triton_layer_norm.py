"""LayerNorm in Triton, with the residual path's gradient added. Only the gradient of the input."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lora_trainer.kernels.launch import launch


@triton.jit
def _ln(x, weight, bias, y, stats, M, C, eps, CP: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, CP)
    inside = columns < C
    mask = (rows < M)[:, None] & inside[None, :]
    at = rows.to(tl.int64)[:, None] * C + columns[None, :]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(value, 1) / C
    centred = tl.where(mask, value - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, (centred * rstd[:, None] * w[None, :] + c[None, :]).to(y.dtype.element_ty), mask=mask)
    tl.store(stats + rows * 2, mean, mask=rows < M)
    tl.store(stats + rows * 2 + 1, rstd, mask=rows < M)


@triton.jit
def _ln_back(
    x, weight, stats, dy, residual, dx, M, C, CP: tl.constexpr, ROWS: tl.constexpr, HAS_RESIDUAL: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, CP)
    inside = columns < C
    mask = (rows < M)[:, None] & inside[None, :]
    at = rows.to(tl.int64)[:, None] * C + columns[None, :]
    mean = tl.load(stats + rows * 2, mask=rows < M, other=0.0)
    rstd = tl.load(stats + rows * 2 + 1, mask=rows < M, other=0.0)
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    normed = tl.where(mask, (value - mean[:, None]) * rstd[:, None], 0.0)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32) * w[None, :]
    total, product = tl.sum(slope, 1) / C, tl.sum(slope * normed, 1) / C
    value = rstd[:, None] * (slope - total[:, None] - normed * product[:, None])
    if HAS_RESIDUAL:
        value += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx + at, value.to(dx.dtype.element_ty), mask=mask)


class TritonLayerNorm(torch.autograd.Function):
    """(norm(x), x) over the last dimension; backward adds both gradients."""

    @staticmethod
    def forward(ctx, x, norm):
        flat = x.reshape(-1, x.shape[-1])
        M, C = flat.shape
        y = torch.empty_like(x)
        stats = x.new_empty(M, 2, dtype=torch.float32)
        ctx.shape = {"CP": triton.next_power_of_2(C), "ROWS": 4 if C <= 512 else 2}
        grid = (triton.cdiv(M, ctx.shape["ROWS"]),)
        launch(_ln, grid)(flat, norm.weight, norm.bias, y, stats, M, C, norm.eps, **ctx.shape)
        ctx.save_for_backward(x, norm.weight, stats)
        ctx.set_materialize_grads(False)
        return y, x.view_as(x)

    @staticmethod
    def backward(ctx, dy, residual):
        x, weight, stats = ctx.saved_tensors
        dy, has = dy.contiguous(), residual is not None
        residual = residual.contiguous() if has else dy
        M, C = stats.shape[0], x.shape[-1]
        dx = torch.empty_like(x)
        grid = (triton.cdiv(M, ctx.shape["ROWS"]),)
        launch(_ln_back, grid)(x, weight, stats, dy, residual, dx, M, C, HAS_RESIDUAL=has, **ctx.shape)
        return dx, None
