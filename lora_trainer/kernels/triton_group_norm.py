"""GroupNorm + SiLU on channels-last pictures in Triton, with the residual path's gradient added.

Only the gradient of the input: the norm's weights are frozen.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_trainer.kernels.launch import launch

# Up to this many pixels one program walks over a whole group; larger pictures are split over several.
WALK = 256
ROWS = 32


@triton.jit
def _tile(row, HW, base, first_group, C, GS: tl.constexpr, GSP: tl.constexpr, NG: tl.constexpr, ROWS: tl.constexpr):
    """Offsets [ROWS, NG, GSP] of some rows and groups of picture `base`, the channels, and which are inside."""
    rows = row + tl.arange(0, ROWS)
    groups = first_group + tl.arange(0, NG)
    inner = tl.arange(0, GSP)
    channels = groups[:, None] * GS + inner[None, :]
    inside = (inner < GS)[None, :] & (channels < C)
    at = (base + rows).to(tl.int64)[:, None, None] * C + channels[None, :, :]
    return at, channels, inside, (rows < HW)[:, None, None] & inside[None, :, :]


@triton.jit
def _load(x, shift, at, channels, inside, mask, b, C, HAS_SHIFT: tl.constexpr):
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        value += tl.load(shift + b * C + channels, mask=inside, other=0.0).to(tl.float32)[None, :, :]
    return value


@triton.jit
def _gate(z, SILU: tl.constexpr):
    if SILU:
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def _gate_slope(z, SILU: tl.constexpr):
    if SILU:
        s = tl.sigmoid(z)
        return s * (1 + z * (1 - s))
    return z * 0 + 1


@triton.jit
def _gn_sums(
    x, shift, partial, HW, C, G, rows_per_split,
    GS: tl.constexpr, GSP: tl.constexpr, NG: tl.constexpr, ROWS: tl.constexpr, HAS_SHIFT: tl.constexpr,
):  # fmt: skip
    """partial [B, G, splits, 2]: sums of the values and of their squares, about each group's first value."""
    b, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = block * NG
    groups = first + tl.arange(0, NG)
    origin = _origin(x, shift, b, groups, HW, C, GS, HAS_SHIFT)
    total, squares = tl.zeros((ROWS, NG, GSP), tl.float32), tl.zeros((ROWS, NG, GSP), tl.float32)
    start = split * rows_per_split
    for row in range(start, tl.minimum(start + rows_per_split, HW), ROWS):
        at, channels, inside, mask = _tile(row, HW, b * HW, first, C, GS, GSP, NG, ROWS)
        value = _load(x, shift, at, channels, inside, mask, b, C, HAS_SHIFT)
        value = tl.where(mask, value - origin[None, :, None], 0.0)
        total += value
        squares += value * value
    _store_sums(partial, total, squares, b, groups, G, split)


@triton.jit
def _store_sums(partial, first, second, b, groups, G, split):
    """Two tiles [ROWS, NG, GSP], summed over rows and each group's channels, as one split's share."""
    at = partial + ((b * G + groups) * tl.num_programs(2) + split) * 2
    tl.store(at, tl.sum(tl.sum(first, 2), 0), mask=groups < G)
    tl.store(at + 1, tl.sum(tl.sum(second, 2), 0), mask=groups < G)


