"""LoRA dropout on the rank-r product (as in kohya), keyed by sample visit.

All modules' masks of a batch are slices of one hash sequence a sample, so recomputation by gradient checkpointing,
accumulation and replayed graphs see the same masks. They are drawn as one tensor when somebody asks for it; a kernel
can draw its own entries where it needs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from lora_trainer.kernels.site import Draw
from lora_trainer.training.randomness import keep_mask


@dataclass
class _Masks:
    """The masks of one batch: [B, all modules' entries], drawn at the first request."""

    keys: Tensor
    sizes: dict[str, int]
    dropout: float
    dtype: torch.dtype
    _parts: dict[str, Tensor] = field(default_factory=dict)

    def of(self, name: str) -> Tensor:
        if not self._parts:
            keep = keep_mask(self.keys, sum(self.sizes.values()), self.dropout)
            parts = keep.to(self.dtype).div_(1 - self.dropout).split(list(self.sizes.values()), dim=1)
            self._parts = dict(zip(self.sizes, parts, strict=True))
        return self._parts[name]

    def offset(self, name: str) -> int:
        offset = 0
        for other, size in self.sizes.items():
            if other == name:
                return offset
            offset += size
        raise KeyError(name)


class LoraDropout:
    """Inactive until `masks` is entered. A module's entries are in the order (row or pixel, rank).

    `downs`: module name to its down projection, whose output [B, …, r] or [B, r, h, w], of `dtype`, is masked by a
    forward hook wherever the projection itself is called; fused products ask for their `draw` instead.
    """

    def __init__(self, downs: Mapping[str, nn.Module], dropout: float, dtype: torch.dtype = torch.float32) -> None:
        self.dropout, self.dtype = dropout, dtype
        self._sizes: dict[tuple, dict[str, int]] = {}
        self._recording: tuple[Tensor, dict[str, int]] | None = None
        self._masks: _Masks | None = None
        self._handles = [
            layer.register_forward_hook(lambda module, args, out, name=name: self._hook(name, out))
            for name, layer in downs.items()
        ]

    @contextmanager
    def recording(self, shape: tuple, keys: Tensor) -> Iterator[None]:
        """Run one forward pass of a batch of this `shape` (B first) inside, to learn the size of each module's mask.

        What it computes is of no use: every module draws from the start of the sequence of `keys`.
        """
        self._recording = keys, self._sizes.setdefault(shape, {})
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
        self._masks = _Masks(keys, self._sizes[shape], self.dropout, self.dtype)
        try:
            yield
        finally:
            self._masks = None

    def draw(self, name: str, rank: int, rows: int) -> Draw | None:
        """The mask of a fused product [rows, rank] of module `name`; None where dropout is off."""
        if self._recording is not None:
            keys, sizes = self._recording
            sizes[name] = rows // len(keys) * rank
            # The kernels of a step, not of one without dropout, are what is to be compiled and warm.
            return Draw(keys, 0, self.dropout, lambda: torch.ones((), dtype=self.dtype, device=keys.device))
        masks = self._masks
        if masks is None:
            return None
        return Draw(masks.keys, masks.offset(name), self.dropout, lambda: masks.of(name).reshape(rows, rank))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def drawer(self, name: str, rank: int) -> partial:
        """`draw` for one module."""
        return partial(self.draw, name, rank)

    def _hook(self, name: str, out: Tensor) -> Tensor | None:
        if self._recording is not None:
            keys, sizes = self._recording
            sizes[name] = out.numel() // len(keys)
        if self._masks is None:
            return None
        mask = self._masks.of(name)
        if out.dim() == 4:
            batch, rank, height, width = out.shape
            return out * mask.view(batch, height, width, rank).permute(0, 3, 1, 2)
        return out * mask.view(out.shape)
