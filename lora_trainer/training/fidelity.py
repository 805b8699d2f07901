"""Fidelity against drift: how near drawn pictures come to the real ones, and how far other prompts have moved.

Both with few fixed draws and the model itself, in latents: nothing is decoded or downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_trainer.config import Config
from lora_trainer.dataset.samples import Sample
from lora_trainer.events import Compared, EventSink, Notice, Progress
from lora_trainer.sampling import conditions
from lora_trainer.training import randomness
from lora_trainer.training.data import TrainingData
from lora_trainer.training.judging import PASSES, SHARE, watched
from lora_trainer.training.looks import answer, drawn, features
from lora_trainer.training.segment import Segment

# What most models know, none of it a style.
PROMPTS = (
    "a photo of a dog",
    "a house by a lake",
    "portrait of a woman",
    "a red car in a street",
    "a bowl of fruit on a table",
    "a tree on a hill",
)
# Pictures that are drawn, in so few steps, and real ones that they are compared with.
PICTURES, STEPS, REAL = 8, 6, 24
# Not the run's, as in `validation.Validator`.
SEED = 0


@dataclass(frozen=True)
class Base:
    """What does not change over a run: the base's way with other prompts (timestep, shown, answered; on the CPU), what
    it sees in real pictures [n, C], and how far its own pictures are from those."""

    way: Sequence[tuple[int, Tensor, Tensor]]
    real: Tensor
    distance: float


@dataclass
class Fidelity:
    """Measures a run at its steps, where `measure_drift` asks for it. Pictures are drawn for the captions of `_asked`,
    which were never trained where pictures are held out, and held against the training pictures `_real`."""

    config: Config
    sink: EventSink
    _asked: list[str] = field(default_factory=list, init=False)
    _real: list[Sample] = field(default_factory=list, init=False)
    _base: Base | None = field(default=None, init=False)

    def look_at(self, data: TrainingData) -> None:
        """What is compared from now on: training pictures of the usual shape, spread over all."""
        if not self.config.measure_drift or self._real:
            return
        train = watched(data.train, len(data.train.samples), self.config.seed)
        shapes = [sample.latents.shape for sample in train]
        usual = max(shapes, key=shapes.count)
        self._real = [sample for sample in train if sample.latents.shape == usual][:REAL]
        if len(self._real) < 2:
            text = "measure_drift: nothing is measured, since no two training pictures have the same shape"
            self.sink(Notice(text=text, level="warning"))
            return
        held_out = data.held_out.samples if data.held_out else ()
        captions = [data.train.rules.plain(sample.item.caption) for sample in train]
        self._asked = [*(sample.item.caption for sample in held_out), *captions][:PICTURES]

    @property
    def prompts(self) -> Sequence[str]:
        return self.config.drift_prompts or PROMPTS

    @property
    def passes(self) -> int:
        """Forward passes of one measurement."""
        return len(self.prompts) * STEPS + len(self._asked) * (STEPS + 1)

    def every(self, steps: int, validations: int) -> int:
        """Steps between two measurements in a run of `steps`, a multiple of those between two `validations`, so that
        all take at most SHARE of its time; 0: only at the end."""
        if not self._asked:
            return 0
        budget = SHARE * steps * self.config.batch_size * self.config.gradient_accumulation_steps * PASSES
        # Before the first step as much, and the real pictures; and once at the end.
        count = int((budget - len(self._real)) / self.passes) - 2
        if count < 1:
            return 0
        stride = max(1, validations)
        return math.ceil(steps / (count + 1) / stride) * stride

    def __call__(self, segment: Segment, step: int) -> None:
        """Measure and tell; a run is not lost because it does not fit into the memory."""
        if not self._asked:
            return
        self.sink(Progress(stage="comparing", done=0, total=1))
        try:
            with segment.settled():
                if self._base is None:
                    with segment.base():
                        self._base = self._of_base(segment)
                begins_as_base = step == 0 and self.config.initial_lora is None
                drift = 0.0 if begins_as_base else self._drift(segment)
                likeness = 0.0 if begins_as_base else self._likeness(segment)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            self.sink(Notice(text=f"step {step}: drift not measured, it does not fit into the memory", level="warning"))
            return
        self.sink(Progress(stage="comparing", done=1, total=1))
        self.sink(Compared(step=step, likeness=likeness, drift=drift, score=likeness * (1 - drift)))

    def _of_base(self, segment: Segment) -> Base:
        x = self._noise(segment, "drift", len(self.prompts))
        way = drawn(segment.judge, x, self._told(segment, self.prompts), STEPS).way
        latents = torch.stack([sample.latents[0] for sample in self._real])
        real = self._seen(segment, latents.to(x.device))
        on_host = [(t, shown.cpu(), answered.cpu()) for t, shown, answered in way]
        return Base(on_host, real, self._distance(segment, real))

    def _drift(self, segment: Segment) -> float:
        """How far answers to other prompts are from the base's, squared, as a share of the base's own; at the places to
        which the base's own way leads."""
        told, device = self._told(segment, self.prompts), segment.model.facts.device
        moved = whole = 0.0
        for t, shown, answered in self._base.way:
            there = answered.to(device)
            moved += (answer(segment.judge, shown.to(device), t, told) - there).square().sum().item()
            whole += there.square().sum().item()
        return moved / whole

    def _likeness(self, segment: Segment) -> float:
        """Few pictures can seem nearer than real ones are to each other: that is as near as it gets."""
        if self._base.distance <= 0:
            return 1.0
        return min(1.0, 1 - self._distance(segment, self._base.real) / self._base.distance)

    def _distance(self, segment: Segment, real: Tensor) -> float:
        """How far the pictures that are drawn now are from the real ones."""
        x = self._noise(segment, "fidelity", len(self._asked))
        latents = drawn(segment.judge, x, self._told(segment, self._asked), STEPS).latents
        return distance(self._seen(segment, latents), real)

    def _seen(self, segment: Segment, latents: Tensor) -> Tensor:
        """By the base, whatever has been learned."""
        with segment.base():
            told = self._told(segment, [""] * len(latents))
            return features(segment.judge, latents, self._noise(segment, "seen", len(latents)), told)

    def _told(self, segment: Segment, prompts: Sequence[str]) -> dict[str, object]:
        bucket = self._real[0].bucket
        return conditions(segment.model, prompts, (bucket.width, bucket.height))

    def _noise(self, segment: Segment, purpose: str, count: int) -> Tensor:
        shape = tuple(self._real[0].latents.shape[1:])
        return randomness.normal(SEED, purpose, range(count), shape).to(segment.model.facts.device)


def distance(drawn: Tensor, real: Tensor) -> float:
    """The energy distance (Székely & Rizzo 2013) of [n, C] features to [m, C], n and m at least 2, without bias: few
    pictures are on average as far as many."""

    def within(z: Tensor) -> Tensor:
        return torch.cdist(z, z).sum() / (len(z) * (len(z) - 1))

    return (2 * torch.cdist(drawn, real).mean() - within(drawn) - within(real)).item()