@triton.jit
def _origin(x, shift, b, groups, HW, C, GS: tl.constexpr, HAS_SHIFT: tl.constexpr):
    inside = groups * GS < C
    origin = tl.load(x + (b * HW).to(tl.int64) * C + groups * GS, mask=inside, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        origin += tl.load(shift + b * C + groups * GS, mask=inside, other=0.0).to(tl.float32)
    return origin


@triton.jit
def _reduced(partial, b, groups, G, splits, SPLITS: tl.constexpr):
    """The two sums of each group over all splits."""
    parts = tl.arange(0, SPLITS)
    at = partial + ((b * G + groups)[:, None] * splits + parts[None, :]) * 2
    mask = (groups < G)[:, None] & (parts < splits)[None, :]
    return tl.sum(tl.load(at, mask=mask, other=0.0), 1), tl.sum(tl.load(at + 1, mask=mask, other=0.0), 1)


@triton.jit
def _gn_apply(
    x, shift, weight, bias, partial, y, stats, HW, C, G, splits, rows_per_program, eps,
    GS: tl.constexpr, GSP: tl.constexpr, NG: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    HAS_SHIFT: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y = gate(norm(x + shift)); stats [B, G, 2] mean and reciprocal deviation."""
    b, block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = block * NG
    groups = first + tl.arange(0, NG)
    total, squares = _reduced(partial, b, groups, G, splits, SPLITS)
    count = HW * GS
    about = total / count
    mean = about + _origin(x, shift, b, groups, HW, C, GS, HAS_SHIFT)
    rstd = tl.rsqrt(squares / count - about * about + eps)
    if part == 0:
        tl.store(stats + (b * G + groups) * 2, mean, mask=groups < G)
        tl.store(stats + (b * G + groups) * 2 + 1, rstd, mask=groups < G)
    start = part * rows_per_program
    for row in range(start, tl.minimum(start + rows_per_program, HW), ROWS):
        at, channels, inside, mask = _tile(row, HW, b * HW, first, C, GS, GSP, NG, ROWS)
        value = _load(x, shift, at, channels, inside, mask, b, C, HAS_SHIFT)
        w = tl.load(weight + channels, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)
        z = (value - mean[None, :, None]) * rstd[None, :, None] * w[None, :, :] + c[None, :, :]
        tl.store(y + at, _gate(z, SILU).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _gn_slopes(
    x, shift, weight, bias, stats, dy, at, channels, inside, mask, b, first, C, G,
    NG: tl.constexpr, HAS_SHIFT: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """(normalised value, gradient with respect to it, reciprocal deviation) of a tile."""
    groups = first + tl.arange(0, NG)
    mean = tl.load(stats + (b * G + groups) * 2, mask=groups < G, other=0.0)
    rstd = tl.load(stats + (b * G + groups) * 2 + 1, mask=groups < G, other=0.0)
    value = _load(x, shift, at, channels, inside, mask, b, C, HAS_SHIFT)
    w = tl.load(weight + channels, mask=inside, other=0.0).to(tl.float32)[None, :, :]
    c = tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)[None, :, :]
    normed = (value - mean[None, :, None]) * rstd[None, :, None]
    slope = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32) * w * _gate_slope(normed * w + c, SILU)
    return tl.where(mask, normed, 0.0), tl.where(mask, slope, 0.0), rstd


@triton.jit
def _gn_back_sums(
    x, shift, weight, bias, stats, dy, partial, HW, C, G, rows_per_split,
    GS: tl.constexpr, GSP: tl.constexpr, NG: tl.constexpr, ROWS: tl.constexpr,
    HAS_SHIFT: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """partial [B, G, splits, 2]: sums of the gradient and of its product with the normalised values."""
    b, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = block * NG
    groups = first + tl.arange(0, NG)
    total, product = tl.zeros((ROWS, NG, GSP), tl.float32), tl.zeros((ROWS, NG, GSP), tl.float32)
    start = split * rows_per_split
    for row in range(start, tl.minimum(start + rows_per_split, HW), ROWS):
        at, channels, inside, mask = _tile(row, HW, b * HW, first, C, GS, GSP, NG, ROWS)
        normed, slope, _ = _gn_slopes(
            x, shift, weight, bias, stats, dy, at, channels, inside, mask, b, first, C, G, NG, HAS_SHIFT, SILU
        )
        total += slope
        product += slope * normed
    _store_sums(partial, total, product, b, groups, G, split)


@triton.jit
def _gn_back_apply(
    x, shift, weight, bias, stats, dy, residual, partial, dx, HW, C, G, splits, rows_per_program,
    GS: tl.constexpr, GSP: tl.constexpr, NG: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    HAS_SHIFT: tl.constexpr, SILU: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    b, block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = block * NG
    groups = first + tl.arange(0, NG)
    total, product = _reduced(partial, b, groups, G, splits, SPLITS)
    count = HW * GS
    start = part * rows_per_program
    for row in range(start, tl.minimum(start + rows_per_program, HW), ROWS):
        at, channels, inside, mask = _tile(row, HW, b * HW, first, C, GS, GSP, NG, ROWS)
        normed, slope, rstd = _gn_slopes(
            x, shift, weight, bias, stats, dy, at, channels, inside, mask, b, first, C, G, NG, HAS_SHIFT, SILU
        )
        mean_slope, mean_product = (total / count)[None, :, None], (product / count)[None, :, None]
        value = rstd[None, :, None] * (slope - mean_slope - normed * mean_product)
        if HAS_RESIDUAL:
            value += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + at, value.to(dx.dtype.element_ty), mask=mask)


class Plan:
    """How a GroupNorm of [B, C, H, W] is cut into programs."""

    def __init__(self, x: Tensor, groups: int) -> None:
        self.B, self.C, height, width = x.shape
        self.HW, self.G = height * width, groups
        size = self.C // groups
        # Neighbouring groups together fill whole cache lines.
        count = max(1, min(8, 128 // triton.next_power_of_2(size)))
        self.tile = {"GS": size, "GSP": triton.next_power_of_2(size), "NG": count, "ROWS": ROWS}
        blocks = triton.cdiv(groups, count)
        wanted = max(1, 1056 // (self.B * blocks))
        self.splits = 1 if self.HW <= WALK else min(wanted, triton.cdiv(self.HW, ROWS), 64)
        self.rows = triton.cdiv(triton.cdiv(self.HW, self.splits), ROWS) * ROWS
        self.splits = triton.cdiv(self.HW, self.rows)
        parts = min(triton.cdiv(self.HW, ROWS), max(1, 1056 // (self.B * blocks)))
        self.apply_rows = triton.cdiv(triton.cdiv(self.HW, parts), ROWS) * ROWS
        self.sums_grid = (self.B, blocks, self.splits)
        self.apply_grid = (self.B, blocks, triton.cdiv(self.HW, self.apply_rows))
        self.padded_splits = triton.next_power_of_2(self.splits)


class TritonGroupNorm(torch.autograd.Function):
    """(gate(norm(x + shift)), x) for channels-last x; backward adds both gradients."""

    @staticmethod
    def forward(ctx, x, shift, norm, silu):
        plan = Plan(x, norm.num_groups)
        y = torch.empty_like(x)
        partial = x.new_empty(plan.B, plan.G, plan.splits, 2, dtype=torch.float32)
        stats = x.new_empty(plan.B, plan.G, 2, dtype=torch.float32)
        flags = {"HAS_SHIFT": shift is not None}
        moved = x if shift is None else shift
        launch(_gn_sums, plan.sums_grid)(x, moved, partial, plan.HW, plan.C, plan.G, plan.rows, **plan.tile, **flags)
        launch(_gn_apply, plan.apply_grid)(
            x, moved, norm.weight, norm.bias, partial, y, stats, plan.HW, plan.C, plan.G, plan.splits,
            plan.apply_rows, norm.eps, SPLITS=plan.padded_splits, SILU=silu, **plan.tile, **flags,
        )  # fmt: skip
        ctx.save_for_backward(x, moved, norm.weight, norm.bias, stats)
        ctx.plan, ctx.flags = plan, flags | {"SILU": silu}
        ctx.set_materialize_grads(False)
        return y, x.view_as(x)

    @staticmethod
    def backward(ctx, dy, residual):
        x, moved, weight, bias, stats = ctx.saved_tensors
        plan = ctx.plan
        dy = dy.contiguous(memory_format=torch.channels_last)
        has = residual is not None
        residual = residual.contiguous(memory_format=torch.channels_last) if has else dy
        partial = x.new_empty(plan.B, plan.G, plan.splits, 2, dtype=torch.float32)
        dx = torch.empty_like(x)
        given = (x, moved, weight, bias, stats, dy)
        sizes = (plan.HW, plan.C, plan.G)
        launch(_gn_back_sums, plan.sums_grid)(*given, partial, *sizes, plan.rows, **plan.tile, **ctx.flags)
        launch(_gn_back_apply, plan.apply_grid)(
            *given, residual, partial, dx, *sizes, plan.splits, plan.apply_rows,
            SPLITS=plan.padded_splits, HAS_RESIDUAL=has, **plan.tile, **ctx.flags,
        )  # fmt: skip
        return dx, None, None, None
