"""Lines of a job's history to its view: a pure fold, so that a restart rebuilds what was seen."""

from __future__ import annotations

from dataclasses import replace
from functools import singledispatch
from typing import TypeVar

import msgspec

from lora_trainer.curve import Comparison, Point
from lora_trainer.events import (
    AnyEvent,
    Compared,
    Finished,
    Forecast,
    Notice,
    Progress,
    RateFound,
    RateTried,
    Saved,
    Started,
    StepDone,
    Validated,
)
from lora_trainer.jobs.states import ENDED, State
from lora_trainer.jobs.view import JobView
from lora_trainer.logs import sentences

MOST_LOSSES, LOG_LINES, SMOOTHING = 1000, 200, 0.1
_WORDS = {
    "training": "training",
    "paused": "paused",
    "saving": "saving",
    "done": "done",
    "stopped": "stopped",
    "failed": "failed",
}


class Changed(msgspec.Struct, frozen=True, tag="changed"):
    """A new state; `why` says more, for a failure what failed, and `details` what an issue about it needs."""

    at: float
    state: State
    why: str | None = None
    details: str | None = None


class Told(msgspec.Struct, frozen=True, tag="told"):
    """An event of the run."""

    at: float
    event: AnyEvent


Line = Changed | Told
Row = TypeVar("Row", bound=tuple)


def fold(view: JobView, line: Line) -> JobView:
    """`view` after `line`."""
    if isinstance(line, Changed):
        return _change(view, line)
    spoken = tuple(sentences(line.event))
    told = _tell(line.event, view)
    return replace(told, log=(*view.log, *spoken)[-LOG_LINES:]) if spoken else told


def _change(view: JobView, line: Changed) -> JobView:
    ended = line.state in ENDED
    return replace(
        view,
        state=line.state,
        stage=(line.why if line.state != "failed" else None) or _WORDS.get(line.state, view.stage),
        error=line.why if line.state == "failed" else None,
        details=line.details,
        started=view.started or (line.at if line.state == "preparing" else None),
        finished=line.at if ended else None,
        eta=None if ended else view.eta,
    )


@singledispatch
def _tell(event: AnyEvent, view: JobView) -> JobView:
    return view


@_tell.register
def _(event: Progress, view: JobView) -> JobView:
    return replace(view, stage=f"{event.stage} {event.done} of {event.total}")


@_tell.register
def _(event: Started, view: JobView) -> JobView:
    return replace(view, name=event.name, steps=event.steps, epochs=event.epochs)


@_tell.register
def _(event: Forecast, view: JobView) -> JobView:
    return replace(view, eta=event.seconds, memory=event.memory or view.memory, available=event.available)


@_tell.register
def _(event: StepDone, view: JobView) -> JobView:
    speed = event.seconds
    if view.seconds_per_step is not None and event.step > view.step:
        speed = view.seconds_per_step + SMOOTHING * (event.seconds - view.seconds_per_step)
    return replace(
        view,
        stage="training",
        step=event.step,
        steps=event.steps,
        epoch=event.epoch,
        loss=event.loss,
        learning_rate=event.learning_rate,
        seconds_per_step=speed,
        eta=speed * (event.steps - event.step),
        memory=event.memory,
        losses=_thinned((*_before(view.losses, event.step), (event.step, event.loss))),
    )


@_tell.register
def _(event: RateTried, view: JobView) -> JobView:
    tried = (*_before(view.sweep, event.learning_rate), (event.learning_rate, event.loss))
    return replace(view, step=event.step, steps=event.steps, eta=event.eta, sweep=tried, suggested=None, why=None)


@_tell.register
def _(event: RateFound, view: JobView) -> JobView:
    return replace(view, suggested=event.learning_rate, why=event.why)


@_tell.register
def _(event: Validated, view: JobView) -> JobView:
    point = Point(event.step, event.base, event.lora, event.train, event.train_base)
    return replace(view, validations=(*_before(view.validations, event.step), point))


@_tell.register
def _(event: Compared, view: JobView) -> JobView:
    row = Comparison(event.step, event.likeness, event.drift, event.score, event.clip_image, event.clip_text)
    return replace(view, comparisons=(*_before(view.comparisons, event.step), row))


@_tell.register
def _(event: Saved, view: JobView) -> JobView:
    others = tuple(path for path in view.output if path != event.path)
    if event.kind == "lora":
        return replace(view, output=(event.path, *others))
    return replace(view, output=(*others, event.path)) if event.kind == "checkpoint" else view


@_tell.register
def _(event: Finished, view: JobView) -> JobView:
    return replace(view, step=event.steps, loss=event.loss if event.loss is not None else view.loss)


@_tell.register
def _(event: Notice, view: JobView) -> JobView:
    return view


def _before(points: tuple[Row, ...], step: float) -> tuple[Row, ...]:
    """Without `step` (or learning rate) and what came after it: a run may have gone back there."""
    return points if not points or points[-1][0] < step else tuple(point for point in points if point[0] < step)


def _thinned(points: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    """Every second point, once there are too many; the newest always stays."""
    return points if len(points) <= MOST_LOSSES else (*points[:-1:2], points[-1])
