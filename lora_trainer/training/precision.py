"""Mixed precision: which dtype computes, and the loss scale that keeps fp16 gradients from vanishing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}
CPU_NOTICE = "mixed_precision fp16 needs a GPU: training in fp32 on the CPU"


@dataclass(frozen=True)
class Precision:
    """`compute` is the dtype of the frozen weights and of the matrix products."""

    device: torch.device
    compute: torch.dtype

    def autocast(self) -> AbstractContextManager:
        """Autocast without its weight cache, which a captured step could not use."""
        if self.compute == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute, cache_enabled=False)


def resolve(mixed_precision: str, device: torch.device) -> tuple[Precision, str | None]:
    """The precision of a run, and a notice when it is not the one asked for."""
    if mixed_precision == "fp16" and device.type == "cpu":
        return Precision(device, torch.float32), CPU_NOTICE
    return Precision(device, DTYPES[mixed_precision]), None


class LossScaler:
    """Dynamic loss scaling (Micikevicius et al. 2018, arXiv:1710.03740), wholly on the device.

    A bad step halves the scale, 2,000 good ones in a row double it. Switched off, the scale stays 1.
    """

    INTERVAL = 2000

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = torch.full((), 65536.0 if enabled else 1.0, device=device)
        self.good = torch.zeros((), device=device)

    def update(self, bad: Tensor) -> None:
        """`bad`: 0-dim float tensor, 1 after a non-finite gradient."""
        if not self.enabled:
            return
        good = (self.good + 1) * (1 - bad)
        full = (good >= self.INTERVAL).float()
        self.scale.mul_((1 + full) * (1 - 0.5 * bad))
        self.good.copy_(good * (1 - full))

    def live(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "good": self.good}
