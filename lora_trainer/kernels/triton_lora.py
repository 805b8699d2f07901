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
def _masked(
    inner, keys, rows, ranks, rank, scale, kept_scale, rows_per_sample, offset, threshold, DROPOUT: tl.constexpr
):
    """The rank-r product with its scale and dropout."""
    if DROPOUT:
        kept = keep(keys, rows, ranks, rows_per_sample, rank, offset, threshold)
        return tl.where(kept, inner * kept_scale, 0.0)
    return inner * scale


@triton.jit
def _product(
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
    p_at = p + (ranks % rank)[None, :].to(tl.int64) * K + ks[:, None]
    if not DESCRIBED:
        x_at = x + (rows % M)[:, None].to(tl.int64) * K + ks[None, :]
        w_at = w + ks[:, None] * stride_wk + (columns % N)[None, :] * stride_wn
    total = tl.zeros((BM, BN), tl.float32)
    inner = tl.zeros((BM, RANK), tl.float32)
    for k in range(0, K, BK):
        if DESCRIBED:
            x_tile = x.load([block_m * BM, k])
            if TALL:
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
def _low(
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
def _gradients(
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


class TritonLoraLinear(torch.autograd.Function):
    """As `plain.LoraLinear`, with the residual added in the epilogue. Saves x and the rank-r product."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, site, down, up):  # noqa: ANN001, ANN205
        draw, x = site.draw(x.shape[0]), x.contiguous()
        residual = None if residual is None else residual.contiguous()
        y, low = product(x, weight.t(), site.down, site.up.t(), Extra(site.scale(), draw, bias, residual))
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
            dx, dlow = product(dy, weight, site.up.t(), site.down, extra)
        else:
            dx, dlow = None, low_product(dy, site.up.t(), extra)
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
    """(x w + low q + bias + residual [M, N], low [M, padded rank]) of x [M, K], w [K, N], p [r, K], q [r, N]."""
    (M, K), N, rank = x.shape, w.shape[1], p.shape[0]
    w, y, low = like(w, x), x.new_empty(M, N), x.new_empty(M, padded(rank))
    keys, *dropout = extra.dropout(M, x)
    bias, residual = extra.bias, extra.residual
    tile = tiles(M, N, K)
    block = tile["BM"], tile["BN"], tile["BK"]
    tall = w.stride(0) == 1
    described = _describe(x, w.t() if tall else w, block, tall=tall)
    x_given, w_given = described or (x, w)
    grid = (triton.cdiv(M, block[0]) * triton.cdiv(N, block[1]),)
    _product[grid](
        x_given, w_given, x if bias is None else bias, x if residual is None else residual, p, q, y, low, keys,
        M, N, K, rank, w.stride(0), w.stride(1), extra.scale, *dropout,
        RANK=padded(rank), HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        DROPOUT=extra.draw is not None, DESCRIBED=described is not None, TALL=tall, **tile,
    )  # fmt: skip
    return y, low


def low_product(x: Tensor, p: Tensor, extra: Extra) -> Tensor:
    """The rank-r part of `product` alone: [M, padded rank]."""
    (M, K), rank = x.shape, p.shape[0]
    low = x.new_empty(M, padded(rank))
    keys, *dropout = extra.dropout(M, x)
    _low[(triton.cdiv(M, 32),)](
        x, p, low, keys, M, K, rank, extra.scale, *dropout,
        RANK=padded(rank), BM=32, BK=inner_block(K), DROPOUT=extra.draw is not None, num_warps=4, num_stages=4,
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
        dy, low, site.grad_up.t(), N, x, dlow, site.grad_down, K, M, site.rank, rows,
        RANK=low.shape[1], BM=64, BC=block, num_warps=4, num_stages=3,
    )  # fmt: skip


def tiles(M: int, N: int, K: int) -> dict[str, int]:
    """Tile sizes by the product's size, the fastest of those measured on an H100."""
    BK = inner_block(K)
    if triton.cdiv(M, 128) * triton.cdiv(N, 128) >= 120:
        return {"BM": 128, "BN": 128, "BK": BK, "GROUP": 8, "num_warps": 8, "num_stages": 3}
    if triton.cdiv(M, 128) * triton.cdiv(N, 128) >= 80:
        return {"BM": 128, "BN": 128, "BK": BK, "GROUP": 8, "num_warps": 4, "num_stages": 4}
    if triton.cdiv(M, 64) * triton.cdiv(N, 128) >= 80:
        return {"BM": 64, "BN": 128, "BK": BK, "GROUP": 8, "num_warps": 4, "num_stages": 4}
    return {"BM": 64, "BN": 64, "BK": BK, "GROUP": 8, "num_warps": 4, "num_stages": 4}


def fits(fan_in: int, fan_out: int) -> bool:
    """Whether both directions of a layer divide into tiles."""
    return fan_in % 16 == 0 and fan_out % 16 == 0


def inner_block(K: int) -> int:
    """The largest tile along K that divides it."""
    return next(block for block in (64, 32, 16) if K % block == 0)


def _describe(x: Tensor, w: Tensor, block: tuple[int, int, int], *, tall: bool) -> tuple | None:
    """Descriptors of x [M, K] and w ([N, K] where tall, else [K, N]) for bulk copies, where the device has them."""
    BM, BN, BK = block
    if not (x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)) or BK * x.element_size() < 64:
        return None
    if any(t.data_ptr() % 16 or t.stride(0) * t.element_size() % 16 for t in (x, w)):
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, [BM, BK]), TensorDescriptor.from_tensor(w, [BN, BK] if tall else [BK, BN])
