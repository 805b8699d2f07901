"""What a run can go back to: the last good state in memory, and full states on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lora_trainer.errors import OutputError
from lora_trainer.events import EventSink, Notice
from lora_trainer.training.segment import State
from lora_trainer.training.snapshot import Snapshot
from lora_trainer.training.states import Facts, StateFolder

# Steps between states in memory where none are asked for on disk.
EVERY = 100
ROLLBACKS = 3


@dataclass
class Keeper:
    """`states` is None for a run that is not worth resuming. `facts(step)` says what goes with the tensors."""

    states: StateFolder | None
    every: int
    sink: EventSink
    facts: Callable[[int], Facts]
    step: int = 0
    rollbacks: int = 0
    _good: Callable[[], State] | None = field(default=None, init=False)

    @property
    def due(self) -> int:
        """Steps between two states."""
        return self.every or EVERY

    @property
    def rate_factor(self) -> float:
        """Of the learning rate: each rollback halves it."""
        return 0.5**self.rollbacks

    def remember(self, good: Callable[[], State], step: int) -> None:
        """Where a rollback leads to from now on."""
        self._good, self.step = good, step

    def keep(self, snapshot: Snapshot, step: int) -> None:
        """At a boundary of good numbers. A state that cannot be written is said, and the run goes on."""
        self.remember(snapshot.named, step)
        if self.every:
            self._told(step, lambda: self.states and self.states.write_behind(snapshot, self.facts(step)))

    def keep_durably(self, snapshot: Snapshot, step: int) -> None:
        """Before the run ends or waits: on disk when this returns."""
        self.remember(snapshot.named, step)
        self._told(step, lambda: self.states and self.states.write(snapshot, self.facts(step)))

    def last(self) -> tuple[int, State | None]:
        """The step of the last good state, and the state; none of the beginning."""
        return self.step, self._good() if self._good else None

    def roll_back(self) -> tuple[int, State | None] | None:
        """`last`, with half the learning rate from now on; None when that was tried often enough."""
        if self.rollbacks == ROLLBACKS:
            return None
        self.rollbacks += 1
        return self.last()

    def _told(self, step: int, write: Callable[[], object]) -> None:
        try:
            write()
        except OutputError as error:
            self.sink(Notice(text=f"step {step}: no state to resume from, training goes on: {error}", level="warning"))
