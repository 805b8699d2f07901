"""A job at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora_trainer.curve import Comparison, Point
from lora_trainer.jobs.states import Kind, State


@dataclass(frozen=True)
class JobView:
    """Times are seconds since 1970, `eta` and `seconds_per_step` seconds, `memory` bytes held, `available`
    bytes there are for it. `losses` are (step, loss), thinned; `validations` (step, base, lora, train,
    train_base), `comparisons` as in `events.Compared`; `output` has the finished LoRA first.

    Of a search for a learning rate (`kind` find-lr) `sweep` is (learning rate, loss), the base model's loss first; once
    it has ended, `suggested` is a learning rate, None where nothing was learned, and `why` the reason."""

    id: str
    name: str
    state: State
    created: float
    settings: Mapping[str, object]
    kind: Kind = "train"
    started: float | None = None
    finished: float | None = None
    stage: str = "waiting"
    step: int = 0
    steps: int | None = None
    epoch: int | None = None
    epochs: int | None = None
    loss: float | None = None
    learning_rate: float | None = None
    seconds_per_step: float | None = None
    losses: tuple[tuple[int, float], ...] = ()
    validations: tuple[Point, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    sweep: tuple[tuple[float, float], ...] = ()
    suggested: float | None = None
    why: str | None = None
    eta: float | None = None
    memory: int | None = None
    available: int | None = None
    log: tuple[str, ...] = ()
    output: tuple[str, ...] = ()
    error: str | None = None
    details: str | None = None
