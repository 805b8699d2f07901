"""The loop: updates in order, and at their boundaries whatever is due, until done, stopped or handed over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from lora_trainer.hosts.ports import GpuLease
from lora_trainer.training.feed import Feed
from lora_trainer.training.results import Results
from lora_trainer.training.step import ForwardBackward, Update
from lora_trainer.training.trainables import Trainables


class Outcome(Enum):
    """Why a segment ended."""

    DONE = "done"
    STOPPED = "stopped"
    HANDED_OVER = "handed over"


class Boundary(Protocol):
    """Saves, validations and previews between two updates; `step` is the number of updates done."""

    def due(self, step: int) -> bool: ...

    def __call__(self, step: int) -> None: ...


@dataclass(frozen=True)
class Loop:
    """One segment's machinery. `learning_rate(step)` is that of update `step`, counted from 0."""

    feed: Feed
    forward_backward: ForwardBackward
    update: Update
    trainables: Trainables
    learning_rate: Callable[[int], float]
    boundary: Boundary
    results: Results


def fit(loop: Loop, *, first_step: int, lease: GpuLease, stop: Callable[[], bool]) -> tuple[Outcome, int]:
    """Train from update `first_step` (counted from 0) on.

    Returns why the segment ended and how many updates are done in all. Raises DivergedError.
    """
    steps, step = loop.results.steps, first_step
    for planned in loop.feed.updates(first_step):
        if step == steps or stop():
            break
        rate = loop.learning_rate(step)
        loop.trainables.set_learning_rate(rate)
        for batch in loop.feed.batches(planned):
            loop.forward_backward(batch)
        loop.update()
        step += 1
        loop.results.add(step, planned.epoch, rate)
        if loop.boundary.due(step):
            loop.results.read()
            loop.boundary(step)
            loop.results.restart_clock()
        if step < steps and not lease.hand_over():
            loop.results.read()
            return Outcome.HANDED_OVER, step
    loop.results.read()
    return (Outcome.DONE if step == steps else Outcome.STOPPED), step
