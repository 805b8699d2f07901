"""What training has changed, copied off the device without stopping it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_trainer.training.trainables import Slot


@dataclass(frozen=True)
class Snapshot:
    """Copies of a segment's live tensors, as they were between two updates.

    Buffers of one dimension, as long as the flat masters, are cut into parameters, so that a state does not depend on
    how they lie. `beside`: what goes with them, in the form of `named`.
    """

    copies: Mapping[str, Tensor]
    slots: Sequence[Slot]
    wait: Callable[[], object]
    beside: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, live: Mapping[str, Tensor], slots: Sequence[Slot]) -> Snapshot:
        """Off a GPU the copies are page-locked and on their way: `wait` before reading them."""
        if not any(tensor.is_cuda for tensor in live.values()):
            return cls({name: tensor.clone() for name, tensor in live.items()}, slots, lambda: None)
        copies = {
            name: torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            for name, tensor in live.items()
        }
        arrived = torch.cuda.Event()
        arrived.record()
        return cls(copies, slots, arrived.synchronize)

    def named(self) -> dict[str, Tensor]:
        """Each tensor as `name/parameter` (a flat buffer) or whole as `name`."""
        self.wait()
        own = {key: tensor for name, copy in self.copies.items() for key, tensor in cut(name, copy, self.slots)}
        return {**own, **self.beside}


def restore(named: Mapping[str, Tensor], live: Mapping[str, Tensor], slots: Sequence[Slot]) -> None:
    """`Snapshot.named` back into the live tensors. Raises KeyError where something is missing."""
    for name, tensor in live.items():
        for key, part in cut(name, tensor, slots):
            part.copy_(named[key])


def cut(name: str, tensor: Tensor, slots: Sequence[Slot]) -> list[tuple[str, Tensor]]:
    """(key, view) of the parts of a live tensor or of its copy."""
    if tensor.dim() != 1:
        return [(name, tensor)]
    return [(f"{name}/{slot.name}", slot.of(tensor)) for slot in slots]
