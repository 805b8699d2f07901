"""One run's memory between its segments, and what it does in each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from lora_trainer.config import Config
from lora_trainer.dataset.prepare import Encoded
from lora_trainer.errors import OutputError, UserError
from lora_trainer.events import EventSink, Notice, Started
from lora_trainer.hosts.ports import GpuLease
from lora_trainer.models.model import Model
from lora_trainer.training import data, schedules
from lora_trainer.training.boundary import Boundaries, Validation
from lora_trainer.training.data import Items, TrainingData
from lora_trainer.training.feed import Feed
from lora_trainer.training.fit import Loop, Outcome, fit
from lora_trainer.training.ladder import Plan
from lora_trainer.training.output import Output, Progress
from lora_trainer.training.precision import resolve
from lora_trainer.training.results import DivergedError, Results
from lora_trainer.training.segment import Segment, State, alpha_of, open_segment
from lora_trainer.training.trial import Measured


class OutOfMemoryError(UserError):
    """No plan of the ladder fits into the memory."""


class _Interrupted(Exception):
    """Encoding ended before all images were encoded."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


@dataclass
class Job:
    """A run of `config` over `items`. Everything that a segment leaves for the next one is here."""

    config: Config
    items: Items
    output: Output
    sink: EventSink
    stop: Callable[[], bool]
    step: int = 0
    loss: float | None = None
    published: list[Path] = field(default_factory=list)
    measured: Measured = field(default_factory=Measured)
    _begun: bool = False
    _data: TrainingData | None = None
    _state: State | None = None
    _encoded: tuple[Encoded, Encoded] | None = None

    def __post_init__(self) -> None:
        self.plan = Plan.of(self.config)
        self.validation = Validation(None, self.sink)

    def segment(self, model: Model, lease: GpuLease) -> Outcome:
        """Borrow → inject → steps, until done, stopped or handed over. Raises UserError."""
        try:
            return self._segment(model, lease)
        except torch.cuda.OutOfMemoryError as error:
            raise OutOfMemoryError(
                "out of GPU memory outside the steps: close what else uses the GPU, or lower resolution"
            ) from error

    def _segment(self, model: Model, lease: GpuLease) -> Outcome:
        if self._data is None:
            outcome = self._prepare(model, lease)
            if outcome is not Outcome.DONE:
                return outcome
        feed = Feed(
            self._data.train.samples,
            self.config.batch_size,
            self.config.gradient_accumulation_steps,
            self.config.seed,
            model.noise.timesteps,
            self.plan.parts,
        )
        steps = self.config.max_train_steps or self.config.epochs * feed.steps_per_epoch
        with open_segment(self.config, model, self._state, self.plan) as segment:
            if not self._begun:
                self._begin(segment, steps)
            outcome = self._fit(segment, self._loop(segment, feed, steps), lease)
            if outcome is Outcome.OUT_OF_MEMORY:
                self._step_down()
            if outcome in (Outcome.HANDED_OVER, Outcome.OUT_OF_MEMORY):
                self._state = segment.state()
                return Outcome.HANDED_OVER
            self._finish(segment, feed)
        return outcome

    def _step_down(self) -> None:
        """Raises OutOfMemoryError when nothing is left to give up."""
        lighter = self.plan.lighter(self.config.batch_size)
        if lighter is None:
            raise OutOfMemoryError(
                f"step {self.step + 1}: out of GPU memory, also with {self.plan}. Close what else uses the GPU, or "
                "lower resolution or lora_rank"
            )
        self.plan = lighter
        self.sink(Notice(text=f"step {self.step + 1}: out of memory, goes on with {lighter}", level="warning"))

    def _prepare(self, model: Model, lease: GpuLease) -> Outcome:
        notice = resolve(self.config.mixed_precision, model.facts.device)[1]
        if notice and not self._encoded:
            self.sink(Notice(text=notice))
        if self.config.enable_xformers and not self._encoded:
            self.sink(Notice(text="enable_xformers: not needed, torch's own attention (SDPA) does the same"))
        began = time.perf_counter()
        between = partial(self._between_images, lease)
        self._encoded = self._encoded or (Encoded(between), Encoded(between))
        try:
            self._data = data.load(self.items, self.config, model, sink=self.sink, kept=self._encoded)
        except _Interrupted as interruption:
            return interruption.outcome
        self.measured.prepare = (time.perf_counter() - began) / len(self.items.train + self.items.held_out)
        self.validation.held_out = self._data.held_out
        return Outcome.DONE

    def _between_images(self, lease: GpuLease) -> None:
        if self.stop():
            raise _Interrupted(Outcome.STOPPED)
        if not lease.hand_over():
            raise _Interrupted(Outcome.HANDED_OVER)

    def _begin(self, segment: Segment, steps: int) -> None:
        self._begun = True
        config, facts = self.config, segment.model.facts
        self.sink(
            Started(
                name=self.output.name,
                device=str(facts.device),
                precision=str(segment.network.precision.compute).removeprefix("torch."),
                images=len(self._data.train.samples),
                steps=steps,
                epochs=config.epochs,
                effective_batch=config.batch_size * config.gradient_accumulation_steps,
                trainable=segment.trainables.count,
                total=segment.base_count,
                modules=len(segment.adapter.layers),
                scale=alpha_of(config) / config.lora_rank,
            )
        )
        for notice in segment.tier.notices:
            self.sink(Notice(text=notice))
        self.validation(segment.network, 0)

    def _loop(self, segment: Segment, feed: Feed, steps: int) -> Loop:
        config = self.config
        rate = partial(
            schedules.learning_rate,
            config.lr_scheduler,
            base=config.learning_rate,
            steps=steps,
            warmup=config.lr_warmup_steps,
        )
        actions = (
            (config.validate_every, lambda step: self.validation(segment.network, step)),
            (config.save_steps, lambda step: self._save_between(segment, feed, step)),
            (config.sample_every, lambda step: self._preview(segment, step)),
        )
        return Loop(
            feed=feed,
            segment=segment,
            learning_rate=rate,
            boundary=Boundaries(actions, steps),
            results=Results(segment.update.result, steps, self.sink, window=feed.steps_per_epoch),
        )

    def _fit(self, segment: Segment, loop: Loop, lease: GpuLease) -> Outcome:
        try:
            outcome, self.step = fit(loop, first_step=self.step, lease=lease, stop=self.stop)
            if segment.captures.reason:
                self.sink(Notice(text=f"the step ran uncaptured: {segment.captures.reason}", level="warning"))
        except DivergedError:
            self._save_between(segment, loop.feed, loop.results.step)
            raise
        self.loss = loop.results.mean_loss
        self.measured.step = loop.results.fastest
        return outcome

    def _save_between(self, segment: Segment, feed: Feed, step: int) -> None:
        """An intermediate file; a run is not lost because one of them could not be written."""
        try:
            self.output.save(segment, self._data.train, self._progress(feed, step), final=False)
        except OutputError as error:
            self.sink(Notice(text=f"step {step} is not saved, training goes on: {error}", level="warning"))

    def _finish(self, segment: Segment, feed: Feed) -> None:
        if self.step == 0:
            return
        self.validation(segment.network, self.step)
        self.measured.validate = self.validation.seconds / max(1, len(self.items.held_out))
        self.published = self.output.save(segment, self._data.train, self._progress(feed, self.step), final=True)
        self._preview(segment, self.step)

    def _preview(self, segment: Segment, step: int) -> None:
        """A run is not lost because a picture does not fit beside it."""
        try:
            self.output.preview(segment, step)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            self.sink(Notice(text=f"step {step}: no preview, it does not fit into the memory", level="warning"))

    def _progress(self, feed: Feed, step: int) -> Progress:
        return Progress(step, feed.steps_per_epoch, feed.batches_per_epoch)
