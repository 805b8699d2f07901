"""The operations of a fast step with Triton kernels where they apply."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_trainer.kernels.plain import PlainOps, like
from lora_trainer.kernels.site import Site
from lora_trainer.kernels.triton_gates import TritonAdd, TritonGeglu
from lora_trainer.kernels.triton_group_norm import TritonGroupNorm
from lora_trainer.kernels.triton_layer_norm import TritonLayerNorm
from lora_trainer.kernels.triton_lora import TritonLoraLinear, fits

HALVES = (torch.float16, torch.bfloat16)
# Larger ranks are no longer low beside the tiles of the frozen product.
MAX_RANK = 64


class TritonOps(PlainOps):
    """As `PlainOps`. Gradients are added to the fp32 buffers by the kernels themselves."""

    name = "Triton"
    collects = False

    def lora_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, site: Site, residual: Tensor | None = None
    ) -> Tensor:
        if not site.drawn or site.rank > MAX_RANK or x.dtype not in HALVES or not fits(*reversed(weight.shape)):
            return super().lora_linear(x, weight, bias, site, residual)
        return TritonLoraLinear.apply(x, (weight, bias), residual, site, *site.parameters)

    def group_norm(
        self, x: Tensor, norm: nn.GroupNorm, *, silu: bool, shift: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        if not channels_last or (shift is not None and shift.requires_grad):
            return super().group_norm(x, norm, silu=silu, shift=shift)
        return TritonGroupNorm.apply(x, shift, norm, silu)

    def layer_norm(self, x: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        return TritonLayerNorm.apply(x.contiguous(), norm)

    def geglu(self, x: Tensor) -> Tensor:
        return TritonGeglu.apply(x)

    def add(self, x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        layout = {"memory_format": torch.channels_last}
        if not x.is_contiguous(**layout) or not residual.is_contiguous(**layout):
            return super().add(x, bias, residual)
        return TritonAdd.apply(x, None if bias is None else like(bias, x), residual)
