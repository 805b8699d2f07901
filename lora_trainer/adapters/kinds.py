"""The kinds of adapters: one declaration each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig
from peft.tuners.lokr.layer import factorization
from torch import Tensor

from lora_trainer.adapters.lycoris import Hada, Kron, Rotation, Scales
from lora_trainer.adapters.naming import Factors, Weights, column_norms


@dataclass(frozen=True)
class Size:
    """Of one module's adapter: its change of the weight is scaled by alpha / rank, and it learns `rate` times as fast
    as its network. `factor`: of LoKr, the size of its small factor; None: near the square root. `on_input`: of IA³,
    whether a linear layer's inputs are scaled. Of OFT `rank` is the size of its blocks, `alpha` its constraint."""

    rank: int | None
    alpha: float | None
    rate: float = 1.0
    factor: int | None = None
    on_input: bool = False

    @property
    def scale(self) -> float:
        """1 where there is nothing to scale by: IA³ has no alpha, and OFT as it is trained here none but 0."""
        return self.alpha / self.rank if self.alpha else 1.0


@dataclass(frozen=True)
class Kind:
    """`config` makes PEFT's layers, whatever their rank, which only hold tensors here: `fields` are those of `weights`
    by what PEFT calls them. `start` gives the tensors that a module begins with, whose change is zero."""

    name: str
    weights: Callable[..., Weights]
    fields: Mapping[str, str]
    config: Callable[[Sequence[str]], object]
    start: Callable[[Tensor, Size, torch.Generator], dict[str, Tensor]]

    @property
    def is_lora(self) -> bool:
        """Whether it has a product of rank r of the inputs, which is computed as such."""
        return "down" in self.fields


def _lora_start(weight: Tensor, size: Size, generator: torch.Generator) -> dict[str, Tensor]:
    """PEFT's (Kaiming uniform, a = sqrt 5) and zeros."""
    return {"down": _drawn((size.rank, *weight.shape[1:]), generator), "up": torch.zeros(weight.shape[0], size.rank)}


def _dora_start(weight: Tensor, size: Size, generator: torch.Generator) -> dict[str, Tensor]:
    return {**_lora_start(weight, size, generator), "dora_scale": column_norms(weight.detach().float())}


def _loha_start(weight: Tensor, size: Size, generator: torch.Generator) -> dict[str, Tensor]:
    """PEFT's: FedPara's He initialisation."""
    (outputs, inputs), rank = weight.flatten(1).shape, size.rank
    shapes = {"w1_a": (outputs, rank), "w1_b": (rank, inputs), "w2_a": (outputs, rank)}
    return {name: _drawn(shape, generator) for name, shape in shapes.items()} | {"w2_b": torch.zeros(rank, inputs)}


def _lokr_start(weight: Tensor, size: Size, generator: torch.Generator) -> dict[str, Tensor]:
    """LyCORIS': zeros in the large factor, which is a product where the rank is less than half of its sides."""
    rank, factor = size.rank, size.factor or -1
    (a, b), (c, d) = (sorted(factorization(side, factor)) for side in weight.shape[:2])
    left, kernel = {"w1": _drawn((a, c), generator)}, weight.shape[2:]
    if rank >= max(b, d) / 2:
        return {**left, "w2": torch.zeros(b, d, *kernel)}
    return {**left, "w2_a": _drawn((b, rank), generator), "w2_b": torch.zeros(rank, d * kernel.numel())}


def _ia3_start(weight: Tensor, size: Size, generator: torch.Generator) -> dict[str, Tensor]:
    """Zeros. Hosts scale a convolution's inputs only."""
    if size.on_input or weight.dim() == 4:
        return {"weight": torch.zeros(1, weight.shape[1], *[1] * (weight.dim() - 2))}
    return {"weight": torch.zeros(weight.shape[0], 1)}


def _oft_start(weight: Tensor, size: Size, generator: torch.Generator) -> dict[str, Tensor]:
    """Zeros, in the largest blocks that divide the outputs and are no larger than the rank."""
    outputs = weight.shape[0]
    block = next(n for n in range(min(size.rank, outputs), 0, -1) if outputs % n == 0)
    return {"oft_blocks": torch.zeros(outputs // block, block, block)}


def _drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Kaiming uniform with a = sqrt 5."""
    start = torch.empty(shape)
    bound = 1 / math.sqrt(start[0].numel())
    return start.uniform_(-bound, bound, generator=generator)


def _lora_config(modules: Sequence[str]) -> LoraConfig:
    # Dropout is ours (`training.dropout`).
    return LoraConfig(r=1, lora_alpha=1, target_modules=list(modules), lora_dropout=0.0)


_LORA_FIELDS = {"down": "lora_A", "up": "lora_B"}
_HADA = ("w1_a", "w1_b", "w2_a", "w2_b")
_KRON = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")
LORA = Kind("lora", Factors, _LORA_FIELDS, _lora_config, _lora_start)
# PEFT's own DoRA normalises the other way round, so its layers are those of a LoRA here.
DORA = Kind("dora", Factors, {**_LORA_FIELDS, "dora_scale": "magnitude"}, _lora_config, _dora_start)
LOHA = Kind(
    "loha",
    Hada,
    {name: f"hada_{name}" for name in _HADA},
    lambda modules: LoHaConfig(r=1, alpha=1, target_modules=list(modules)),
    _loha_start,
)
LOKR = Kind(
    "lokr",
    Kron,
    {name: f"lokr_{name}" for name in _KRON},
    lambda modules: LoKrConfig(r=1, alpha=1, target_modules=list(modules)),
    _lokr_start,
)
# PEFT's own IA³ scales biases too, and its OFT turns the inputs; LoKr's layers hold the tensors of ours.
IA3 = Kind("ia3", Scales, {"weight": "ia3_weight"}, LOKR.config, _ia3_start)
OFT = Kind("oft", Rotation, {"oft_blocks": "oft_blocks"}, LOKR.config, _oft_start)
KINDS = {kind.name: kind for kind in (LORA, DORA, LOHA, LOKR, IA3, OFT)}


def kind_of(weights: Weights) -> Kind:
    """What holds these in a network."""
    return KINDS[weights.kind.lower()]
