"""Learning rates as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from lora_trainer.config import Config

# Factor by progress 0 … 1 after the warm-up.
Shape = Callable[[float], float]


def linear(progress: float) -> float:
    return 1 - progress


def cosine(progress: float, cycles: int = 1) -> float:
    """Half a cosine, down to 0, `cycles` times over (SGDR, Loshchilov & Hutter 2017, arXiv:1608.03983)."""
    return 0.0 if progress >= 1 else 0.5 * (1 + math.cos(math.pi * (cycles * progress % 1)))


def polynomial(progress: float, power: float) -> float:
    return (1 - progress) ** power


def rex(progress: float) -> float:
    """High for long, then steeply down (Chen et al. 2021, arXiv:2107.04197)."""
    return (1 - progress) / (0.5 + 0.5 * (1 - progress))


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each of `steps` updates: up from 0 to `base` over the first `warmup`, then by `shape`."""

    base: float
    steps: int
    warmup: int
    shape: Shape

    @classmethod
    def of(cls, config: Config, steps: int, factor: float = 1.0) -> Schedule:
        """Of a run of `steps` updates, at `factor` times its learning rate."""
        shapes: dict[str, Shape] = {
            "constant": lambda progress: 1.0,
            "linear": linear,
            "cosine": cosine,
            "cosine_with_restarts": partial(cosine, cycles=config.lr_scheduler_num_cycles),
            "polynomial": partial(polynomial, power=config.lr_scheduler_power),
            "rex": rex,
        }
        warmup = config.lr_warmup_steps or round(config.lr_warmup_ratio * steps)
        return cls(config.learning_rate * factor, steps, warmup, shapes[config.lr_scheduler])

    def __call__(self, step: int) -> float:
        """That of update `step`, counted from 0."""
        if step < self.warmup:
            return self.base * step / self.warmup
        return self.base * self.shape(min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup)))
