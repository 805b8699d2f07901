"""Pictures and captions encoded once for a run, between which others may have the GPU."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial

from lora_trainer.config import Config
from lora_trainer.dataset.prepare import Encoded
from lora_trainer.events import EventSink, Notice
from lora_trainer.hosts.ports import Control, GpuLease
from lora_trainer.models.model import Model
from lora_trainer.training import data
from lora_trainer.training.data import Items, TrainingData
from lora_trainer.training.fit import Interrupted, Outcome, ask
from lora_trainer.training.precision import resolve
from lora_trainer.training.suits import require_suited


@dataclass
class Preparing:
    """What is encoded stays when a segment ends in the middle. `seconds` an image."""

    config: Config
    items: Items
    sink: EventSink
    control: Control
    seconds: float = 0.0
    data: TrainingData | None = None
    _encoded: tuple[Encoded, Encoded] | None = field(default=None, init=False)

    def __call__(self, model: Model, lease: GpuLease) -> Outcome:
        """DONE once `data` is there, else why not. Raises DataError, and ConfigError for what does not suit the model's
        family."""
        if self.data is not None:
            return Outcome.DONE
        if self._encoded is None:
            require_suited(self.config, model.facts.family)
            self._notices(model)
        began = time.perf_counter()
        between = partial(ask, self.control, lease)
        self._encoded = self._encoded or (Encoded(between), Encoded(between))
        try:
            self.data = data.load(self.items, self.config, model, sink=self.sink, kept=self._encoded)
        except Interrupted as interruption:
            return interruption.outcome
        self.seconds = (time.perf_counter() - began) / len(self.items.shown + self.items.held_out)
        return Outcome.DONE

    def _notices(self, model: Model) -> None:
        notice = resolve(self.config.mixed_precision, model.facts.device)[1]
        if notice:
            self.sink(Notice(text=notice))
        for told in model.facts.notices:
            self.sink(Notice(text=told))
        if self.config.enable_xformers:
            self.sink(Notice(text="enable_xformers: not needed, torch's own attention (SDPA) does the same"))
