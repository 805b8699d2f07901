"""LoRA on a frozen linear layer in Triton: one kernel forward, two backward.

A low-rank product beside a frozen one moves as much memory as the frozen one when it is computed on its own. Here the
rank-r product is accumulated over the tiles that the frozen product loads anyway, and added in its epilogue; backward
is the same kernel on transposed weights, and one more adds both adapters' gradients to the fp32 buffers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_trainer.kernels.plain import like
from lora_trainer.kernels.site import Draw, Site

# Products of fewer rows than a matrix unit takes are padded to it.
MIN_RANK = 16


@triton.jit
def keep(keys, row, column, rows_per_sample, rank, offset, threshold):
    """Entry (row, column) of the dropout mask: `randomness.keep_mask` (lowbias32) in Triton."""
    sample = row // rows_per_sample
    first = tl.load(keys + sample * 2)[:, None]
    second = tl.load(keys + sample * 2 + 1)[:, None]
    x = (offset + (row % rows_per_sample)[:, None] * rank + column[None, :]).to(tl.uint32) ^ first.to(
        tl.uint32, bitcast=True
    )
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= second.to(tl.uint32, bitcast=True)
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x.to(tl.int32, bitcast=True) >= threshold


@triton.jit
def _product(
    x, w, bias, residual, p, q, y, low, keys,
    M, N, K, rank, stride_wk, stride_wn, stride_pk, stride_pr, stride_qr, stride_qn,
    scale, kept_scale, rows_per_sample, offset, threshold,
    RANK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x w (+ bias) + low q (+ residual), low [M, RANK] = scale (x p) ∘ mask.

    x, y, residual and low are row-major; w [K, N], p [K, rank] and q [rank, N] have any strides.
    """
    pid = tl.program_id(0)
    blocks_m, blocks_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    # Programs that run together share rows and columns in the L2 cache.
    width = GROUP * blocks_n
    first = (pid // width) * GROUP
    height = tl.minimum(blocks_m - first, GROUP)
    block_m = first + (pid % width) % height
    block_n = (pid % width) // height
    rows = block_m * BM + tl.arange(0, BM)
    columns = block_n * BN + tl.arange(0, BN)
    ranks = tl.arange(0, RANK)
    ks = tl.arange(0, BK)
    in_rows, in_columns, in_rank = rows < M, columns < N, ranks < rank
    x_at = x + rows[:, None].to(tl.int64) * K + ks[None, :]
    w_at = w + ks[:, None] * stride_wk + columns[None, :] * stride_wn
    p_at = p + ks[:, None] * stride_pk + ranks[None, :] * stride_pr
    total = tl.zeros((BM, BN), tl.float32)
    inner = tl.zeros((BM, RANK), tl.float32)
    for k in range(0, K, BK):
        in_k = ks < K - k
        x_tile = tl.load(x_at, mask=in_rows[:, None] & in_k[None, :], other=0.0)
        w_tile = tl.load(w_at, mask=in_k[:, None] & in_columns[None, :], other=0.0)
        p_tile = tl.load(p_at, mask=in_k[:, None] & in_rank[None, :], other=0.0)
        total = tl.dot(x_tile, w_tile, total)
        inner = tl.dot(x_tile, p_tile, inner)
        x_at += BK
        w_at += BK * stride_wk
        p_at += BK * stride_pk
    if DROPOUT:
        kept = keep(keys, tl.minimum(rows, M - 1), ranks, rows_per_sample, rank, offset, threshold)
        inner = tl.where(kept, inner * kept_scale, 0.0)
    else:
        inner = inner * scale
    inner = inner.to(x.dtype.element_ty)
    if block_n == 0:
        tl.store(low + rows[:, None] * RANK + ranks[None, :], inner, mask=in_rows[:, None])
    q_tile = tl.load(
        q + ranks[:, None] * stride_qr + columns[None, :] * stride_qn,
        mask=in_rank[:, None] & in_columns[None, :], other=0.0,
    )  # fmt: skip
    total = tl.dot(inner, q_tile, total)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    at = rows[:, None].to(tl.int64) * N + columns[None, :]
    inside = in_rows[:, None] & in_columns[None, :]
    if HAS_RESIDUAL:
        total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _low(
    x, p, low, keys, M, K, rank, stride_pk, stride_pr, scale, kept_scale, rows_per_sample, offset, threshold,
    RANK: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """low [M, RANK] = scale (x p) ∘ mask alone, where nobody asks for the gradient of the input."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    ranks = tl.arange(0, RANK)
    ks = tl.arange(0, BK)
    in_rows, in_rank = rows < M, ranks < rank
    inner = tl.zeros((BM, RANK), tl.float32)
    for k in range(0, K, BK):
        in_k = ks < K - k
        x_tile = tl.load(
            x + rows[:, None].to(tl.int64) * K + k + ks[None, :], mask=in_rows[:, None] & in_k[None, :], other=0.0
        )
        p_tile = tl.load(
            p + (k + ks[:, None]) * stride_pk + ranks[None, :] * stride_pr,
            mask=in_k[:, None] & in_rank[None, :], other=0.0,
        )  # fmt: skip
        inner = tl.dot(x_tile, p_tile, inner)
    if DROPOUT:
        kept = keep(keys, tl.minimum(rows, M - 1), ranks, rows_per_sample, rank, offset, threshold)
        inner = tl.where(kept, inner * kept_scale, 0.0)
    else:
        inner = inner * scale
    tl.store(low + rows[:, None] * RANK + ranks[None, :], inner.to(x.dtype.element_ty), mask=in_rows[:, None])


@triton.jit
def _gradients(
    dy, low, grad_up, N, x, dlow, grad_down, K, M, rank, rows_per_split,
    RANK: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """grad_up [N, rank] += dyᵀ low and grad_down [rank, K] += dlowᵀ x, a block of columns and a share of rows each."""
    pid = tl.program_id(0)
    blocks_up = tl.cdiv(N, BC)
    ranks = tl.arange(0, RANK)
    start = tl.program_id(1) * rows_per_split
    stop = tl.minimum(start + rows_per_split, M)
    if pid < blocks_up:
        columns = pid * BC + tl.arange(0, BC)
        total = _columns(dy, low, N, columns, start, stop, RANK, BM, BC)
        at = grad_up + columns[:, None] * rank + ranks[None, :]
        tl.atomic_add(at, total, mask=(columns < N)[:, None] & (ranks < rank)[None, :], sem="relaxed")
    else:
        columns = (pid - blocks_up) * BC + tl.arange(0, BC)
        total = _columns(x, dlow, K, columns, start, stop, RANK, BM, BC)
        at = grad_down + ranks[None, :] * K + columns[:, None]
        tl.atomic_add(at, total, mask=(columns < K)[:, None] & (ranks < rank)[None, :], sem="relaxed")


@triton.jit
def _columns(wide, narrow, N, columns, start, stop, RANK: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    """[BC, RANK] = wide[start:stop, columns]ᵀ narrow[start:stop]."""
    ranks = tl.arange(0, RANK)
    total = tl.zeros((BC, RANK), tl.float32)
    for row in range(start, stop, BM):
        rows = row + tl.arange(0, BM)
        inside = rows < stop
        wide_tile = tl.load(
            wide + rows[None, :].to(tl.int64) * N + columns[:, None],
            mask=inside[None, :] & (columns < N)[:, None], other=0.0,
        )  # fmt: skip
        narrow_tile = tl.load(narrow + rows[:, None] * RANK + ranks[None, :], mask=inside[:, None], other=0.0)
        total = tl.dot(wide_tile, narrow_tile, total)
    return total


class TritonLoraLinear(torch.autograd.Function):
    """As `plain.LoraLinear`, with the residual added in the epilogue. Saves x and the rank-r product."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, site, down, up):  # noqa: ANN001, ANN205
        draw = site.draw(x.shape[0])
        y, low = product(x, weight.t(), site.down.t(), site.up.t(), Extra(site.scale(), draw, bias, residual))
        ctx.save_for_backward(x, low, weight)
        ctx.site, ctx.scale, ctx.draw = site, site.scale(), draw
        return y

    @staticmethod
    def backward(ctx, dy):  # noqa: ANN001, ANN205
        x, low, weight = ctx.saved_tensors
        site, extra = ctx.site, Extra(ctx.scale, ctx.draw)
        residual = dy if ctx.needs_input_grad[3] else None
        dy = dy.contiguous()
        if ctx.needs_input_grad[0]:
            dx, dlow = product(dy, weight, site.up, site.down, extra)
        else:
            dx, dlow = None, low_product(dy, site.up, extra)
        gradients(dy, low, x, dlow, site)
        return dx, None, None, residual, None, None, None


class Extra:
    """What a product adds: the LoRA's scale and dropout, a bias [N], a residual [M, N]."""

    def __init__(
        self, scale: float, draw: Draw | None, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> None:
        self.scale, self.draw = scale, draw
        self.bias, self.residual = bias, residual

    def dropout(self, rows: int, nowhere: Tensor) -> tuple:
        """keys, kept scale, rows a sample, offset, threshold; `nowhere` stands for the keys where there is none."""
        if self.draw is None:
            return nowhere, 1.0, 1, 0, 0
        draw = self.draw
        per_sample = rows // draw.keys.shape[0]
        return draw.keys, self.scale / (1 - draw.dropout), per_sample, draw.offset, threshold_of(draw.dropout)


def threshold_of(dropout: float) -> int:
    """The int32 below which a `dropout` share of all lie."""
    return int(dropout * (1 << 32)) - (1 << 31)


def padded(rank: int) -> int:
    return max(MIN_RANK, triton.next_power_of_2(rank))


def product(x: Tensor, w: Tensor, p: Tensor, q: Tensor, extra: Extra) -> tuple[Tensor, Tensor]:
    """(x w + low q + bias + residual [M, N], low [M, padded rank]) of x [M, K], w [K, N], p [K, r], q [r, N]."""
    (M, K), N, rank = x.shape, w.shape[1], p.shape[1]
    w = like(w, x)
    y, low = x.new_empty(M, N), x.new_empty(M, padded(rank))
    keys, kept_scale, per_sample, offset, threshold = extra.dropout(M, x)
    bias = extra.bias
    tile = tiles(M, N, K)
    grid = (triton.cdiv(M, tile["BM"]) * triton.cdiv(N, tile["BN"]),)
    _product[grid](
        x, w, x if bias is None else bias, x if extra.residual is None else extra.residual, p, q, y, low, keys,
        M, N, K, rank, w.stride(0), w.stride(1), p.stride(0), p.stride(1), q.stride(0), q.stride(1),
        extra.scale, kept_scale, per_sample, offset, threshold,
        RANK=padded(rank), HAS_BIAS=bias is not None, HAS_RESIDUAL=extra.residual is not None,
        DROPOUT=extra.draw is not None, **tile,
    )  # fmt: skip
    return y, low


def low_product(x: Tensor, p: Tensor, extra: Extra) -> Tensor:
    """The rank-r part of `product` alone: [M, padded rank]."""
    (M, K), rank = x.shape, p.shape[1]
    low = x.new_empty(M, padded(rank))
    keys, kept_scale, per_sample, offset, threshold = extra.dropout(M, x)
    _low[(triton.cdiv(M, 32),)](
        x, p, low, keys, M, K, rank, p.stride(0), p.stride(1), extra.scale, kept_scale, per_sample, offset, threshold,
        RANK=padded(rank), BM=32, BK=128, DROPOUT=extra.draw is not None, num_warps=4, num_stages=3,
    )  # fmt: skip
    return low


def gradients(dy: Tensor, low: Tensor, x: Tensor, dlow: Tensor, site: Site) -> None:
    """Add dyᵀ low and dlowᵀ x to the fp32 gradients of the site."""
    (M, N), K = dy.shape, x.shape[1]
    block = 64
    columns = triton.cdiv(N, block) + triton.cdiv(K, block)
    splits = max(1, min(triton.cdiv(M, 128), 512 // columns))
    rows = triton.cdiv(triton.cdiv(M, splits), 64) * 64
    _gradients[(columns, triton.cdiv(M, rows))](
        dy, low, site.grad_up, N, x, dlow, site.grad_down, K, M, site.rank, rows,
        RANK=low.shape[1], BM=64, BC=block, num_warps=4, num_stages=3,
    )  # fmt: skip


def tiles(M: int, N: int, K: int) -> dict[str, int]:
    """Tile sizes by the product's size, as measured on an H100."""
    if triton.cdiv(M, 128) * triton.cdiv(N, 128) >= 132:
        return {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}
    if triton.cdiv(M, 64) * triton.cdiv(N, 128) >= 132:
        return {"BM": 64, "BN": 128, "BK": 64, "GROUP": 8, "num_warps": 4, "num_stages": 4}
    return {"BM": 64, "BN": 64, "BK": 64, "GROUP": 8, "num_warps": 4, "num_stages": 4}
