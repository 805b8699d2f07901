"""The learning-rate finder: a run whose learning rate rises step by step, and what it tells.

The range test of Smith 2017 (arXiv:1506.01186) with the geometric rise of fastai's `lr_find`. The loss of a diffusion
step says little, since it depends on the timesteps drawn far more than on the weights. So the loss here is that of
`validation.Validator`: the same pictures, noise and timesteps every time, every EVERY steps. It needs no smoothing.

Nothing is kept of the run: no state, no LoRA, and the base model is never written to.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from lora_trainer.config import Config
from lora_trainer.config.rules import unsearchable
from lora_trainer.errors import ConfigError, DataError
from lora_trainer.events import AnyEvent, EventSink, Notice, Progress, RateTried, Saved, StepDone
from lora_trainer.files import publish
from lora_trainer.hosts.ports import Control, GpuLease, Host
from lora_trainer.kernels.choose import Kernels
from lora_trainer.lineplot import line_plot, png
from lora_trainer.models.model import Model
from lora_trainer.training import data
from lora_trainer.training.data import Items
from lora_trainer.training.feed import Feed
from lora_trainer.training.fit import Interrupted, Loop, Outcome, ask, fit
from lora_trainer.training.initial import Start
from lora_trainer.training.library import optimizer_class
from lora_trainer.training.planning import Planning
from lora_trainer.training.preparing import Preparing
from lora_trainer.training.results import DivergedError, Results
from lora_trainer.training.segment import Segment, open_segment
from lora_trainer.training.settings import torch_settings
from lora_trainer.training.trial import pick
from lora_trainer.training.validation import Validator

LOWEST, HIGHEST = 1e-5, 1e-1
STEPS, EVERY = 120, 4
# The sweep ends where the loss is so many times the base model's.
BLOWN = 1.5
# By less than this share of the base's loss, nothing was learned.
FELL = 0.005
STAGE = "finding the learning rate"

Point = tuple[float, float]


@dataclass(frozen=True)
class Finding:
    """`points`: (learning rate, loss) as measured, the first with the base model's loss. `rate` is suggested, None
    where nothing was learned; `why` is a sentence. `stopped`: somebody ended the sweep."""

    points: tuple[Point, ...]
    rate: float | None
    why: str
    stopped: bool = False

    @property
    def summary(self) -> str:
        return "no learning rate found" if self.rate is None else f"learning_rate={self.rate:g}"

    def as_dict(self) -> dict[str, object]:
        return {"learning_rate": self.rate, "why": self.why, "points": [list(point) for point in self.points]}

    def csv(self) -> bytes:
        rows = ["learning_rate,loss", *(f"{rate:.6g},{loss:.6g}" for rate, loss in self.points)]
        return ("\n".join(rows) + "\n").encode()

    def put(self, folder: Path, sink: EventSink) -> None:
        """The curve as `find-lr.csv` and `find-lr.png` into `folder`. Raises OutputError."""
        picture = line_plot(
            self.points,
            title=f"Loss on the same pictures, noise and timesteps; {self.summary}",
            axis="learning rate, rising step by step",
            # Where it blows up would else flatten all that matters.
            most=1.1 * self.points[0][1],
            mark=self.rate,
        )
        for path, content in ((folder / "find-lr.csv", self.csv()), (folder / "find-lr.png", png(picture))):
            publish(content, path)
            sink(Saved(path=str(path), step=len(self.points), kind="report"))


def rate_at(step: int) -> float:
    """Of update `step`, counted from 0: from LOWEST to HIGHEST by the same factor each time."""
    return LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1))


def find_rate(config: Config, host: Host, sink: EventSink, control: Control) -> Finding:
    """Sweep on the host's model; judged by a few held-out pictures, or where there are none by training pictures.

    What was measured until a stop is judged all the same. After a pause, and where somebody else has changed the model,
    the sweep begins again. Raises UserError; NothingMeasured where a stop came first.
    """
    if problems := list(unsearchable(config)):
        raise ConfigError(problems)
    optimizer_class(config)
    found = data.find(config, sink)
    if not found.held_out:
        sink(Notice(text="no pictures are held out: the loss is measured on a few that are trained on"))
    search = _Search(config, replace(found, held_out=pick(found.held_out or found.train)), sink, control)
    try:
        outcome = _sessions(search, host)
    finally:
        search.close()
    if len(search.points) < 2:
        raise NothingMeasured("find-lr: stopped before anything was measured")
    return replace(judged(search.points), stopped=outcome is Outcome.STOPPED)


class NothingMeasured(DataError):
    """A sweep was stopped before its second measurement."""


def _sessions(search: _Search, host: Host) -> Outcome:
    """One sweep after another until one comes to its end: DONE or STOPPED. In a pause others have the GPU and its
    memory."""
    while True:
        with torch_settings(search.config.cpu_threads), host.lease.hold():
            outcome = _session(search, host)
        if outcome is not Outcome.PAUSED:
            return outcome
        search.control.wait()
        if search.control.stopping():
            return Outcome.STOPPED


def _session(search: _Search, host: Host) -> Outcome:
    while True:
        with host.models.borrow() as model:
            outcome = search(model, host.lease)
            # The memory of what only the view holds is free when the host takes the model back.
            del model
        if outcome not in (Outcome.HANDED_OVER, Outcome.OUT_OF_MEMORY):
            return outcome


@dataclass
class Sweep:
    """The Boundary that measures, and the Control that ends the sweep where the loss has blown up."""

    segment: Segment
    validator: Validator
    sink: EventSink
    control: Control
    points: list[Point] = field(default_factory=list)
    _began: float = field(default_factory=time.perf_counter, init=False)

    def due(self, step: int) -> bool:
        return step % EVERY == 0

    def __call__(self, step: int) -> None:
        # Not the average of a schedule-free optimizer: that of a rising rate lags behind it.
        loss = self.validator.loss(self.segment.judge)
        rate = rate_at(max(0, step - 1))
        self.points.append((rate, loss))
        eta = (time.perf_counter() - self._began) / step * (STEPS - step) if step else None
        self.sink(Progress(stage=STAGE, done=step, total=STEPS, eta=eta))
        self.sink(RateTried(step=step, steps=STEPS, learning_rate=rate, loss=loss, eta=eta))

    def stopping(self) -> bool:
        return self.blown or self.control.stopping()

    def pausing(self) -> bool:
        return self.control.pausing()

    def wait(self) -> None:
        """Waiting is done outside, where the model is given back."""

    @property
    def blown(self) -> bool:
        return bool(self.points) and not self.points[-1][1] < BLOWN * self.points[0][1]


@dataclass
class _Search:
    """What outlives a sweep: the pictures and captions as they are encoded, and the plan of the memory ladder. `points`
    are those of the last sweep that measured any."""

    config: Config
    items: Items
    sink: EventSink
    control: Control
    points: list[Point] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.planning, self.kernels = Planning(self.config, self.sink), Kernels(self.config.kernels)
        self.prepare = Preparing(self.config, self.items, self.sink, self.control)
        self.start = Start.of(self.config)

    def close(self) -> None:
        for told in self.kernels.close():
            self.sink(Notice(text=told))

    def __call__(self, model: Model, lease: GpuLease) -> Outcome:
        """A sweep from its beginning. Raises UserError."""
        outcome = self.prepare(model, lease)
        if outcome is not Outcome.DONE:
            return outcome
        training = self.prepare.data
        feed = Feed.of(self.config, training.train, model, self.planning.plan.parts)
        choose = partial(self.kernels.ops, shapes=feed.shapes)
        with open_segment(self.config, model, None, self.planning.plan, choose, self.start) as segment:
            sweep = Sweep(segment, Validator(training.held_out.samples), self.sink, self.control)
            outcome = _sweep(sweep, feed, self.planning, lease)
        self.points = sweep.points or self.points
        if outcome is Outcome.OUT_OF_MEMORY:
            self.planning.step_down(0)
        elif outcome in (Outcome.HANDED_OVER, Outcome.PAUSED) and sweep.points:
            self.sink(Notice(text="the sweep will begin again, at the lowest learning rate"))
        return outcome


def _sweep(sweep: Sweep, feed: Feed, planning: Planning, lease: GpuLease) -> Outcome:
    segment = sweep.segment
    try:
        outcome = planning.rehearse(segment, feed, STEPS, partial(ask, sweep, lease, torch.cuda.empty_cache))
        if outcome is not Outcome.DONE:
            return outcome
        sweep(0)
        results = Results(segment.update.result, STEPS, partial(_quiet, sweep.sink), window=STEPS)
        loop = Loop(feed, segment, rate_at, sweep, results)
        outcome, _ = fit(loop, first_step=0, lease=lease, control=sweep)
        return Outcome.DONE if sweep.blown else outcome
    except Interrupted as interruption:
        return interruption.outcome
    except DivergedError:
        # Numbers that stay bad are the end of the sweep, as a loss that blows up is.
        if len(sweep.points) < 2:
            raise
        return Outcome.DONE
    except torch.cuda.OutOfMemoryError:
        return Outcome.OUT_OF_MEMORY


def _quiet(sink: EventSink, event: AnyEvent) -> None:
    """Steps are told by the sweep's own progress."""
    if not isinstance(event, StepDone):
        sink(event)


