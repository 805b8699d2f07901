"""What happens between two updates: intermediate saves, validations, previews."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lora_trainer.dataset.samples import Prepared
from lora_trainer.events import EventSink, Notice, Progress, Validated
from lora_trainer.training.segment import Segment
from lora_trainer.training.step import Network
from lora_trainer.training.validation import Validator

Action = Callable[[int], object]


@dataclass(frozen=True)
class Boundaries:
    """Each action with how often it is due, in steps (0: never). The end of the run is the caller's."""

    actions: Sequence[tuple[int, Action]]
    steps: int

    def due(self, step: int) -> bool:
        return step < self.steps and any(every and step % every == 0 for every, _ in self.actions)

    def __call__(self, step: int) -> None:
        for every, action in self.actions:
            if every and step % every == 0:
                action(step)


@dataclass
class Validation:
    """The held-out curve of a run; the base model's value is its zero line."""

    held_out: Prepared | None
    sink: EventSink
    base: float | None = None
    lora: float | None = None
    seconds: float = 0.0

    def __call__(self, segment: Segment, step: int) -> None:
        """Measure and tell. Before the first update the LoRA is zero, so that value is the base's."""
        if self.held_out is None:
            return
        count = len(self.held_out.samples)
        began = time.perf_counter()
        self.sink(Progress(stage="validating", done=0, total=count))
        with segment.settled():
            loss = self._loss(segment.judge, step)
        if loss is None:
            return
        self.lora = loss
        self.sink(Progress(stage="validating", done=count, total=count))
        self.seconds = time.perf_counter() - began
        self.base = self.lora if step == 0 else self.base
        if self.base is not None:
            self.sink(Validated(step=step, base=self.base, lora=self.lora))

    def _loss(self, network: Network, step: int) -> float | None:
        """In smaller batches where the memory is short; None, and said, where even one picture does not fit."""
        size = Validator.batch_size
        while size:
            try:
                return Validator(self.held_out.samples, size).loss(network)
            except torch.cuda.OutOfMemoryError:
                size //= 2
            torch.cuda.empty_cache()
        self.sink(Notice(text=f"step {step}: not validated, it does not fit into the memory", level="warning"))
        return None
