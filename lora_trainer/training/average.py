"""The exponential moving average of the weights, on the device beside any optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lora_trainer.training.optimizers import Optimizer
from lora_trainer.training.snapshot import restore
from lora_trainer.training.trainables import Slot, Trainables


class Averaged:
    """`optimizer` with an average of the masters over about 1 / (1 - `decay`) updates.

    It begins with the first update's weights and forgets fast at first, by (1 + n) / (10 + n) after n more, as
    diffusers' EMAModel does: a short run would else stay near its start.
    """

    def __init__(self, optimizer: Optimizer, masters: Tensor, decay: float) -> None:
        self.optimizer, self.decay = optimizer, decay
        self.average = masters.clone()
        self.updates = torch.zeros((), device=masters.device)

    @property
    def capturable(self) -> bool:
        return self.optimizer.capturable

    def step(self, trainables: Trainables, bad: Tensor) -> None:
        self.optimizer.step(trainables, bad)
        decay = ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay) * (self.updates > 0)
        self.average.lerp_(trainables.masters, (1 - decay) * (1 - bad))
        self.updates.add_(1 - bad)

    def live(self) -> dict[str, Tensor]:
        return {**self.optimizer.live(), **self._own()}

    def load(self, named: Mapping[str, Tensor], slots: Sequence[Slot]) -> None:
        restore(named, self._own(), slots)
        self.optimizer.load(named, slots)

    @contextmanager
    def settled(self, masters: Tensor) -> Iterator[None]:
        before = masters.clone()
        masters.copy_(self.average)
        try:
            yield
        finally:
            masters.copy_(before)

    def _own(self) -> dict[str, Tensor]:
        return {"average": self.average, "updates": self.updates}
