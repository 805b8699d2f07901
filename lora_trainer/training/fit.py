"""The loop: updates in order, and at their boundaries whatever is due, until done or something ends the segment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch

from lora_trainer.dataset.order import Update
from lora_trainer.hosts.ports import Control, GpuLease
from lora_trainer.training.capture import Pace
from lora_trainer.training.control import never
from lora_trainer.training.feed import Feed
from lora_trainer.training.prefetch import ahead
from lora_trainer.training.results import Results
from lora_trainer.training.segment import Segment
from lora_trainer.training.step import Batch

# Updates whose batches are made before they are needed.
AHEAD = 3


class Outcome(Enum):
    """Why a segment ended."""

    DONE = "done"
    STOPPED = "stopped"
    PAUSED = "paused"
    HANDED_OVER = "handed over"
    OUT_OF_MEMORY = "out of memory"
    DIVERGED = "diverged"


class Interrupted(Exception):
    """Work before the steps ended before it was done."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


def ask(control: Control, lease: GpuLease, make_room: Callable[[], object] = lambda: None) -> None:
    """Between two pieces of work before the steps. Raises Interrupted."""
    if control.stopping():
        raise Interrupted(Outcome.STOPPED)
    if control.pausing():
        raise Interrupted(Outcome.PAUSED)
    if not lease.hand_over(make_room):
        raise Interrupted(Outcome.HANDED_OVER)


class Boundary(Protocol):
    """Saves, validations and previews between two updates; `step` is the number of updates done."""

    def due(self, step: int) -> bool: ...

    def __call__(self, step: int) -> None: ...


@dataclass(frozen=True)
class Loop:
    """One segment's machinery. `learning_rate(step)` is that of update `step`, counted from 0; `over` is asked whether
    the run is done before its last step."""

    feed: Feed
    segment: Segment
    learning_rate: Callable[[int], float]
    boundary: Boundary
    results: Results
    over: Callable[[], bool] = never


def fit(loop: Loop, *, first_step: int, lease: GpuLease, control: Control) -> tuple[Outcome, int]:
    """Train from update `first_step` (counted from 0) on.

    Returns why the segment ended and how many updates are done in all. Raises DivergedError.
    """
    on_gpu = loop.segment.captures.device.type == "cuda"
    with ahead(loop.feed.stream(first_step, pinned=on_gpu), AHEAD if on_gpu else 0) as updates:
        return _steps(loop, updates, first_step=first_step, lease=lease, control=control)


def _steps(
    loop: Loop,
    updates: Iterator[tuple[Update, list[Batch]]],
    *,
    first_step: int,
    lease: GpuLease,
    control: Control,
) -> tuple[Outcome, int]:
    segment, steps, step = loop.segment, loop.results.steps, first_step
    pace = Pace(segment.captures.device)
    while step < steps and not loop.over() and not control.stopping():
        if control.pausing():
            loop.results.read()
            return Outcome.PAUSED, step
        planned, batches = next(updates)
        rate = loop.learning_rate(step)
        segment.trainables.set_learning_rate(rate)
        try:
            for batch in batches:
                segment.forward_backward(batch)
        except torch.cuda.OutOfMemoryError:
            # Only gradients were added up, and those go with the segment: all that lasts is as after the last update.
            loop.results.read()
            return Outcome.OUT_OF_MEMORY, step
        segment.update()
        step += 1
        loop.results.add(step, planned.epoch, rate)
        pace()
        if loop.results.spilled and step < steps:
            loop.results.read()
            return Outcome.OUT_OF_MEMORY, step
        if loop.boundary.due(step):
            loop.results.read()
            loop.boundary(step)
            loop.results.restart_clock()
        offered = loop.results.clock()
        if step < steps and not lease.hand_over(segment.make_room):
            loop.results.read()
            return Outcome.HANDED_OVER, step
        loop.results.shared(loop.results.clock() - offered)
    loop.results.read()
    return (Outcome.DONE if step >= steps or loop.over() else Outcome.STOPPED), step
