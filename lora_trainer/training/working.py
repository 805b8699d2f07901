"""The copy of the trained weights that half-precision products read, and where their gradients land."""

from __future__ import annotations

import torch

from lora_trainer.training.trainables import Slot, Trainables


class WorkingCopy:
    """`Trainables` in the compute dtype, for the fused products only. In fp32 it is the masters themselves.

    With `collects`, gradients are first written in the compute dtype and added to the fp32 ones after each backward
    pass; otherwise the products add to the fp32 ones themselves.
    """

    def __init__(self, trainables: Trainables, dtype: torch.dtype, *, collects: bool) -> None:
        self.trainables, masters = trainables, trainables.masters
        same = dtype == masters.dtype
        self.weights = masters if same else masters.to(dtype)
        self.grads = trainables.grads if same or not collects else torch.zeros_like(self.weights)

    def weight(self, slot: Slot) -> torch.Tensor:
        return self.trainables.of(self.weights, slot)

    def grad(self, slot: Slot) -> torch.Tensor:
        return self.trainables.of(self.grads, slot)

    def refresh(self) -> None:
        """After the masters have changed."""
        if self.weights is not self.trainables.masters:
            self.weights.copy_(self.trainables.masters)

    def collect(self) -> None:
        """After a backward pass."""
        if self.grads is not self.trainables.grads:
            self.trainables.grads.add_(self.grads)
