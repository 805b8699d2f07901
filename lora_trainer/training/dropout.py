"""LoRA dropout on the rank-r product (as in kohya), keyed by sample visit.

All modules' masks of a batch are slices of one tensor that is drawn ahead of the forward pass, so recomputation
by gradient checkpointing, accumulation and replayed graphs see the same masks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_trainer.training.randomness import keep_mask


class LoraDropout:
    """Forward hooks on the down projections; inactive until `masks` is entered.

    `downs`: module name to the layer whose output [B, …, r] or [B, r, …], of `dtype`, is masked elementwise.
    """

    def __init__(self, downs: Mapping[str, nn.Module], dropout: float, dtype: torch.dtype = torch.float32) -> None:
        self.dropout, self.dtype = dropout, dtype
        self._sizes: dict[tuple, dict[str, int]] = {}
        self._recording: dict[str, int] | None = None
        self._views: dict[str, Tensor] | None = None
        self._handles = [
            layer.register_forward_hook(lambda module, args, out, name=name: self._apply(name, out))
            for name, layer in downs.items()
        ]

    @contextmanager
    def recording(self, shape: tuple) -> Iterator[None]:
        """Run one forward pass of a batch of this `shape` inside, to learn the size of each module's mask."""
        self._recording = self._sizes.setdefault(shape, {})
        try:
            yield
        finally:
            self._recording = None

    def knows(self, shape: tuple) -> bool:
        """Whether masks can be drawn for batches of this `shape`."""
        return self.dropout == 0 or shape in self._sizes

    @contextmanager
    def masks(self, shape: tuple, keys: Tensor) -> Iterator[None]:
        """Dropout is on inside. `keys`: [B, 2] int32 of `randomness.mask_keys`, on the compute device."""
        if self.dropout == 0:
            yield
            return
        sizes = self._sizes[shape]
        keep = keep_mask(keys, sum(sizes.values()), self.dropout)
        parts = keep.to(self.dtype).div_(1 - self.dropout).split(list(sizes.values()), dim=1)
        self._views = dict(zip(sizes, parts, strict=True))
        try:
            yield
        finally:
            self._views = None

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _apply(self, name: str, out: Tensor) -> Tensor | None:
        if self._recording is not None:
            self._recording[name] = out[0].numel()
        if self._views is None:
            return None
        return out * self._views[name].view(out.shape)
