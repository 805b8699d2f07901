"""LoRA on a frozen linear layer in Triton: one kernel forward, two backward."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from lora_trainer.kernels.launch import launch
from lora_trainer.kernels.plain import like
from lora_trainer.kernels.site import Draw, Site
from lora_trainer.kernels.triton_lora_kernels import gradients_kernel, low_kernel, product_kernel
from lora_trainer.models.stored import dense

# Products of fewer rows than a matrix unit takes are padded to it.
MIN_RANK = 16


class TritonLoraLinear(torch.autograd.Function):
    """As `plain.LoraLinear`, with the residual added in the epilogue. Saves x and the rank-r product."""

    @staticmethod
    def forward(ctx, x, frozen, residual, site, down, up):
        weight, bias = frozen
        draw, x = site.draw(x.shape[0]), x.contiguous()
        residual = None if residual is None else residual.contiguous()
        y, low = product(x, dense(weight).t(), site.down, site.up.t(), Extra(site.scale(), draw, bias, residual))
        ctx.save_for_backward(x, low, weight)
        ctx.site, ctx.scale, ctx.draw = site, site.scale(), draw
        return y

    @staticmethod
    def backward(ctx, dy):
        x, low, weight = ctx.saved_tensors
        weight = dense(weight) if ctx.needs_input_grad[0] else weight
        site, extra = ctx.site, Extra(ctx.scale, ctx.draw)
        residual = dy if ctx.needs_input_grad[2] else None
        dy = dy.contiguous()
        if ctx.needs_input_grad[0]:
            dx, dlow = product(dy, weight, site.up.t(), site.down, extra)
        else:
            dx, dlow = None, low_product(dy, site.up.t(), extra)
        gradients(dy, low, x, dlow, site)
        return dx, None, residual, None, None, None


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
    launch(product_kernel, grid)(
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
    launch(low_kernel, (triton.cdiv(M, 32),))(
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
    launch(gradients_kernel, (columns, triton.cdiv(M, rows)))(
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
    if not _bulk_copies(x.device) or BK * x.element_size() < 64:
        return None
    if any(t.data_ptr() % 16 or t.stride(0) * t.element_size() % 16 for t in (x, w)):
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, [BM, BK]), TensorDescriptor.from_tensor(w, [BN, BK] if tall else [BK, BN])


def _bulk_copies(device: torch.device) -> bool:
    """Whether the device has them; for meta tensors, whether the current one has."""
    if device.type == "meta":
        return torch.cuda.get_device_capability() >= (9, 0)
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
