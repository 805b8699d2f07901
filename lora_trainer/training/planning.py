"""Which plan of the memory ladder a run is on: forecast before its steps, and changed when it does not do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from lora_trainer.config import Config
from lora_trainer.errors import UserError
from lora_trainer.events import EventSink, Forecast, Notice, Progress
from lora_trainer.hosts.ports import nothing
from lora_trainer.training.feed import Feed
from lora_trainer.training.fit import Outcome
from lora_trainer.training.forecast import Gpu, Need, gpu_of, rehearse
from lora_trainer.training.ladder import Plan
from lora_trainer.training.segment import Segment
from lora_trainer.training.spill import Spill

OUT_OF_MEMORY = "out of memory"
SPILLED = "the driver has moved GPU memory into the system's and steps take three times as long"


class OutOfMemoryError(UserError):
    """No plan of the ladder fits into the memory."""


@dataclass
class Planning:
    """`need` is what the rehearsal of the current plan measured; `short` why it will not do, in words. `storages`: the
    host's, lighter than one."""

    config: Config
    sink: EventSink
    storages: Callable[[str], Sequence[str]] = nothing
    need: Need | None = None
    short: str = OUT_OF_MEMORY

    def __post_init__(self) -> None:
        self.plan = Plan.of(self.config)
        self._gpu: Gpu | None = None

    @property
    def lighter(self) -> Plan | None:
        return self.plan.lighter(self.config.batch_size, self.storages)

    def go_on_with(self, checkpointing: int, parts: int, storage: str) -> None:
        """The plan that an earlier process came to."""
        self.plan = Plan(max(checkpointing, self.plan.checkpointing), parts, storage)

    def step_down(self, step: int) -> None:
        """To the next lighter plan, after `step` updates. Raises OutOfMemoryError when nothing is left to give up."""
        lighter = self.lighter
        if lighter is None or not self._may(lighter):
            stored = "" if lighter is None else f", or take auto_fit: true, which goes on with {lighter}"
            raise OutOfMemoryError(
                f"step {step + 1}: out of GPU memory, also with {self.plan}. Close what else uses the GPU, or "
                f"lower resolution or lora_rank{stored}"
            )
        self.plan = lighter
        self.sink(Notice(text=f"step {step + 1}: {self.short}, goes on with {self.plan}", level="warning"))
        self.short = OUT_OF_MEMORY

    def store_lighter(self, when: str) -> None:
        """To a lighter storage of the base, the only thing to give up before the steps. Raises OutOfMemoryError when
        there is none."""
        lighter = self.plan.stored_lighter(self.storages)
        if lighter is None or not self._may(lighter):
            stored = "" if lighter is None else f", or take base_precision={lighter.storage} or auto_fit: true"
            raise OutOfMemoryError(
                f"out of GPU memory {when}: close what else uses the GPU, or lower resolution{stored}"
            )
        self.plan = lighter
        self.sink(Notice(text=f"out of memory {when}: goes on with the base in {lighter.storage}", level="warning"))

    def _may(self, lighter: Plan) -> bool:
        """Whether to take it without being asked: another storage changes what is computed."""
        return self.config.auto_fit or lighter.storage == self.plan.storage

    def rehearse(self, segment: Segment, feed: Feed, steps: int, ready: Callable[[], object]) -> Outcome:
        """On a GPU: warm up, capture, and say what `steps` will need. DONE where the plan will do.

        `ready` is called between two warm-ups, and may raise.
        """
        self._gpu = gpu_of(segment.captures.device)
        if self._gpu is None:
            return Outcome.DONE
        try:
            need = self.need = rehearse(segment, feed, self._gpu, partial(self._warm_up, ready))
        except torch.cuda.OutOfMemoryError:
            return Outcome.OUT_OF_MEMORY
        if need.fits or self.lighter is None or not self.config.auto_fit:
            self._tell(need, steps)
            return Outcome.DONE
        self.short = str(need)
        return Outcome.OUT_OF_MEMORY

    def watch(self) -> Callable[[float], bool]:
        """Whether steps of so many seconds tell of memory that the driver has moved away."""
        if self._gpu is None or not self._gpu.spills or self.lighter is None:
            return lambda seconds: False
        spill = Spill(self.need.slowest, self._gpu.scarce)

        def spilled(seconds: float) -> bool:
            if not spill(seconds):
                return False
            self.short = SPILLED
            return True

        return spilled

    def _warm_up(self, ready: Callable[[], object], done: int, total: int) -> None:
        ready()
        self.sink(Progress(stage="warming up", done=done + 1, total=total))

    def _tell(self, need: Need, steps: int) -> None:
        if not self.config.trial:
            self.sink(Forecast(seconds=need.step * steps, memory=need.memory, available=need.available))
        if need.fits:
            return
        way_out = "close what else uses the GPU, or lower resolution or lora_rank"
        if self.lighter is not None:
            way_out = f"with {self.lighter} it is likely to fit, which auto_fit: true takes by itself"
        self.sink(Notice(text=f"{need}: steps will be slow; {way_out}", level="warning"))
