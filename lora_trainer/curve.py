"""What the held-out curve of a run says: which step was best, whether it is over, whether it has begun to overfit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from statistics import median
from typing import NamedTuple

# "Generalization loss" of Prechelt 1998, "Early stopping, but when?": GL_5 is a rise of 5 % over the best so far.
RISE = 0.05
# Second differences from which the noise is told, the newest ones, since early on a curve bends by itself; of fewer
# than FEWEST nothing is.
RECENT, FEWEST = 9, 5
# As a share of what has been learned so far: less than this over several points is standing still.
STILL = 0.025


class Point(NamedTuple):
    """Losses by the same draws at every step: held-out, of the base model (`base`) and with the LoRA (`lora`); the same
    of a handful of training pictures."""

    step: int
    base: float
    lora: float
    train: float | None = None
    train_base: float | None = None


class Comparison(NamedTuple):
    """As `events.Compared`."""

    step: int
    likeness: float
    drift: float
    score: float
    clip_image: float | None = None
    clip_text: float | None = None


def best(curve: Sequence[Point]) -> Point | None:
    """The lowest held-out loss that a LoRA reached, the first of equals."""
    reached = [point for point in curve if point.step > 0 and math.isfinite(point.lora)]
    return min(reached, key=lambda point: point.lora, default=None)


def noise(curve: Sequence[Point]) -> float:
    """The standard deviation of the held-out loss around its own course.

    With fixed draws only the weights move it. Each point is held against the middle of its neighbours, whose
    difference has 3/2 of the variance; a median forgives the few places where the curve bends. Of fewer than FEWEST
    such points nothing is known: 0.
    """
    losses = [point.lora for point in curve if point.step > 0]
    off = [abs(b - (a + c) / 2) for a, b, c in zip(losses, losses[1:], losses[2:], strict=False)]
    if len(off) < FEWEST:
        return 0.0
    # 0.6745: the median of a normal number's absolute value.
    return median(off[-RECENT:]) / 0.6745 / math.sqrt(1.5)


def waited(curve: Sequence[Point]) -> int:
    """Points over which the least held-out loss has fallen by no more than the noise, or STILL of its way from the
    base. The base counts as a start."""
    least = list(accumulate((point.lora for point in curve), min))
    if not least:
        return 0
    margin = max(noise(curve), STILL * (curve[0].base - least[-1]))
    return sum(earlier - least[-1] <= margin for earlier in least[:-1])


def risen(curve: Sequence[Point]) -> Point | None:
    """The first point whose held-out loss is RISE above the least before it."""
    at = _rise(curve)
    return None if at is None else curve[at]


def _rise(curve: Sequence[Point]) -> int | None:
    least = math.inf
    for at, point in enumerate(curve):
        if point.lora > least and point.lora >= least * (1 + RISE):
            return at
        least = min(least, point.lora)
    return None


def warning(curve: Sequence[Point]) -> str | None:
    """What there is to say once the held-out loss has risen, and what to do about it."""
    at = _rise(curve)
    if at is None:
        return None
    point = curve[at]
    before = [other for other in curve[:at] if math.isfinite(other.lora)]
    least = min(before, key=lambda other: other.lora)
    compared = f"{point.lora:.4f} at step {point.step}, {least.lora:.4f} "
    if least.step == 0:
        return (
            f"held-out pictures come out worse than with the base model ({compared}without the LoRA): lower the "
            "learning rate to a third, and look whether the captions fit the pictures"
        )
    return (
        f"overfitting: held-out pictures come out worse again ({compared}at step {least.step}). Stop near step "
        f"{least.step}; to get further, try half the learning rate, more varied pictures, or more lora_dropout"
    )


def chosen(point: Point, last: Point, steps: int, file: str) -> str:
    """Which step of so many was saved as the best, and where the last one is."""
    return (
        f"step {point.step} of {steps} was best on held-out pictures ({point.lora:.4f}; at step {last.step} "
        f"{last.lora:.4f}): saved that one; the last one is {file}"
    )