def judged(points: Sequence[Point]) -> Finding:
    """The suggestion: halfway, by the logarithm, between the rate at which the loss falls most steeply (fastai's
    `steep`) and the one at which it is least (its `minimum`), but at most a third of the latter: a long run adds up
    what the sweep sees for a few steps only. Nothing is suggested where the loss has not fallen by FELL."""
    shown = [(rate, loss) for rate, loss in points if math.isfinite(loss)]
    base = shown[0][1]
    least = min(shown, key=lambda point: point[1])
    if least[1] > base * (1 - FELL):
        why = "the loss did not fall at any rate: look at the pictures and captions, or raise lora_rank"
        return Finding(tuple(points), None, why)
    if least == shown[-1]:
        where = f"the loss was still falling at {least[0]:.1e}, where the sweep ended"
    else:
        where = f"the loss was least at {least[0]:.1e} and higher beyond"
    steep = _steepest([point for point in shown if point[0] <= least[0]])
    rate = min(math.sqrt(steep * least[0]), least[0] / 3)
    why = f"it fell most steeply near {steep:.1e}, {where}; this lies between the two, since a run takes many steps"
    return Finding(tuple(points), _rounded(rate), why)


def _steepest(points: Sequence[Point]) -> float:
    """The middle, by the logarithm, of the two neighbours between which the loss falls most a factor of the rate."""
    falls = [
        ((after[1] - before[1]) / math.log(after[0] / before[0]), math.sqrt(before[0] * after[0]))
        for before, after in pairwise(points)
        if after[0] > before[0]
    ]
    return min(falls, default=(0.0, points[0][0]))[1]


def _rounded(rate: float) -> float:
    """To one digit: the curve does not know more."""
    return float(f"{rate:.0e}")
