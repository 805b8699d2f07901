"""Fidelity against drift: how near drawn pictures come to the real ones, and how far other prompts have moved.

Both with few fixed draws and the model itself, in latents: nothing is decoded or downloaded. CLIP scores of the
decoded drawings come beside them where the user has a CLIP model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lora_trainer.config import Config
from lora_trainer.dataset.images import load_image
from lora_trainer.dataset.samples import Sample
from lora_trainer.events import Compared, EventSink, Notice, Progress
from lora_trainer.models.latents import decode, to_image
from lora_trainer.sampling import conditions
from lora_trainer.training import randomness
from lora_trainer.training.clip_scores import Clip, Scores
from lora_trainer.training.data import TrainingData
from lora_trainer.training.judging import PASSES, SHARE, watched
from lora_trainer.training.looks import drawn, features
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
# For CLIP scores, forward passes that take as long as what they need for a drawn picture: beside one of SD1.5 at 512 px
# (0.80 TFLOP) its decoding counts three (2.5 TFLOP) and CLIP ViT-L less than one (0.18); the rest is left for the copy
# of CLIP to a GPU, 0.9 GB a measurement.
CLIP_PASSES = 6
# Not the run's, as in `validation.Validator`.
SEED = 0
# How often each part of the score counts in its geometric mean, beside the likeness once. The held-out loss moves by
# a few percent where the likeness of 8 pictures moves by tens: docs/defaults.md has what that is worth.
GAIN, UNMOVED = 6, 0.25


@dataclass(frozen=True)
class Base:
    """What does not change over a run: the base's way with other prompts, what it was `shown` and `answered` at each
    timestep [prompts, 4, h, w], on the CPU; what it sees in the real pictures of the asked captions [n, C] and in its
    own [n, C], how much training pictures differ in that [C], and CLIP's scores of its own."""

    shown: Sequence[Tensor]
    answered: Sequence[Tensor]
    real: Tensor
    spread: Tensor
    drawn: Tensor
    scores: Scores | None

    @property
    def distance(self) -> float:
        """Of its own pictures."""
        return self.far(self.drawn)

    def far(self, drawn: Tensor) -> float:
        """How far pictures, as it sees them [n, C], are from the real ones of the same captions: their mean squared
        difference in units of `spread`."""
        return ((drawn - self.real) / self.spread).square().mean().item()


