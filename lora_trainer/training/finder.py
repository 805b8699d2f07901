"""The learning-rate finder: a run whose learning rate rises step by step, and what it tells.

The range test of Smith 2017 (arXiv:1506.01186) with the geometric rise of fastai's `lr_find`. The loss of a diffusion
step says little, since it depends on the timesteps drawn far more than on the weights. So the loss here is that of
`validation.Validator`: the same pictures, noise and timesteps every time, every EVERY steps. It needs no smoothing.

Nothing is kept of the run: no state, no LoRA, and the base model is never written to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

import torch

from lora_trainer.config import Config
from lora_trainer.errors import ConfigError, DataError
from lora_trainer.events import AnyEvent, EventSink, Notice, Progress, StepDone
from lora_trainer.hosts.ports import Control, GpuLease, Host
from lora_trainer.kernels.choose import Kernels
from lora_trainer.models.model import Model
from lora_trainer.training import data
from lora_trainer.training.data import Items
from lora_trainer.training.feed import Feed
from lora_trainer.training.fit import Interrupted, Loop, Outcome, ask, fit
from lora_trainer.training.initial import Start
from lora_trainer.training.library import REGISTRY, optimizer_class
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

Point = tuple[float, float]


@dataclass(frozen=True)
class Finding:
    """`points`: (learning rate, loss) as measured, the first with the base model's loss. `rate` is suggested, None
    where nothing was learned; `why` is a sentence."""

    points: tuple[Point, ...]
    rate: float | None
    why: str

    @property
    def summary(self) -> str:
        return "no learning rate found" if self.rate is None else f"learning_rate={self.rate:g}"

    def as_dict(self) -> dict[str, object]:
        return {"learning_rate": self.rate, "why": self.why, "points": [list(point) for point in self.points]}

    def csv(self) -> bytes:
        rows = ["learning_rate,loss", *(f"{rate:.6g},{loss:.6g}" for rate, loss in self.points)]
        return ("\n".join(rows) + "\n").encode()


def rate_at(step: int) -> float:
    """Of update `step`, counted from 0: from LOWEST to HIGHEST by the same factor each time."""
    return LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1))


def find_rate(config: Config, host: Host, sink: EventSink, control: Control) -> Finding:
    """Sweep on the host's model; judged by a few held-out pictures, or where there are none by training pictures.

    What was measured until a stop is judged all the same. Raises UserError.
    """
    entry = REGISTRY.get(config.optimizer)
    if entry and entry.adapts:
        raise ConfigError([f"optimizer: {config.optimizer} finds the learning rate by itself; give it learning_rate=1"])
    optimizer_class(config)
    start = Start.of(config)
    found = data.find(config, sink)
    if not found.held_out:
        sink(Notice(text="no pictures are held out: the loss is measured on a few that are trained on"))
    items = replace(found, held_out=pick(found.held_out or found.train))
    with torch_settings(config.cpu_threads), host.lease.hold(), host.models.borrow() as model:
        sweep = _swept(config, model, host.lease, _Run(items, sink, control, start))
    if len(sweep.points) < 2:
        raise DataError("find-lr: stopped before anything was measured")
    return judged(sweep.points)


@dataclass(frozen=True)
class _Run:
    items: Items
    sink: EventSink
    control: Control
    start: Start


@dataclass
class Sweep:
    """The Boundary that measures, and the Control that ends the sweep where the loss has blown up."""

    segment: Segment
    validator: Validator
    sink: EventSink
    control: Control
    points: list[Point] = field(default_factory=list)

    def due(self, step: int) -> bool:
        return step % EVERY == 0

    def __call__(self, step: int) -> None:
        # Not the average of a schedule-free optimizer: that of a rising rate lags behind it.
        loss = self.validator.loss(self.segment.judge)
        self.points.append((rate_at(max(0, step - 1)), loss))
        self.sink(Progress(stage="finding the learning rate", done=step, total=STEPS))

    def stopping(self) -> bool:
        return self.blown or self.control.stopping()

    def pausing(self) -> bool:
        return False

    def wait(self) -> None:
        """Never asked to."""

    @property
    def blown(self) -> bool:
        return bool(self.points) and not self.points[-1][1] < BLOWN * self.points[0][1]


def _swept(config: Config, model: Model, lease: GpuLease, run: _Run) -> Sweep:
    """On the first plan of the memory ladder that does. Raises UserError."""
    planning, kernels = Planning(config, run.sink), Kernels(config.kernels)
    prepare = Preparing(config, run.items, run.sink, run.control)
    if prepare(model, lease) is not Outcome.DONE:
        raise DataError("find-lr: stopped before anything was measured")
    try:
        while True:
            feed = Feed.of(config, prepare.data.train, model, planning.plan.parts)
            choose = partial(kernels.ops, shapes=feed.shapes)
            with open_segment(config, model, None, planning.plan, choose, run.start) as segment:
                sweep = Sweep(segment, Validator(prepare.data.held_out.samples), run.sink, run.control)
                outcome = _sweep(sweep, feed, planning, lease)
            if outcome is not Outcome.OUT_OF_MEMORY:
                return sweep
            planning.step_down(0)
    finally:
        for told in kernels.close():
            run.sink(Notice(text=told))


def _sweep(sweep: Sweep, feed: Feed, planning: Planning, lease: GpuLease) -> Outcome:
    segment = sweep.segment
    try:
        outcome = planning.rehearse(segment, feed, STEPS, partial(ask, sweep, lease, torch.cuda.empty_cache))
        if outcome is not Outcome.DONE:
            return outcome
        sweep(0)
        results = Results(segment.update.result, STEPS, partial(_quiet, sweep.sink), window=STEPS)
        loop = Loop(feed, segment, rate_at, sweep, results)
        return fit(loop, first_step=0, lease=lease, control=sweep)[0]
    except Interrupted as interruption:
        return interruption.outcome
    except DivergedError:
        # Numbers that stay bad are the end of the sweep, as a loss that blows up is.
        return Outcome.STOPPED
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
