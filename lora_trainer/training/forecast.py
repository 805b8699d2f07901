"""What a run will need, measured before its first step: GPU memory and time.

A GPU's parts of a step are warmed up and captured then anyway, so the measurement costs nothing of its own.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from lora_trainer.events import AnyEvent, EventSink, Forecast, StepDone
from lora_trainer.logs import GIB
from lora_trainer.training.feed import Feed
from lora_trainer.training.segment import Segment

# Where there is no rehearsal, the first steps show how long one takes; the quickest of so many.
FIRST = 3
# Less than this share of a GPU's memory free is none.
SCARCE = 1 / 16


@dataclass(frozen=True)
class Gpu:
    """Readings of a CUDA device: bytes and seconds."""

    device: torch.device

    def begin(self) -> int:
        """Forget earlier peaks. Returns what torch could hold: what it holds and what is free."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)

    def peak(self) -> int:
        """The most that torch held since then, the pool of the captured parts included."""
        return torch.cuda.max_memory_reserved(self.device)

    def time(self, work: Callable[[], object]) -> float:
        torch.cuda.synchronize(self.device)
        began = time.perf_counter()
        work()
        torch.cuda.synchronize(self.device)
        return time.perf_counter() - began

    def scarce(self) -> bool:
        """Whether next to nothing is free. Asks the driver, not the device: no step waits for it."""
        free, total = torch.cuda.mem_get_info(self.device)
        return free < SCARCE * total

    @property
    def spills(self) -> bool:
        """Whether the driver moves memory into the system's where it runs out: Windows', also under WSL."""
        return sys.platform == "win32" or "microsoft" in platform.release().lower()


def gpu_of(device: torch.device) -> Gpu | None:
    return Gpu(device) if device.type == "cuda" else None


@dataclass(frozen=True)
class Need:
    """Bytes: the most that torch holds, and what there is. Seconds: a step on average, and one of the slowest shape."""

    memory: int
    available: int
    step: float
    slowest: float

    @property
    def fits(self) -> bool:
        return self.memory <= self.available

    def __str__(self) -> str:
        return f"needs {self.memory / GIB:.1f} of {self.available / GIB:.1f} GB"


def rehearse(segment: Segment, feed: Feed, gpu: Gpu, between: Callable[[int, int], object]) -> Need:
    """Run and capture the parts of a step for each shape of `feed`, the largest first; `segment` then is as it was.

    `between(shape, shapes)` is called before each shape's first run, and may raise. Raises torch's OutOfMemoryError.
    """
    examples, available = feed.examples(), gpu.begin()
    parts = [partial(segment.forward_backward, example.batch) for example in examples]
    before = segment.snapshot().named()
    try:
        # All before the first is captured: beside what a captured part holds, one that just runs needs as much again.
        for number, part in enumerate(parts):
            between(number, len(parts))
            part()
        segment.update()
        for part in (*parts, segment.update):
            part()
        times, update = [gpu.time(part) for part in parts], gpu.time(segment.update)
    finally:
        segment.begin_again(before)
    batches = sum(example.count * seconds for example, seconds in zip(examples, times, strict=True))
    return Need(
        memory=gpu.peak(),
        available=available,
        step=batches / feed.steps_per_epoch + update,
        slowest=max(times) * feed.accumulation * feed.parts + update,
    )


@dataclass
class FromFirstSteps:
    """A sink before `sink` that adds a forecast of the time, once the first steps have been seen."""

    sink: EventSink
    seen: list[float] = field(default_factory=list)

    def __call__(self, event: AnyEvent) -> None:
        self.sink(event)
        if not isinstance(event, StepDone) or len(self.seen) == FIRST:
            return
        self.seen.append(event.seconds)
        if len(self.seen) == FIRST and event.step < event.steps:
            self.sink(Forecast(seconds=min(self.seen) * (event.steps - event.step)))
