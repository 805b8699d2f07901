"""Optimizers over flat buffers.

AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) as one call a group. Everything it needs is a tensor on the
device (learning rate, step, whether the gradient is finite), so a CUDA graph can hold it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lora_trainer.training.snapshot import restore
from lora_trainer.training.trainables import Slot, Trainables


class Optimizer(Protocol):
    """`step` applies the accumulated gradient unless `bad` (a 0-dim float tensor) is 1; if `capturable`, without a look
    from the host."""

    capturable: bool

    def step(self, trainables: Trainables, bad: Tensor) -> None: ...

    def live(self) -> dict[str, Tensor]:
        """What `step` changes beside the masters: 1-dim tensors as long as they are, and any of other dimensions."""
        ...

    def load(self, named: Mapping[str, Tensor], slots: Sequence[Slot]) -> None:
        """Go on from what `live` was, cut into parameters by `Snapshot.named`. Raises KeyError."""
        ...

    def settled(self, masters: Tensor) -> AbstractContextManager[None]:
        """While `masters` are saved or judged they are the average over steps, if it keeps one; then as before."""
        ...


@dataclass(frozen=True)
class AdamWSettings:
    """The usual names; `weight_decay` is decoupled and scaled by the learning rate."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01


class FlatAdamW:
    """AdamW over `Trainables`' buffers; torch's fused kernel where it takes tensors, plain operations elsewhere."""

    capturable = True

    def __init__(self, trainables: Trainables, settings: AdamWSettings) -> None:
        self.settings = settings
        self.exp_avg = torch.zeros_like(trainables.masters)
        self.exp_avg_sq = torch.zeros_like(trainables.masters)
        self.steps = torch.zeros((), device=trainables.masters.device)
        self.fused = fused_adamw_works(trainables.masters.device)

    def step(self, trainables: Trainables, bad: Tensor) -> None:
        self.steps.add_(1 - bad)
        apply = self._fused if self.fused else self._plain
        for group in trainables.groups:
            part = slice(group.start, group.stop)
            buffers = [b[part] for b in (trainables.masters, trainables.grads, self.exp_avg, self.exp_avg_sq)]
            apply(buffers, group.learning_rate, bad)

    def live(self) -> dict[str, Tensor]:
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "steps": self.steps}

    def load(self, named: Mapping[str, Tensor], slots: Sequence[Slot]) -> None:
        restore(named, self.live(), slots)

    def settled(self, masters: Tensor) -> AbstractContextManager[None]:
        return nullcontext()

    def _fused(self, buffers: list[Tensor], learning_rate: Tensor, bad: Tensor) -> None:
        fused_adamw(buffers, self.steps, learning_rate, bad, self.settings)

    def _plain(self, buffers: list[Tensor], learning_rate: Tensor, bad: Tensor) -> None:
        master, grad, exp_avg, exp_avg_sq = buffers
        s = self.settings
        # A non-finite gradient times zero is not zero, so it is replaced; the weights `keep` then hold all still.
        keep = 1 - bad
        grad = torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0)
        exp_avg.lerp_(grad, keep * (1 - s.beta1))
        exp_avg_sq.lerp_(grad.square(), keep * (1 - s.beta2))
        # Until the first good step both corrections would divide by zero.
        steps = self.steps.clamp(min=1)
        # 1 - beta^steps, without the cancellation that costs four digits at the first steps.
        correction1, correction2 = (-torch.expm1(steps * math.log(beta)) for beta in (s.beta1, s.beta2))
        denominator = (exp_avg_sq / correction2).sqrt_().add_(s.eps)
        rate = learning_rate * keep
        master.mul_(1 - rate * s.weight_decay)
        master.sub_(exp_avg / denominator * (rate / correction1))


def fused_adamw(
    buffers: list[Tensor], steps: Tensor, learning_rate: Tensor, bad: Tensor, settings: AdamWSettings
) -> None:
    """torch's fused AdamW on [master, grad, exp_avg, exp_avg_sq]; `steps` is already advanced."""
    master, grad, exp_avg, exp_avg_sq = buffers
    torch._fused_adamw_(
        [master],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [steps],
        lr=learning_rate,
        beta1=settings.beta1,
        beta2=settings.beta2,
        weight_decay=settings.weight_decay,
        eps=settings.eps,
        amsgrad=False,
        maximize=False,
        grad_scale=None,
        found_inf=bad,
    )


def fused_adamw_works(device: torch.device) -> bool:
    """Whether this torch has a fused AdamW for `device` that takes its learning rate as a tensor."""
    tiny = [torch.ones(4, device=device) for _ in range(4)]
    one, zero = torch.ones((), device=device), torch.zeros((), device=device)
    try:
        fused_adamw(tiny, one, one, zero, AdamWSettings())
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False
    return True
