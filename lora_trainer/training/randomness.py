"""All randomness of a run: pure functions of (seed, purpose, sample visit).

No global generator is read or moved, so a resumed, paused, split or distributed run sees the same draws without
any generator state. A visit is one showing of one image: `epoch * images + image`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_INT32 = 1 << 32


def key(seed: int, purpose: str, *numbers: int) -> int:
    """63 bits that depend on every argument."""
    text = ":".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator of its own."""
    return torch.Generator().manual_seed(key(seed, purpose, *numbers))


def normal(seed: int, purpose: str, visits: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal [len(visits), *shape] float32 on the CPU, each row from its own visit."""
    rows = [torch.randn(shape, generator=generator(seed, purpose, visit)) for visit in visits]
    return torch.stack(rows)


def uniform(seed: int, purpose: str, visit: int) -> float:
    """A number between 0 and 1, neither of them."""
    return ((key(seed, purpose, visit) >> 11) + 0.5) / (1 << 52)


def timesteps(seed: int, visits: Sequence[int], count: int) -> Tensor:
    """Uniform timesteps in 0 … count - 1, [len(visits)] int64 on the CPU."""
    return torch.tensor([key(seed, "timestep", visit) % count for visit in visits])


def mask_keys(seed: int, visits: Sequence[int]) -> Tensor:
    """[len(visits), 2] int32: the two words that key `keep_mask` for each visit."""
    keys = [key(seed, "dropout", visit) for visit in visits]
    words = [[_signed(k % _INT32), _signed(k // _INT32)] for k in keys]
    return torch.tensor(words, dtype=torch.int32)


def keep_mask(keys: Tensor, count: int, dropout: float) -> Tensor:
    """[B, count] bool: True with probability 1 - dropout, a hash of (key, position) on the keys' device.

    Counter-based, so the same entry is drawn again whenever it is asked for, on any device. The mixer is
    Wellons' lowbias32 (https://nullprogram.com/blog/2018/07/31/), with one key word before and one in it.
    """
    x = torch.arange(count, dtype=torch.int32, device=keys.device).unsqueeze(0) ^ keys[:, :1]
    x ^= (x >> 16) & 0xFFFF
    x *= _signed(0x7FEB352D)
    x ^= keys[:, 1:]
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x >= _signed_threshold(dropout)


class Draws:
    """The choices of one visit, in the order in which they are asked for (`dataset.rules.Choices`)."""

    def __init__(self, seed: int, visit: int) -> None:
        self.seed, self.visit, self._asked = seed, visit, 0

    def one_of(self, count: int) -> int:
        return self._next() % count

    def chance(self, probability: float) -> bool:
        return self._next() < probability * (1 << 63)

    def _next(self) -> int:
        self._asked += 1
        return key(self.seed, "choice", self.visit, self._asked)


def _signed(word: int) -> int:
    """A 32-bit word as the int32 of the same bits."""
    return word - _INT32 if word >= _INT32 // 2 else word


def _signed_threshold(dropout: float) -> int:
    """The value below which a `dropout` share of all int32 lie."""
    return int(dropout * _INT32) - _INT32 // 2
