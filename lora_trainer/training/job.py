"""One run's memory between its segments, and what it does in each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import msgspec
import torch

from lora_trainer.config import Config
from lora_trainer.curve import chosen
from lora_trainer.events import EventSink, Notice
from lora_trainer.hosts.ports import Control, GpuLease, nothing
from lora_trainer.kernels.choose import Kernels
from lora_trainer.models.fingerprint import fingerprint
from lora_trainer.models.model import Model
from lora_trainer.training import resume
from lora_trainer.training.boundary import Boundaries
from lora_trainer.training.chosen import step_notices
from lora_trainer.training.data import Items
from lora_trainer.training.feed import Feed
from lora_trainer.training.fidelity import Fidelity
from lora_trainer.training.fit import Interrupted, Loop, Outcome, ask, fit
from lora_trainer.training.forecast import FromFirstSteps
from lora_trainer.training.initial import what_of
from lora_trainer.training.judging import Validation
from lora_trainer.training.keeper import Keeper
from lora_trainer.training.output import Output, Progress
from lora_trainer.training.planning import Planning
from lora_trainer.training.preparing import Preparing
from lora_trainer.training.results import DivergedError, Results
from lora_trainer.training.schedules import Schedule
from lora_trainer.training.segment import Segment, State, open_segment
from lora_trainer.training.snapshot import Snapshot
from lora_trainer.training.states import Facts, Kept, versions
from lora_trainer.training.trial import Measured

# Why a segment ends with another one to come.
GOES_ON = (Outcome.HANDED_OVER, Outcome.OUT_OF_MEMORY, Outcome.DIVERGED, Outcome.PAUSED)


@dataclass
class Job:
    """A run of `config` over `items`. Everything that a segment leaves for the next one is here."""

    config: Config
    items: Items
    output: Output
    sink: EventSink
    control: Control
    begun: resume.Beginning
    storages: Callable[[str], Sequence[str]] = nothing
    step: int = 0
    loss: float | None = None
    published: list[Path] = field(default_factory=list)
    measured: Measured = field(default_factory=Measured)
    _state: State | None = None
    _base: str = ""
    _placed: str = ""
    _tier: str = ""
    _told: bool = False
    _losses: Sequence[float] = ()

    def __post_init__(self) -> None:
        self.planning = Planning(self.config, self.sink, self.storages)
        self._first_steps = FromFirstSteps(self.sink)
        self.prepare = Preparing(self.config, self.items, self.sink, self.control)
        self.validation = Validation(self.config, self.sink)
        self.fidelity = Fidelity(self.config, self.sink, self.validation.gain)
        self.keeper = Keeper(self.begun.states, self.config.checkpoint_every, self.sink, self._facts)
        kept = self.begun.kept
        self.kernels = Kernels(self.config.kernels, kept.facts.tier if kept is not None else "")
        if kept is not None:
            self._take_over(kept)

    @property
    def threads(self) -> int | None:
        """CPU threads; those of the state that the run goes on from."""
        kept = self.begun.kept
        return self.config.cpu_threads or (kept.facts.threads if kept is not None else None)

    def segment(self, model: Model, lease: GpuLease) -> Outcome:
        """Borrow → inject → steps, until done, stopped, paused or handed over. Raises UserError."""
        try:
            return self._segment(model, lease)
        except torch.cuda.OutOfMemoryError:
            if self.prepare.data is None:
                self.planning.store_lighter("while preparing")
                return Outcome.HANDED_OVER
        # Outside the steps, where the segment's state may be torn: back to the last good one.
        self._go_back(*self.keeper.last())
        self.planning.step_down(self.step)
        return Outcome.HANDED_OVER

    def close(self) -> None:
        """The run is over, however it ended."""
        for told in self.kernels.close():
            self.sink(Notice(text=told))

    def _take_over(self, kept: Kept) -> None:
        """Be where an earlier process was."""
        facts = kept.facts
        resume.same_data(facts, resume.digest(self.items))
        self.step, self._state, self._losses = facts.step, kept.tensors, facts.losses
        self.planning.go_on_with(facts.checkpointing, facts.parts, facts.storage)
        self.validation.go_on_from(facts.curve, kept.tensors)
        self.keeper.rollbacks = facts.rollbacks
        self.keeper.remember(lambda: kept.tensors, facts.step)
        self.sink(Notice(text=f"goes on from step {facts.step} of the run of {facts.name}"))
        if facts.versions != versions():
            told = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
            self.sink(Notice(text=f"that state was made with {told}: numbers may differ in the last digits"))

    def _facts(self, step: int) -> Facts:
        return Facts(
            step=step,
            name=self.output.name,
            started_at=self.output.started_at,
            config=msgspec.to_builtins(self.config),
            base=self._base,
            data=resume.digest(self.items),
            losses=list(self._losses),
            initial=dict(self.output.start.origin),
            rollbacks=self.keeper.rollbacks,
            curve=list(self.validation.curve),
            checkpointing=self.planning.plan.checkpointing,
            parts=self.planning.plan.parts,
            storage=self.planning.plan.storage,
            tier=self._tier,
            threads=torch.get_num_threads(),
            versions=versions(),
        )

    def _segment(self, model: Model, lease: GpuLease) -> Outcome:
        if self._placed != self.planning.plan.storage:
            self._look_at(model)
        outcome = self.prepare(model, lease)
        if outcome is not Outcome.DONE:
            return outcome
        for measure in (self.validation, self.fidelity):
            measure.look_at(self.prepare.data)
        feed = Feed.of(self.config, self.prepare.data.train, model, self.planning.plan.parts)
        steps = self.config.max_train_steps or self.config.epochs * feed.steps_per_epoch
        choose = partial(self.kernels.ops, shapes=feed.shapes)
        start = self.output.start
        with open_segment(self.config, model, self._state, self.planning.plan, choose, start) as segment:
            if not self._told:
                self._begin(segment, steps)
            outcome = self._rehearse(segment, feed, steps, lease)
            if outcome is Outcome.DONE:
                outcome = self._fit(segment, self._loop(segment, feed, steps), lease)
            if outcome in GOES_ON:
                self._leave(segment, feed, outcome)
            else:
                self._finish(segment, feed, steps)
        return outcome

    def _look_at(self, model: Model) -> None:
        """At a base that was placed. Raises ModelError when the run began with another, or with a LoRA that does not
        fit."""
        first, kept = not self._placed, self.begun.kept
        self._base, self._placed = fingerprint(model.unet, *model.text.modules), self.planning.plan.storage
        if kept is not None and kept.facts.storage == self._placed:
            resume.same_base(kept.facts, self._base)
        # Before anything is encoded.
        if first and (placed := self.output.start.placed(self.config, model)):
            self.sink(Notice(text=what_of(placed, self.config)))

    def _leave(self, segment: Segment, feed: Feed, outcome: Outcome) -> None:
        """What the next segment goes on from."""
        if outcome is Outcome.DIVERGED:
            return
        if outcome is Outcome.OUT_OF_MEMORY:
            self.planning.step_down(self.step)
        snapshot = self._snapshot(segment)
        self._state = snapshot.named()
        if outcome is Outcome.PAUSED and self.step:
            self.keeper.keep_durably(snapshot, self.step)
            self._save_between(segment, feed, self.step)

    def _snapshot(self, segment: Segment) -> Snapshot:
        """All that the next segment, or the next process, goes on from."""
        return replace(segment.snapshot(), beside=self.validation.weights)

    def _go_back(self, step: int, state: State | None) -> None:
        self.step, self._state = step, state
        self.validation.go_back(step, state)

    def _roll_back(self, segment: Segment, loop: Loop, error: DivergedError) -> Outcome:
        """Raises `error` when that was tried often enough; what was learned is then saved."""
        before = self.keeper.roll_back()
        if before is None:
            self._save_between(segment, loop.feed, loop.results.step)
            raise error
        self._go_back(*before)
        self._losses = ()
        rate = self.keeper.rate_factor * self.config.learning_rate
        self.sink(
            Notice(
                text=f"step {loop.results.step}: {error.reason}; back to step {self.step}, on with learning rate "
                f"{rate:.2g}",
                level="warning",
            )
        )
        return Outcome.DIVERGED

    def _begin(self, segment: Segment, steps: int) -> None:
        self._told = True
        self._tier = segment.tier.ops.name
        self.sink(segment.started(self.output.name, self.prepare.data.train.images, steps))
        for notice in (*segment.notices, *step_notices(self.config, steps)):
            self.sink(Notice(text=notice))
        if self.step == 0:
            self.validation(segment, 0)
            self.fidelity(segment, 0)

    def _rehearse(self, segment: Segment, feed: Feed, steps: int, lease: GpuLease) -> Outcome:
        """DONE when the steps can begin."""
        ready = partial(ask, self.control, lease, torch.cuda.empty_cache)
        try:
            outcome = self.planning.rehearse(segment, feed, steps - self.step, ready)
        except Interrupted as interruption:
            return interruption.outcome
        if outcome is Outcome.DONE:
            self.kernels.compiled(feed.shapes)
        return outcome

    def _loop(self, segment: Segment, feed: Feed, steps: int) -> Loop:
        config = self.config
        results = Results(
            segment.update.result,
            steps,
            self._first_steps if self.planning.need is None else self.sink,
            window=feed.steps_per_epoch,
            losses=self._losses,
            watch=self.planning.watch(),
        )
        # The state comes last: whoever goes on from it need not do again what happened at its step.
        validations = self.validation.every(steps)
        actions = (
            (validations, lambda step: self.validation(segment, step)),
            (self.fidelity.every(steps, validations), lambda step: self.fidelity.between(segment, step, steps)),
            (config.save_steps, lambda step: self._save_between(segment, feed, step)),
            (config.sample_every, lambda step: self.output.preview(segment, step)),
            (self.keeper.due, lambda step: self._keep(segment, results, step)),
        )
        return Loop(
            feed=feed,
            segment=segment,
            learning_rate=Schedule.of(config, steps, self.keeper.rate_factor),
            boundary=Boundaries(actions, steps),
            results=results,
            over=self.validation.over,
        )

    def _keep(self, segment: Segment, results: Results, step: int) -> None:
        self._losses = tuple(results.losses)
        if results.bad_in_a_row == 0:
            self.keeper.keep(self._snapshot(segment), step)

    def _fit(self, segment: Segment, loop: Loop, lease: GpuLease) -> Outcome:
        try:
            outcome, self.step = fit(loop, first_step=self.step, lease=lease, control=self.control)
            if segment.captures.reason:
                self.sink(Notice(text=f"the step ran uncaptured: {segment.captures.reason}", level="warning"))
        except DivergedError as error:
            return self._roll_back(segment, loop, error)
        self.loss, self._losses = loop.results.mean_loss, tuple(loop.results.losses)
        self.measured.step, self.measured.need = loop.results.fastest, self.planning.need
        return outcome

    def _save_between(self, segment: Segment, feed: Feed, step: int) -> None:
        self.output.save_between(segment, self.prepare.data.train, self._progress(feed, step))

    def _finish(self, segment: Segment, feed: Feed, steps: int) -> None:
        if self.step == 0:
            return
        self.validation(segment, self.step)
        self.fidelity(segment, self.step)
        self.measured.prepare, self.measured.validate = self.prepare.seconds, self.validation.seconds
        # First: whoever is killed while it is published need only publish it again.
        self.keeper.keep_durably(self._snapshot(segment), self.step)
        step, weights = self.step, None
        best = self.validation.earlier(self.step) if self.config.save_best else None
        if best is not None:
            step, weights = best.step, self.validation.weights
            self._save_between(segment, feed, self.step)
            self.sink(Notice(text=chosen(best, self.validation.last, steps, self.output.stem(self.step))))
        progress = self._progress(feed, step)
        self.published = self.output.save(segment, self.prepare.data.train, progress, final=True, weights=weights)
        self.output.preview(segment, step, weights)

    def _progress(self, feed: Feed, step: int) -> Progress:
        return Progress(step, feed.steps_per_epoch, feed.batches_per_epoch)
