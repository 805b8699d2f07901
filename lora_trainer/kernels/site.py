"""What a fused LoRA product needs to know about its place in the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """One module's dropout of this batch: entry (row, j) of the rank-r product [rows, r] is kept with 1 - dropout.

    keys: [B, 2] int32 of `randomness.mask_keys`; the module's entries of a sample start at `offset` of its hash
    sequence, row by row. `mask`: [rows, r], 0 or 1 / (1 - dropout), where it has been drawn as a tensor.
    """

    keys: Tensor
    offset: int
    dropout: float
    mask: Callable[[], Tensor]


@dataclass(frozen=True)
class Site:
    """A LoRA on one linear layer (a 1×1 convolution counts as one).

    down [r, in] and up [out, r] are the weights in the compute dtype, both with r as the dimension that is not
    contiguous. The gradients, laid out alike, are added to `grad_down` and `grad_up` (fp32), or written over them
    where they are buffers in the compute dtype that are collected after each backward pass. `parameters` are the
    masters, which tell autograd that there is something to train. `drawn`: a kernel can draw the dropout by itself;
    else its mask is there as a tensor only.
    """

    down: Tensor
    up: Tensor
    grad_down: Tensor
    grad_up: Tensor
    parameters: tuple[Tensor, Tensor]
    scale: Callable[[], float]
    draw: Callable[[int], Draw | None]
    drawn: bool = True

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.down.dtype
