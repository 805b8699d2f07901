"""How good a run is on its way: the curve of its held-out loss, the weights at its best, and when it is over."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lora_trainer.config import Config
from lora_trainer.curve import Point, best, risen, waited, warning
from lora_trainer.dataset.samples import Prepared, Sample, length
from lora_trainer.events import EventSink, Notice, Progress, Validated
from lora_trainer.training import randomness
from lora_trainer.training.data import TrainingData
from lora_trainer.training.segment import BEST, Segment, State
from lora_trainer.training.snapshot import Snapshot
from lora_trainer.training.step import Network
from lora_trainer.training.validation import Validator

# Of a run's time, for measurements whose number is ours to choose; but there are at least, and at most, so many.
SHARE = 0.05
LEAST, MOST = 20, 25
# Forward passes that take as long as a picture's training step.
PASSES = 3
# Held-out pairs for each training pair: the run is judged by the held-out ones, the others only stand beside them.
BESIDE = 4


@dataclass
class Validation:
    """Measures a run at its steps. `weights` are those at the best step so far, as they would be saved."""

    config: Config
    sink: EventSink
    curve: list[Point] = field(default_factory=list)
    weights: State = field(default_factory=dict)
    seconds: float = 0.0
    batch_size: int = Validator.batch_size
    _validators: tuple[Validator, ...] = field(default=(), init=False)

    def look_at(self, data: TrainingData) -> None:
        """What is measured from now on."""
        if data.held_out is not None:
            held_out = data.held_out.samples
            train = watched(data.train, len(held_out), self.config.seed)
            parts = zip((held_out, train), draws(self.config), strict=True)
            self._validators = tuple(Validator(samples, most=most) for samples, most in parts)

    def go_on_from(self, curve: list[Point], state: Mapping[str, Tensor]) -> None:
        """An earlier process's curve, and the state that goes with it."""
        self.curve = list(curve)
        self.weights = {name: tensor for name, tensor in state.items() if name.startswith(f"{BEST}/")}

    def go_back(self, step: int, state: State | None) -> None:
        """The run is at `step` again, in `state` (None: the beginning)."""
        self.go_on_from([point for point in self.curve if point.step <= step], state or {})

    def every(self, steps: int) -> int:
        """Steps between two measurements in a run of `steps`; 0: only at the start and the end."""
        return interval(self.config, self.pairs, steps)

    @property
    def pairs(self) -> int:
        """What one measurement looks at."""
        return sum(validator.count for validator in self._validators)

    def over(self) -> bool:
        """Whether early stopping ends the run."""
        patience = self.config.early_stopping_patience
        return patience > 0 and waited(self.curve) >= patience

    def earlier(self, step: int) -> Point | None:
        """Where the held-out loss was lowest, if that was before `step`."""
        point = best(self.curve)
        return point if point is not None and point.step < step and self.weights else None

    def summary(self) -> dict[str, object]:
        """What `events.Finished` says of it."""
        if self.last is None:
            return {}
        least = best(self.curve)
        saved = self.earlier(self.last.step) if self.config.save_best else None
        saved = saved or self.last
        return {
            "validation_base": saved.base,
            "validation_lora": saved.lora,
            "validation_train": saved.train,
            "best_step": least.step if least else None,
            "overfit": risen(self.curve) is not None,
        }

    @property
    def last(self) -> Point | None:
        return self.curve[-1] if self.curve else None

    def __call__(self, segment: Segment, step: int) -> None:
        """Measure and tell."""
        if not self._validators or (self.last and self.last.step == step):
            return
        total = self.pairs
        began = time.perf_counter()
        self.sink(Progress(stage="validating", done=0, total=total))
        with segment.settled():
            point = self._point(segment, step)
            if point is None:
                text = f"step {step}: not validated, it does not fit into the memory"
                self.sink(Notice(text=text, level="warning"))
                return
            self.curve.append(point)
            if best(self.curve) is point:
                snapshot = Snapshot.of({BEST: segment.trainables.masters}, segment.trainables.slots)
                self.weights = snapshot.named()
        self.sink(Progress(stage="validating", done=total, total=total))
        self.seconds = (time.perf_counter() - began) / total
        self._tell(point)

    def gain(self, segment: Segment, step: int) -> float | None:
        """The share of the base's held-out loss that is gone at `step`, measured if it is not yet; None where nothing
        is held out, the memory is short or the base loses nothing."""
        self(segment, step)
        last = self.last
        return 1 - last.lora / last.base if last and last.step == step and last.base else None

    def _tell(self, point: Point) -> None:
        self.sink(Validated(**point._asdict()))
        told = warning(self.curve)
        if told is not None and risen(self.curve[:-1]) is None:
            self.sink(Notice(text=told, level="warning"))
        if self.over():
            self.sink(
                Notice(
                    text=f"early stopping: the held-out loss stood still over {waited(self.curve)} measurements, so "
                    f"step {point.step} is the last one"
                )
            )

    def _point(self, segment: Segment, step: int) -> Point | None:
        """None where not even one picture fits into the memory. The base is measured once: as a LoRA at weight 0."""
        try:
            lora, train = self._losses(segment.judge)
            if self.curve:
                return Point(step, self.curve[0].base, lora, train, self.curve[0].train_base)
            if step == 0 and self.config.initial_lora is None:
                return Point(step, lora, lora, train, train)
            with segment.base():
                base, train_base = self._losses(segment.judge)
            return Point(step, base, lora, train, train_base)
        except torch.cuda.OutOfMemoryError:
            return None

    def _losses(self, network: Network) -> tuple[float, float]:
        """Of held-out and of training pictures. Raises torch's OutOfMemoryError."""
        held_out, train = (self._loss(validator, network) for validator in self._validators)
        return held_out, train

    def _loss(self, validator: Validator, network: Network) -> float:
        """In smaller batches from now on where the memory is short."""
        while True:
            try:
                return replace(validator, batch_size=self.batch_size).loss(network)
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                if self.batch_size == 1:
                    raise
                self.batch_size //= 2


def watched(train: Prepared, count: int, seed: int) -> list[Sample]:
    """`count` training pictures as held-out ones are looked at, in their plainest view and caption; chosen by seed and
    file name, so that adding pictures changes few of them."""
    first: dict[object, Sample] = {}
    for sample in train.trained:
        first.setdefault(sample.item.path, sample)
    chosen = sorted(first.values(), key=lambda sample: randomness.key(seed, f"watch {sample.item.path.name}"))
    return [replace(sample, tokens=length(sample.text)) for sample in chosen[:count]]


def draws(config: Config) -> tuple[int, int]:
    """Pairs that are measured each time, at most: of held-out pictures, and of training pictures."""
    return config.validation_draws, config.validation_draws // BESIDE


def interval(config: Config, pairs: int, steps: int) -> int:
    """Steps between two measurements of so many pairs each, in a run of `steps`; 0: only at the start and the end."""
    if config.validate_every or not config.early_stopping_patience:
        return config.validate_every
    visits = config.batch_size * config.gradient_accumulation_steps
    cheap = pairs / (PASSES * visits * SHARE)
    return math.ceil(max(steps / MOST, min(cheap, steps / LEAST)))
