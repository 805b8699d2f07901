"""What a run tells the outside: one tagged union of frozen events, and the sink they go to."""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event"):
    """Base of all events; `msgspec.json.encode` gives one JSON object with its name under `event`."""


class Notice(Event, tag="notice"):
    """Something the user should know: a fallback, a guess, a skipped file."""

    text: str
    level: Literal["info", "warning"] = "info"


class Progress(Event, tag="progress"):
    """Work before or after the training steps: decoding, encoding, validating, sampling; captioning. `eta` is the
    seconds that are left, where known."""

    stage: str
    done: int
    total: int
    eta: float | None = None


class Started(Event, tag="started"):
    """Training is about to take its first step. Counts are of scalars; `scale` is alpha / rank."""

    name: str
    device: str
    precision: str
    images: int
    steps: int
    epochs: int
    effective_batch: int
    trainable: int
    total: int
    modules: int
    scale: float


class Forecast(Event, tag="forecast"):
    """What the steps that are left will need, as measured: seconds, and where known bytes of GPU memory, the most that
    will be held and what there is for it."""

    seconds: float
    memory: int | None = None
    available: int | None = None


class StepDone(Event, tag="step"):
    """One optimizer update. `loss` is the mean over the update's samples; `memory` in bytes, where known."""

    step: int
    steps: int
    epoch: int
    loss: float
    learning_rate: float
    grad_norm: float
    seconds: float
    memory: int | None = None


class RateTried(Event, tag="rate"):
    """The finder's sweep: the learning rate of its update `step`, and the loss after it; at step 0 the base model's.
    `eta` is the seconds that are left, if it goes to its end."""

    step: int
    steps: int
    learning_rate: float
    loss: float
    eta: float | None = None


class RateFound(Event, tag="rate found"):
    """What the finder suggests, None where nothing was learned at any rate; `why` is a sentence."""

    learning_rate: float | None
    why: str


class Validated(Event, tag="validated"):
    """Loss with fixed noise and timesteps: of held-out pictures with the base model, and with the LoRA at this step;
    of some training pictures the same."""

    step: int
    base: float
    lora: float
    train: float | None = None
    train_base: float | None = None


class Compared(Event, tag="compared"):
    """Fidelity against drift. `likeness`: of pictures that are drawn now to the real ones of their captions, 0 as the
    base's, 1 the same; `drift`: how far other prompts have moved from the base, as a share of its own scale; `score`:
    one number of these and of the held-out loss (`fidelity.score`). With a CLIP model, the mean cosine similarities of
    the drawn pictures: to training pictures, and to their prompts."""

    step: int
    likeness: float
    drift: float
    score: float
    clip_image: float | None = None
    clip_text: float | None = None


class Saving(Event, tag="saving"):
    """The LoRA is about to be written."""

    step: int


class Saved(Event, tag="saved"):
    """A file is complete under its final name."""

    path: str
    step: int
    kind: Literal["lora", "checkpoint", "sample", "report"]


class Finished(Event, tag="finished"):
    """The last event of a run. `validation_lora` and `validation_train` are of the LoRA that was saved; it is that of
    `best_step` where the held-out loss was measured on the way. `overfit`: at the end it had risen by 5 %."""

    state: Literal["done", "stopped", "failed"]
    output: list[str]
    steps: int
    loss: float | None
    seconds: float
    validation_base: float | None = None
    validation_lora: float | None = None
    validation_train: float | None = None
    best_step: int | None = None
    overfit: bool = False


AnyEvent = (
    Notice
    | Progress
    | Started
    | Forecast
    | StepDone
    | RateTried
    | RateFound
    | Validated
    | Compared
    | Saving
    | Saved
    | Finished
)


class EventSink(Protocol):
    """Anything that can be told an event: a progress bar, a log file, a list in a test."""

    def __call__(self, event: AnyEvent) -> None: ...
