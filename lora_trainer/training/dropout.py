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
from types import MappingProxyType

import torch
from torch import Tensor, nn

from lora_trainer.adapters.layers import Change, Turned
from lora_trainer.kernels.site import Draw
from lora_trainer.training.randomness import keep_mask

# Whole ranks and whole modules are drawn from sequences of their own.
_RANKS, _MODULES = 0x52414E4B, 0x4D4F4455


@dataclass(frozen=True)
class Shares:
    """What is left out of a LoRA: entries of the rank-r product; ranks, for a whole sample; modules, likewise. What
    remains is scaled up for it, but for modules, as in kohya."""

    entries: float = 0.0
    ranks: float = 0.0
    modules: float = 0.0

    @property
    def any(self) -> bool:
        return bool(self.entries or self.whole)

    @property
    def whole(self) -> bool:
        """Whether anything is left out for a whole sample, which no kernel draws by itself."""
        return bool(self.ranks or self.modules)


@dataclass
class _Masks:
    """The masks of one batch: [B, all modules' entries], drawn at the first request, as those of whole ranks [B, all
    modules' ranks] and of whole modules [B, modules]. `ranks`: each module's."""

    keys: Tensor
    sizes: dict[str, int]
    ranks: Mapping[str, int]
    shares: Shares
    dtype: torch.dtype
    _parts: dict[str, Tensor] = field(default_factory=dict)
    _wholes: dict[str, Tensor] = field(default_factory=dict)

    def of(self, name: str, rows: int) -> Tensor:
        """[B, rows a sample, r]; one row stands for all where nothing but wholes is left out."""
        batch, rank = len(self.keys), self.ranks[name]
        if not self.shares.whole:
            return self._entries(name).reshape(batch, rows, rank)
        whole = self.whole(name)
        return self._entries(name).reshape(batch, rows, rank) * whole if self.shares.entries else whole

    def _entries(self, name: str) -> Tensor:
        if not self._parts:
            keep = keep_mask(self.keys, sum(self.sizes.values()), self.shares.entries)
            parts = keep.to(self.dtype).div_(1 - self.shares.entries).split(list(self.sizes.values()), dim=1)
            self._parts = dict(zip(self.sizes, parts, strict=True))
        return self._parts[name]

    def whole(self, name: str) -> Tensor:
        """[B, 1, r]."""
        if not self._wholes:
            shares, counts = self.shares, list(self.ranks.values())
            ranks = keep_mask(self.keys + _RANKS, sum(counts), shares.ranks).to(self.dtype).div_(1 - shares.ranks)
            modules = keep_mask(self.keys + _MODULES, len(counts), shares.modules).to(self.dtype)
            parts = zip(self.ranks, ranks.split(counts, dim=1), modules.split(1, dim=1), strict=True)
            self._wholes = {name: (part * module).unsqueeze(1) for name, part, module in parts}
        return self._wholes[name]

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
    forward hook wherever the projection itself is called; fused products ask for their `draw` instead. Of `changes`,
    which have no such product, outputs are left out in place of ranks, as in LyCORIS.
    """

    def __init__(
        self,
        downs: Mapping[str, nn.Module],
        shares: Shares,
        dtype: torch.dtype = torch.float32,
        changes: Mapping[str, Change | Turned] = MappingProxyType({}),
    ) -> None:
        self.shares, self.dtype = shares, dtype
        self._ranks = {name: layer.weight.shape[0] for name, layer in downs.items()}
        for name, change in changes.items() if shares.whole else ():
            self._ranks[name] = change.layer.get_base_layer().weight.shape[0]
            change.keep = partial(self.kept, name)
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
        return not self.shares.entries or shape in self._sizes

    @contextmanager
    def masks(self, shape: tuple, keys: Tensor) -> Iterator[None]:
        """Dropout is on inside. `keys`: [B, 2] int32 of `randomness.mask_keys`, on the compute device."""
        if not self.shares.any:
            yield
            return
        self._masks = _Masks(keys, self._sizes.get(shape, {}), self._ranks, self.shares, self.dtype)
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
            return Draw(keys, 0, self.shares.entries, lambda: torch.ones((), dtype=self.dtype, device=keys.device))
        masks = self._masks
        if masks is None:
            return None
        per_sample = rows // len(masks.keys)
        offset = masks.offset(name) if self.shares.entries else 0

        def mask() -> Tensor:
            return masks.of(name, per_sample).expand(-1, per_sample, -1).reshape(rows, rank)

        return Draw(masks.keys, offset, self.shares.entries, mask)

    def kept(self, name: str) -> Tensor | None:
        """What of a module's outputs is kept, [B, 1, out]; None where nothing is left out."""
        return None if self._masks is None else self._masks.whole(name)

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
        rows = out[0].numel() // self._ranks[name]
        mask = self._masks.of(name, rows)
        if out.dim() == 4:
            batch, rank, height, width = out.shape
            return out * mask.expand(-1, rows, -1).reshape(batch, height, width, rank).permute(0, 3, 1, 2)
        return out * mask.expand(-1, rows, -1).reshape(out.shape)
