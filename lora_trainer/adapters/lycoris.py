"""LyCORIS' adapters, as files hold them and hosts apply them (Yeh et al. 2024, arXiv:2309.14859)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Hada:
    """One module's LoHa (FedPara, Hyeon-Woo et al. 2022, arXiv:2108.06098): W + (alpha / r) (w1_a · w1_b) ∘ (w2_a ·
    w2_b). w1_a, w2_a: [out, r]; w1_b, w2_b: [r, in kh kw]."""

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float
    kind = "LoHa"

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    @property
    def sizes(self) -> tuple[int, int]:
        return self.w1_a.shape[0], self.w1_b.shape[1]

    def parts(self) -> dict[str, Tensor]:
        return {f"hada_{name}": getattr(self, name) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}

    def delta(self, weight: Tensor) -> Tensor:
        product = (self.w1_a @ self.w1_b) * (self.w2_a @ self.w2_b)
        return (product * (self.alpha / self.rank)).view(weight.shape)


@dataclass(frozen=True)
class Kron:
    """One module's LoKr: W + scale w1 ⊗ w2, each whole or a product of rank r.

    w1: [a, c] = [a, r] · [r, c]; w2: [b, d], [b, d, kh, kw] or [b, r] · [r, d kh kw]; out = a b, in = c d. The scale is
    alpha / r, and 1 where both are whole, whatever the alpha.
    """

    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    alpha: float = 1.0
    kind = "LoKr"

    @property
    def rank(self) -> int:
        """Of the factor that is a product; of whole ones the largest that it can be."""
        for product in (self.w2_b, self.w1_b):
            if product is not None:
                return product.shape[0]
        return min(self.w2.shape[:2])

    @property
    def scale(self) -> float:
        return 1.0 if self.w1 is not None and self.w2 is not None else self.alpha / self.rank

    @property
    def sizes(self) -> tuple[int, int]:
        (a, c), (b, d) = _shape(self.w1, self.w1_a, self.w1_b), _shape(self.w2, self.w2_a, self.w2_b)
        return a * b, c * d

    def parts(self) -> dict[str, Tensor]:
        names = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")
        return {f"lokr_{name}": getattr(self, name) for name in names if getattr(self, name) is not None}

    def delta(self, weight: Tensor) -> Tensor:
        # Some versions of torch want it so.
        left, right = self._left.contiguous(), self._right.contiguous()
        product = torch.kron(left[..., None, None] if right.dim() == 4 else left, right)
        return (product * self.scale).reshape(weight.shape)

    @property
    def _left(self) -> Tensor:
        return self.w1_a @ self.w1_b if self.w1 is None else self.w1

    @property
    def _right(self) -> Tensor:
        return self.w2_a @ self.w2_b if self.w2 is None else self.w2


def _shape(whole: Tensor | None, a: Tensor | None, b: Tensor | None) -> tuple[int, int]:
    """Of a factor as a matrix."""
    return (a.shape[0], b.shape[1]) if whole is None else (whole.shape[0], whole[0].numel())
