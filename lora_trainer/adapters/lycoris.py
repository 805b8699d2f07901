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


@dataclass(frozen=True)
class Scales:
    """One module's IA³ (Liu et al. 2022, arXiv:2205.05638): W ∘ (1 + weight), the bias as it is. weight: [out, 1] for
    the outputs, [1, in] or [1, in, 1, 1] for the inputs. It has no rank and no alpha."""

    weight: Tensor
    alpha: None = None
    kind = "IA3"
    rank = None

    @property
    def on_input(self) -> bool:
        return self.weight.shape[0] == 1

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        count = self.weight.numel()
        return (None, count) if self.on_input else (count, None)

    def parts(self) -> dict[str, Tensor]:
        """As LyCORIS has them: of a linear layer the numbers alone, of a convolution [1, in, 1, 1]."""
        weight = self.weight if self.weight.dim() == 4 else self.weight.flatten()
        return {"weight": weight, "on_input": torch.tensor(int(self.on_input))}

    def delta(self, weight: Tensor) -> Tensor:
        if self.on_input:
            return weight * self.weight.view(1, -1, *[1] * (weight.dim() - 2))
        return weight * self.weight

    def turned(self, outputs: Tensor) -> Tensor:
        """What is added to `outputs` W x [M, out] of rows x, for scales of the outputs."""
        return outputs * self.weight.flatten().to(outputs.dtype)


@dataclass(frozen=True)
class Rotation:
    """One module's OFT (Qiu et al. 2023, arXiv:2306.07280): Rᵀ W, R orthogonal, of k blocks of n outputs each:
    (I + Q)(I − Q)⁻¹ (Cayley), Q = oft_blocks − oft_blocksᵀ.

    oft_blocks: [k, n, n], out = k n. alpha is a constraint in files of this kind: ‖Q‖ of all blocks is at
    most alpha · out; 0: none.
    """

    oft_blocks: Tensor
    alpha: float = 0.0
    kind = "OFT"

    @property
    def rank(self) -> int:
        """The size of a block."""
        return self.oft_blocks.shape[1]

    @property
    def sizes(self) -> tuple[int, None]:
        return self.oft_blocks.shape[0] * self.rank, None

    def parts(self) -> dict[str, Tensor]:
        return {"oft_blocks": self.oft_blocks}

    def delta(self, weight: Tensor) -> Tensor:
        return self.turned(weight.flatten(1).t().to(self.oft_blocks.dtype)).t().reshape(weight.shape)

    def turned(self, outputs: Tensor) -> Tensor:
        """What is added to `outputs` W x [M, out] of rows x: (R − I)ᵀ W x."""
        blocks = outputs.reshape(len(outputs), *self.oft_blocks.shape[:2])
        return torch.einsum("mkn,knp->mkp", blocks, self.turn().to(outputs.dtype)).reshape(outputs.shape)

    def turn(self) -> Tensor:
        """R − I, [k, n, n], in full precision whatever autocast says."""
        with torch.autocast(self.oft_blocks.device.type, enabled=False):
            q = self.oft_blocks - self.oft_blocks.transpose(1, 2)
            if self.alpha:
                norm = q.norm()
                q = q * ((norm.clamp(max=self.alpha * self.sizes[0]) + 1e-8) / (norm + 1e-8))
            # Equal to R − I, whose digits a difference of nearly equal numbers would lose.
            return 2 * _inverse(q) @ q


def _inverse(q: Tensor) -> Tensor:
    """(I − Q)⁻¹ of skew-symmetric q [k, n, n], by Newton's iteration (Schulz 1933) from the transpose, which converges
    for each: (I − Q)(I − Q)ᵀ has no eigenvalue outside of [1, 1 + ‖Q‖² / 2]. Solvers of CUDA wait for their result or
    cannot be captured."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    minus, twice = q - eye, (2 * eye).expand_as(q)
    with torch.no_grad():
        inverse = (eye + q) * (4 / (4 + q.square().sum((1, 2), keepdim=True)))
        # Each doubles the digits that are right: enough where all that a block holds turns by 100°.
        for _ in range(q.shape[-1].bit_length() + 2):
            inverse = inverse @ torch.baddbmm(twice, minus, inverse)
    # One step more, whose derivative is that of the inverse.
    return inverse @ torch.baddbmm(twice, minus, inverse)


def _shape(whole: Tensor | None, a: Tensor | None, b: Tensor | None) -> tuple[int, int]:
    """Of a factor as a matrix."""
    return (a.shape[0], b.shape[1]) if whole is None else (whole.shape[0], whole[0].numel())
