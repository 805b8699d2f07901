"""LoRA on a frozen linear layer: the kernels. `triton_lora` launches them.

A low-rank product beside a frozen one moves as much memory as the frozen one when it is computed on its own. Here the
rank-r product is accumulated over the tiles that the frozen product loads anyway, and added in its epilogue; backward
is the same kernel on transposed weights, and one more adds both adapters' gradients to the fp32 buffers.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def _block(blocks_m, blocks_n, GROUP: tl.constexpr):
    """This program's block of rows and of columns; those that run together share both in the L2 cache."""
    pid = tl.program_id(0)
    width = GROUP * blocks_n
    first = (pid // width) * GROUP
    height = tl.minimum(blocks_m - first, GROUP)
    return first + (pid % width) % height, (pid % width) // height


@triton.jit
def _masked(
    inner, keys, rows, ranks, rank, scale, kept_scale, rows_per_sample, offset, threshold, DROPOUT: tl.constexpr
):
    """The rank-r product with its scale and dropout."""
    if DROPOUT:
        kept = keep(keys, rows, ranks, rows_per_sample, rank, offset, threshold)
        return tl.where(kept, inner * kept_scale, 0.0)
    return inner * scale


@triton.jit
def product_kernel(
    x, w, bias, residual, p, q, y, low, keys,
    M, N, K, rank, stride_wk, stride_wn, scale, kept_scale, rows_per_sample, offset, threshold,
    RANK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr,
    DESCRIBED: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x w (+ bias) + low qᵀ (+ residual), low [M, RANK] = scale (x pᵀ) ∘ mask.

    x, y, residual and low are row-major; p [rank, K] and q [rank, N] too; w [K, N] has any strides. K is a multiple of
    BK. DESCRIBED: x and w are tensor descriptors (Hopper's bulk copies), w [N, K] where TALL. Rows, columns and ranks
    outside are computed as copies of some inside, which is cheaper than masks in the loop.
    """
    block_m, block_n = _block(tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    rows = block_m * BM + tl.arange(0, BM)
    columns = block_n * BN + tl.arange(0, BN)
    ranks = tl.arange(0, RANK)
    ks = tl.arange(0, BK)
    p_at = p + (ranks % rank)[None, :].to(tl.int64) * K + ks[:, None]
    if not DESCRIBED:
        x_at = x + (rows % M)[:, None].to(tl.int64) * K + ks[None, :]
        w_at = w + ks[:, None] * stride_wk + (columns % N)[None, :] * stride_wn
    total = tl.zeros((BM, BN), tl.float32)
    inner = tl.zeros((BM, RANK), tl.float32)
    for k in range(0, K, BK):
        if DESCRIBED:
            x_tile = x.load([block_m * BM, k])
            if TALL:  # noqa: SIM108 (a kernel is compiled for one of them)
                w_tile = w.load([block_n * BN, k]).T
            else:
                w_tile = w.load([k, block_n * BN])
        else:
            x_tile = tl.load(x_at)
            w_tile = tl.load(w_at)
            x_at += BK
            w_at += BK * stride_wk
        p_tile = tl.load(p_at)
        total = tl.dot(x_tile, w_tile, total)
        inner = tl.dot(x_tile, p_tile, inner)
        p_at += BK
    in_rows, in_columns = rows < M, columns < N
    inner = _masked(inner, keys, rows % M, ranks, rank, scale, kept_scale, rows_per_sample, offset, threshold, DROPOUT)
    inner = inner.to(low.dtype.element_ty)
    if block_n == 0:
        tl.store(low + rows[:, None] * RANK + ranks[None, :], inner, mask=in_rows[:, None])
    q_at = q + ranks[:, None] * N + columns[None, :]
    q_tile = tl.load(q_at, mask=(ranks < rank)[:, None] & in_columns[None, :], other=0.0)
    total = tl.dot(inner, q_tile, total)
    if HAS_BIAS:
        total += tl.load(bias + columns % N).to(tl.float32)[None, :]
    at = rows[:, None].to(tl.int64) * N + columns[None, :]
    inside = in_rows[:, None] & in_columns[None, :]
    if HAS_RESIDUAL:
        total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def low_kernel(
    x, p, low, keys, M, K, rank, scale, kept_scale, rows_per_sample, offset, threshold,
    RANK: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """low [M, RANK] = scale (x pᵀ) ∘ mask alone, where nobody asks for the gradient of the input."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    ranks = tl.arange(0, RANK)
    ks = tl.arange(0, BK)
    x_at = x + (rows % M)[:, None].to(tl.int64) * K + ks[None, :]
    p_at = p + (ranks % rank)[None, :].to(tl.int64) * K + ks[:, None]
    inner = tl.zeros((BM, RANK), tl.float32)
    for _ in range(0, K, BK):
        inner = tl.dot(tl.load(x_at), tl.load(p_at), inner)
        x_at += BK
        p_at += BK
    inner = _masked(inner, keys, rows % M, ranks, rank, scale, kept_scale, rows_per_sample, offset, threshold, DROPOUT)
    tl.store(low + rows[:, None] * RANK + ranks[None, :], inner.to(low.dtype.element_ty), mask=(rows < M)[:, None])


@triton.jit
def gradients_kernel(
    dy, low, grad_up, N, x, dlow, grad_down, K, M, rank, rows_per_split,
    RANK: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """grad_up [rank, N] += lowᵀ dy and grad_down [rank, K] += dlowᵀ x, a block of columns and a share of rows each."""
    pid = tl.program_id(0)
    blocks_up = tl.cdiv(N, BC)
    start = tl.program_id(1) * rows_per_split
    stop = tl.minimum(start + rows_per_split, M)
    if pid < blocks_up:
        _columns(dy, low, grad_up, N, pid * BC + tl.arange(0, BC), start, stop, rank, RANK, BM, BC)
    else:
        _columns(x, dlow, grad_down, K, (pid - blocks_up) * BC + tl.arange(0, BC), start, stop, rank, RANK, BM, BC)


@triton.jit
def _columns(wide, narrow, grad, N, columns, start, stop, rank, RANK: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    """grad[:, columns] += narrow[start:stop]ᵀ wide[start:stop, columns]."""
    ranks = tl.arange(0, RANK)
    in_columns = columns < N
    total = tl.zeros((BC, RANK), tl.float32)
    for row in range(start, stop, BM):
        rows = row + tl.arange(0, BM)
        inside = rows < stop
        wide_tile = tl.load(
            wide + rows[None, :].to(tl.int64) * N + columns[:, None],
            mask=inside[None, :] & in_columns[:, None], other=0.0,
        )  # fmt: skip
        narrow_tile = tl.load(narrow + rows[:, None] * RANK + ranks[None, :], mask=inside[:, None], other=0.0)
        total = tl.dot(wide_tile, narrow_tile, total)
    at = grad + ranks[None, :].to(tl.int64) * N + columns[:, None]
    tl.atomic_add(at, total, mask=in_columns[:, None] & (ranks < rank)[None, :], sem="relaxed")
