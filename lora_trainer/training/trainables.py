"""What is trained, in flat memory.

The modules' parameters are views of one flat fp32 buffer (the masters) and their gradients views of another, so
the update is a few launches whatever the number of modules, and several GPUs need one all-reduce.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

# Each parameter starts at a multiple of this many floats (64 bytes), so that vector loads stay aligned.
ALIGNMENT = 16


@dataclass(frozen=True)
class Slot:
    """Where a parameter lives: `owner.attribute` is `buffer[start : start + size]`.

    A tall matrix lies there transposed, so that the long side is contiguous, as the kernels want it: [r, n] for both
    factors of a LoRA.
    """

    name: str
    owner: nn.Module
    attribute: str
    shape: torch.Size
    start: int

    @property
    def size(self) -> int:
        return self.shape.numel()

    def of(self, buffer: Tensor) -> Tensor:
        """The view of `buffer` that is this slot's, in the parameter's shape."""
        part = buffer[self.start : self.start + self.size]
        rows, columns = self.shape[0], self.size // max(1, self.shape[0])
        if rows > columns == self.shape[1:2].numel():
            return part.view(columns, rows).t().view(self.shape)
        return part.view(self.shape)


@dataclass(frozen=True)
class Group:
    """A contiguous slice of the buffers with its own learning rate (a scalar tensor on the device).

    `factor` multiplies the scheduled learning rate.
    """

    name: str
    start: int
    stop: int
    learning_rate: Tensor
    factor: float = 1.0


class Trainables:
    """Flat masters and gradients under the parameters of `groups`.

    `groups` maps a group's name to its parameters as (name, owner, attribute), `factors` to its share of the learning
    rate (1 where it is left out). The parameters are replaced by views, so build this last, after everything that may
    replace them.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[tuple[str, nn.Module, str]]],
        factors: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self.slots: list[Slot] = []
        self.groups: list[Group] = []
        entries = [entry for members in groups.values() for entry in members]
        device = getattr(entries[0][1], entries[0][2]).device
        end = 0
        for group, members in groups.items():
            start = end
            for name, owner, attribute in members:
                shape = getattr(owner, attribute).shape
                self.slots.append(Slot(name, owner, attribute, shape, end))
                end += -(-shape.numel() // ALIGNMENT) * ALIGNMENT
            self.groups.append(Group(group, start, end, torch.zeros((), device=device), factors.get(group, 1.0)))
        self.masters = torch.zeros(end, device=device)
        self.grads = torch.zeros(end, device=device)
        for slot in self.slots:
            self._adopt(slot)

    @property
    def count(self) -> int:
        """Trained scalars, padding left out."""
        return sum(slot.size for slot in self.slots)

    def of(self, buffer: Tensor, slot: Slot) -> Tensor:
        """The view of `buffer` (masters, gradients, a moment, an average) that belongs to `slot`."""
        return slot.of(buffer)

    def set_learning_rate(self, value: float) -> None:
        """Schedule's learning rate of this step; no synchronisation."""
        for group in self.groups:
            group.learning_rate.fill_(value * group.factor)

    def verify_views(self) -> None:
        """Raise RuntimeError if anything replaced a parameter or its gradient behind our back."""
        for slot in self.slots:
            parameter = getattr(slot.owner, slot.attribute)
            expected = self.of(self.masters, slot)
            grad = self.of(self.grads, slot)
            if (
                parameter.data_ptr() != expected.data_ptr()
                or parameter.dtype != torch.float32
                or parameter.grad is None
                or parameter.grad.data_ptr() != grad.data_ptr()
            ):
                raise RuntimeError(f"{slot.name} no longer is a view of the flat buffer")

    def _adopt(self, slot: Slot) -> None:
        view = self.of(self.masters, slot)
        view.copy_(getattr(slot.owner, slot.attribute).detach())
        parameter = nn.Parameter(view)
        parameter.grad = self.of(self.grads, slot)
        setattr(slot.owner, slot.attribute, parameter)
