"""Max-norm scaling, kohya's `scale_weight_norms`: no module's change of its weight grows beyond a norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from lora_trainer.training.optimizers import Optimizer
from lora_trainer.training.trainables import Slot, Trainables


@dataclass(frozen=True)
class Product:
    """One module's tensors, of whose product its change is `scale` times."""

    down: Slot
    up: Slot
    scale: float

    def norm(self, masters: Tensor) -> Tensor:
        """‖scale B A‖ = scale sqrt(tr(AAᵀ BᵀB)), a scalar on the device, without forming BA."""
        a, b = self.down.of(masters).flatten(1), self.up.of(masters).flatten(1)
        return self.scale * ((a @ a.t()) * (b.t() @ b)).sum().clamp(min=0).sqrt()


@dataclass(frozen=True)
class WithinNorm:
    """`optimizer`, after each of whose steps every product's norm is at most `most`: what is longer is shortened, each
    factor by the same share. Nothing waits for the device."""

    optimizer: Optimizer
    products: Sequence[Product]
    most: float

    @property
    def capturable(self) -> bool:
        return self.optimizer.capturable

    def step(self, trainables: Trainables, bad: Tensor) -> None:
        self.optimizer.step(trainables, bad)
        masters = trainables.masters
        for product in self.products:
            share = (self.most / product.norm(masters)).clamp(max=1).sqrt()
            for slot in (product.down, product.up):
                slot.of(masters).mul_(share)

    def live(self) -> dict[str, Tensor]:
        return self.optimizer.live()

    def load(self, named: Mapping[str, Tensor], slots: Sequence[Slot]) -> None:
        self.optimizer.load(named, slots)

    def settled(self, masters: Tensor) -> AbstractContextManager[None]:
        return self.optimizer.settled(masters)


def products_of(slots: Sequence[Slot], scales: Mapping[str, float]) -> list[Product]:
    """The products of modules by their scales."""
    by_name = {slot.name: slot for slot in slots}
    return [Product(by_name[f"{name}.lora_A"], by_name[f"{name}.lora_B"], scale) for name, scale in scales.items()]
