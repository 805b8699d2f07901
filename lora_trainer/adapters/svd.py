"""LoRAs of another rank, by the singular values of what they add to a weight.

The best approximation of a matrix by one of rank r keeps its r largest singular values (Eckart & Young 1936). Which are
kept otherwise follows sd-scripts' networks/resize_lora.py, so that the same numbers mean the same there and here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lora_trainer.adapters.naming import Factors

Method = Literal["sv_ratio", "sv_fro", "sv_cumulative"]
METHODS = get_args(Method)
# What is no larger adds nothing.
NOTHING = 1e-6


@dataclass(frozen=True)
class Rule:
    """How many singular values are kept: `rank`, or by `method` and `value` at most as many."""

    rank: int
    method: Method | None = None
    value: float = 0.0

    def kept(self, values: Tensor) -> int:
        """Of `values` [n], the largest first; at least one."""
        if values[0] <= NOTHING:
            return 1
        wanted = self.rank if self.method is None else self._wanted(values)
        return max(1, min(wanted, self.rank, len(values)))

    def _wanted(self, values: Tensor) -> int:
        """sv_ratio: those that are more than 1 / value of the largest; sv_cumulative: until their sum is `value` of
        all; sv_fro: until their Frobenius norm is. Each with one more, as sd-scripts has it."""
        if self.method == "sv_ratio":
            found = int((values > values[0] / self.value).sum())
        else:
            terms, target = (values, self.value) if self.method == "sv_cumulative" else (values**2, self.value**2)
            found = int(torch.searchsorted(terms.cumsum(0) / terms.sum(), target)) + 1
        return max(1, min(found, len(values) - 1)) + 1


def shrunk(f: Factors, rule: Rule) -> tuple[Factors, float, float]:
    """`f` with no more singular values than `rule` keeps and the same scale, in its dtypes and layouts; and the squared
    Frobenius norms of what it adds to a weight, after and before."""
    up, down = f.up.double().flatten(1), f.down.double().flatten(1)
    # Of the product's [out, in] only an [r, r] core is decomposed.
    left, left_core = torch.linalg.qr(up)
    right, right_core = torch.linalg.qr(down.t())
    u, values, v = torch.linalg.svd(left_core @ right_core.t())
    rank, scale = rule.kept(values), f.alpha / f.rank
    squares = (scale * values) ** 2
    norms = squares[:rank].sum().item(), squares.sum().item()
    if rank >= f.rank:
        return f, norms[1], norms[1]
    # The values' roots on both sides: in 16 bits a small factor would lose its digits.
    roots = values[:rank].sqrt()
    smaller = balanced(left @ u[:, :rank] * roots, roots.unsqueeze(1) * v[:rank] @ right.t(), like=f, scale=scale)
    return smaller, *norms


def balanced(up: Tensor, down: Tensor, *, like: Factors, scale: float) -> Factors:
    """Factors of [out, r] and [r, n], in the dtypes and layouts of `like`."""
    rank = len(down)
    return Factors(
        down.to(like.down.dtype).reshape(rank, *like.down.shape[1:]),
        up.to(like.up.dtype).reshape(len(up), rank, *like.up.shape[2:]),
        scale * rank,
    )


def grown(f: Factors, rank: int, fresh: Tensor) -> Factors:
    """`f` with more rows, which add nothing yet and can learn: down from `fresh` [rank, …], up zero; the same scale."""
    missing = f.up.new_zeros(f.up.shape[0], rank - f.rank, *f.up.shape[2:])
    more = fresh[f.rank :].to(f.down).reshape(rank - f.rank, *f.down.shape[1:])
    return Factors(torch.cat([f.down, more]), torch.cat([f.up, missing], 1), f.alpha / f.rank * rank)


def approximated(difference: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """(up [out, r], down [r, n], squared norms after and before) of a float64 matrix [out, n], r at most `rank`.

    By the eigenvectors of its smaller Gram matrix, which is much faster than the decomposition of a wide matrix. What
    that loses in accuracy concerns singular values below 1e-8 of the largest.
    """
    wide = difference.shape[0] <= difference.shape[1]
    matrix = difference if wide else difference.t()
    values, vectors = torch.linalg.eigh(matrix @ matrix.t())
    rank = min(rank, len(values))
    # Ascending there.
    values, basis = values[-rank:].flip(0).clamp(min=0), vectors[:, -rank:].flip(1)
    roots = values.sqrt().sqrt()
    inverse = torch.where(roots > 0, 1 / roots, torch.zeros_like(roots))
    first, second = basis * roots, inverse.unsqueeze(1) * (basis.t() @ matrix)
    norms = values.sum().item(), matrix.square().sum().item()
    return (first, second, *norms) if wide else (second.t(), first.t(), *norms)
