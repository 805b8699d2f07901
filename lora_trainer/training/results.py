"""Losses come off the device in batches, so that no step waits for the host."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_trainer.errors import UserError
from lora_trainer.events import EventSink, Notice, StepDone

READ_EVERY_SECONDS = 0.5
READ_EVERY_STEPS = 64
MAX_BAD_STEPS = 25
# Seconds in which somebody else can have done something.
SHARED = 0.05


class DivergedError(UserError):
    """Too many updates in a row were not finite."""

    def __init__(self, step: int, count: int) -> None:
        self.reason = f"{count} updates in a row were not finite"
        super().__init__(
            f"step {step}: {self.reason}. What was learned before them is kept. Lower learning_rate (a quarter is a "
            "good start), or use mixed_precision bf16 or no"
        )


@dataclass
class _Sent:
    """Updates whose figures are on their way to the host."""

    noted: list[tuple[int, int, float]]
    rows: Tensor
    arrived: Callable[[], bool]


@dataclass
class Results:
    """Collects `source` ((loss, gradient norm, held back) on the device) after each update and reports in batches.

    `step` is the last update reported; `mean_loss` is over the last `window` good ones, of which `losses` may hold some
    from before; `fastest` is the least time a step took, which leaves out a warm-up. `watch` is asked with the time a
    step of each report, and `spilled` is what it answered last.
    """

    source: Tensor
    steps: int
    sink: EventSink
    window: int
    losses: Iterable[float] = ()
    step: int = 0
    bad_in_a_row: int = 0
    fastest: float = 0.0
    watch: Callable[[float], bool] = lambda seconds: False
    clock: Callable[[], float] = time.perf_counter
    spilled: bool = False
    _ring: Tensor = field(init=False)
    _pending: list[tuple[int, int, float]] = field(default_factory=list)
    _sent: deque[_Sent] = field(default_factory=deque)
    _since: float = field(init=False)
    _asked: float = field(init=False)
    _others: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.losses = deque(self.losses, maxlen=self.window)
        self._since = self._asked = self.clock()
        self._ring = torch.zeros(READ_EVERY_STEPS, *self.source.shape, device=self.source.device)

    @property
    def mean_loss(self) -> float | None:
        return sum(self.losses) / len(self.losses) if self.losses else None

    def add(self, step: int, epoch: int, learning_rate: float) -> None:
        """Note update `step` (from 1); nobody waits for its figures. Raises DivergedError."""
        self._ring[len(self._pending)].copy_(self.source)
        self._pending.append((step, epoch, learning_rate))
        waited = self.clock() - self._asked
        if waited > READ_EVERY_SECONDS or len(self._pending) == READ_EVERY_STEPS:
            self._send()
        while self._sent and self._sent[0].arrived():
            self._report(self._sent.popleft())

    def read(self) -> None:
        """Report everything noted so far, waiting for it. Raises DivergedError."""
        self._send()
        if self._sent and self.source.device.type == "cuda":
            torch.cuda.current_stream(self.source.device).synchronize()
        while self._sent:
            self._report(self._sent.popleft())

    def _send(self) -> None:
        """Start copying what is noted to the host."""
        self._asked = self.clock()
        if not self._pending:
            return
        rows, arrived = self._ring[: len(self._pending)], lambda: True
        if rows.is_cuda:
            rows = torch.empty(rows.shape, pin_memory=True).copy_(rows, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            arrived = event.query
        self._sent.append(_Sent(self._pending, rows, arrived))
        self._pending = []

    def _report(self, sent: _Sent) -> None:
        now = self.clock()
        seconds = max(0.0, now - self._since - self._others) / len(sent.noted)
        # While others have the GPU, ours is still busy with what it was given: such times say little.
        alone = self._others == 0
        if alone or not self.fastest:
            self.fastest = min(seconds, self.fastest or seconds)
        self.spilled = alone and self.watch(seconds)
        memory = _reserved(self.source.device)
        for (step, epoch, rate), (loss, norm, bad) in zip(sent.noted, sent.rows.tolist(), strict=True):
            self._count(step, bad > 0)
            self.step = step
            if not bad:
                self.losses.append(loss)
            self.sink(
                StepDone(
                    step=step,
                    steps=self.steps,
                    epoch=epoch + 1,
                    loss=loss,
                    learning_rate=rate,
                    grad_norm=norm,
                    seconds=seconds,
                    memory=memory,
                )
            )
        self._since, self._others = now, 0.0

    def restart_clock(self) -> None:
        """What came since the last read was no training."""
        self._since, self._others = self.clock(), 0.0

    def shared(self, seconds: float) -> None:
        """For so long the GPU was offered to others, and theirs if that took time."""
        self._others += seconds if seconds > SHARED else 0.0

    def _count(self, step: int, bad: bool) -> None:
        self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
        if self.bad_in_a_row == 1:
            self.sink(Notice(text=f"step {step}: loss or gradient not finite, update left out", level="warning"))
        if self.bad_in_a_row == MAX_BAD_STEPS:
            raise DivergedError(step, MAX_BAD_STEPS)


def _reserved(device: torch.device) -> int | None:
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
