"""Learning rates as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

Shape = Callable[[float], float]

# Factor by progress 0 … 1 after the warm-up.
SHAPES: dict[str, Shape] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def learning_rate(name: str, step: int, *, base: float, steps: int, warmup: int) -> float:
    """The learning rate of update `step` (from 0) of `steps`, as in transformers' schedules of the same names."""
    if step < warmup:
        return base * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return base * SHAPES[name](progress)