@dataclass
class Fidelity:
    """Measures a run at its steps, where `measure_drift` asks for it. `gain`: the share of the base's held-out loss
    that is gone at a step, where pictures are held out. Pictures are drawn for the captions of `_asked`, which were
    never trained where pictures are held out, and held against the real ones, `_models`; what differs among the
    training pictures `_real` counts less. Raises ModelError where clip_model_dir holds no CLIP model."""

    config: Config
    sink: EventSink
    gain: Callable[[Segment, int], float | None] = lambda segment, step: None
    _asked: list[str] = field(default_factory=list, init=False)
    _models: list[Sample] = field(default_factory=list, init=False)
    _real: list[Sample] = field(default_factory=list, init=False)
    _base: Base | None = field(default=None, init=False)
    _clip: Clip | None = field(default=None, init=False)
    # The step and the time of the first measurement, and seconds of each.
    _first: tuple[int, float] | None = field(default=None, init=False)
    _costs: list[float] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.config.clip_model_dir:
            self._clip = Clip(Path(self.config.clip_model_dir))

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
        held_out = [(sample.item.caption, sample) for sample in (data.held_out.samples if data.held_out else ())]
        trained = [(data.train.rules.plain(sample.item.caption), sample) for sample in train]
        chosen = [(caption, sample) for caption, sample in held_out + trained if sample.latents.shape[1:] == usual[1:]]
        self._asked, self._models = map(list, zip(*chosen[:PICTURES], strict=True))

    @property
    def prompts(self) -> Sequence[str]:
        return self.config.drift_prompts or PROMPTS

    @property
    def passes(self) -> int:
        """Forward passes of one measurement."""
        clip = CLIP_PASSES if self._clip else 0
        return len(self.prompts) * STEPS + len(self._asked) * (STEPS + 1 + clip)

    def every(self, steps: int, validations: int) -> int:
        """Steps between two measurements in a run of `steps`, a multiple of those between two `validations`, so that
        all take at most SHARE of its time; 0: only at the end."""
        if not self._asked:
            return 0
        budget = SHARE * steps * self.config.batch_size * self.config.gradient_accumulation_steps * PASSES
        # Before the first step as much, and the real pictures; and once at the end.
        once = len(self._models) + len(self._real) * (2 if self._clip else 1)
        count = int((budget - once) / self.passes) - 2
        if count < 1:
            return 0
        stride = max(1, validations)
        return math.ceil(steps / (count + 1) / stride) * stride

    def between(self, segment: Segment, step: int, steps: int) -> None:
        """Measure on the way, where that and the measurement at the end take at most SHARE of the run: of a small model
        on a GPU they take longer than their number of passes says."""
        if not self._asked or self._first is None or self.affordable(step, steps):
            self(segment, step)

    def affordable(self, step: int, steps: int) -> bool:
        """By the clock since the first measurement of this process, for a run of `steps`: what is left beside the first
        and the last measurement is spent evenly."""
        first, began = self._first
        progress = (step - first) / (steps - first)
        left = SHARE * (time.perf_counter() - began) / progress - self._costs[0] - self._costs[-1]
        return sum(self._costs[1:]) + self._costs[-1] <= left * progress

    def __call__(self, segment: Segment, step: int) -> None:
        """Measure and tell; a run is not lost because it does not fit into the memory."""
        if not self._asked:
            return
        began = time.perf_counter()
        self._measure(segment, step)
        self._first = self._first or (step, began)
        self._costs.append(time.perf_counter() - began)

    def _measure(self, segment: Segment, step: int) -> None:
        gain = self.gain(segment, step)
        self.sink(Progress(stage="comparing", done=0, total=1))
        try:
            with segment.settled():
                if self._base is None:
                    with segment.base():
                        self._base = self._of_base(segment)
                begins_as_base = step == 0 and self.config.initial_lora is None
                unmoved = 0.0, 0.0, self._base.scores
                likeness, drift, scores = unmoved if begins_as_base else self._compared(segment)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            self.sink(Notice(text=f"step {step}: drift not measured, it does not fit into the memory", level="warning"))
            return
        self.sink(Progress(stage="comparing", done=1, total=1))
        clip = {} if scores is None else {"clip_image": scores.image, "clip_text": scores.text}
        value = score(likeness, drift, gain)
        self.sink(Compared(step=step, likeness=likeness, drift=drift, score=value, **clip))

    def _of_base(self, segment: Segment) -> Base:
        device = segment.model.facts.device
        real, models = (
            self._seen(segment, torch.stack([sample.latents[0] for sample in samples]).to(device))
            for samples in (self._real, self._models)
        )
        x = torch.cat([self._noise(segment, "drift", len(self.prompts)), self._start(segment)])
        base = drawn(segment.judge, x, self._told(segment, self._all), STEPS)
        others = len(self.prompts)
        shown, answered = ([each[:others].cpu() for each in way] for way in (base.shown, base.answered))
        latents, spread = base.latents[others:], real.std(0).clamp_min(1e-6)
        return Base(shown, answered, models, spread, self._seen(segment, latents), self._scores(segment, latents))

    def _compared(self, segment: Segment) -> tuple[float, float, Scores | None]:
        """The likeness of what is drawn now; the drift: how far answers to other prompts are from the base's, squared,
        as a share of the base's own, at the places to which the base's own way leads; and CLIP's scores."""
        x = self._start(segment)
        beside = [shown.to(x.device) for shown in self._base.shown]
        now = drawn(segment.judge, x, self._told(segment, self._all), STEPS, beside)
        moved = whole = 0.0
        for answered, base in zip(now.answered, self._base.answered, strict=True):
            there = base.to(x.device)
            moved += (answered[: len(there)] - there).square().sum().item()
            whole += there.square().sum().item()
        far = self._base.far(self._seen(segment, now.latents))
        return 1 - far / self._base.distance, moved / whole, self._scores(segment, now.latents)

    @property
    def _all(self) -> list[str]:
        """Other prompts, then the captions that are drawn."""
        return [*self.prompts, *self._asked]

    def _start(self, segment: Segment) -> Tensor:
        """The drawings' starting noise."""
        return self._noise(segment, "fidelity", len(self._asked))

    def _scores(self, segment: Segment, latents: Tensor) -> Scores | None:
        if self._clip is None:
            return None
        device = segment.model.facts.device
        if not self._clip.remembers:
            self._clip.remember((load_image(sample.item.path) for sample in self._real), device)
        # One after another, for the memory's sake.
        pictures = [to_image(decode(segment.model.vae, one)[0]) for one in latents.split(1)]
        return self._clip(pictures, self._asked, device)

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


def score(likeness: float, drift: float, gain: float | None) -> float:
    """One number: the geometric mean of the likeness, of the share of the base's held-out loss that is gone (GAIN
    times, where pictures are held out), and of what drift leaves (UNMOVED times). 0: no better than the base."""
    parts, weight = max(0.0, likeness) * max(0.0, 1 - drift) ** UNMOVED, 1
    if gain is not None:
        parts, weight = parts * max(0.0, gain) ** GAIN, 1 + GAIN
    return parts ** (1 / weight)
