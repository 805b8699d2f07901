"""Event sinks: the terminal, CSV files, TensorBoard."""

from __future__ import annotations

import csv
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from lora_trainer.errors import ConfigError, printable
from lora_trainer.events import (
    AnyEvent,
    Compared,
    EventSink,
    Finished,
    Forecast,
    Notice,
    Progress,
    RateFound,
    Saved,
    Started,
    StepDone,
    Validated,
)

GIB = 1024**3
_LOGGER = logging.getLogger(__name__)
PLAIN_EVERY_SECONDS = 5.0


@contextmanager
def fan_out(*sinks: EventSink) -> Iterator[EventSink]:
    """One sink that tells all of `sinks`; those that have a `close` are closed on exit."""
    try:
        yield lambda event: [sink(event) for sink in sinks]
    finally:
        for sink in sinks:
            getattr(sink, "close", lambda: None)()


class CsvLog:
    """`steps.csv`, `validation.csv` and `drift.csv` in `folder`, a line as it happens; none where it cannot be written.

    With `goes_on` what an earlier process wrote stays. A step that comes again takes its line's and all later ones'
    place.
    """

    STEPS = ("step", "epoch", "loss", "learning_rate", "grad_norm", "seconds")
    VALIDATION = ("step", "base", "lora", "train", "train_base")
    DRIFT = ("step", "likeness", "drift", "score", "clip_image", "clip_text")

    def __init__(self, folder: Path, goes_on: bool = False) -> None:
        self.folder, self.goes_on = folder, goes_on
        self._files: dict[str, TextIO] = {}
        self._last: dict[str, int] = {}

    def __call__(self, event: AnyEvent) -> None:
        if isinstance(event, StepDone):
            self._write("steps.csv", self.STEPS, event)
        elif isinstance(event, Validated):
            self._write("validation.csv", self.VALIDATION, event)
        elif isinstance(event, Compared):
            self._write("drift.csv", self.DRIFT, event)

    def close(self) -> None:
        for file in self._files.values():
            with suppress(OSError):
                file.close()
        self._files.clear()

    def _write(self, name: str, fields: tuple[str, ...], event: StepDone | Validated | Compared) -> None:
        try:
            if name not in self._files or event.step <= self._last[name]:
                self._open(name, fields, event.step)
            csv.writer(self._files[name]).writerow([getattr(event, field) for field in fields])
            self._last[name] = event.step
        except OSError as error:
            # The run goes on. The next line tries anew.
            self._files.pop(name, None)
            _LOGGER.warning("LoRA Trainer: %s: cannot be written: %s", self.folder / name, error.strerror)

    def _open(self, name: str, fields: tuple[str, ...], step: int) -> None:
        """With the lines of the steps before `step`."""
        again = name in self._files
        if again:
            self._files.pop(name).close()
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _rows_before(path, step) if again or self.goes_on or name in self._last else []
        self._files[name] = path.open("w", newline="", encoding="utf-8", buffering=1)
        csv.writer(self._files[name]).writerows([fields, *kept])


def _rows_before(path: Path, step: int) -> list[list[str]]:
    """The whole lines of a log; a crash may have cut the last one."""
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            header, *rows = csv.reader(file)
    except (OSError, ValueError, csv.Error):
        return []
    return [row for row in rows if len(row) == len(header) and row[0].isdecimal() and int(row[0]) < step]


class TensorBoardLog:
    """Loss, learning rate, gradient norm and held-out loss as TensorBoard scalars in `folder`.

    Raises ConfigError when TensorBoard is not installed.
    """

    def __init__(self, folder: Path, goes_on: bool = False) -> None:
        # TensorBoard itself shows the newest value of a step that comes again.
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                ["log_with: tensorboard is not installed; `pip install tensorboard`, or log_with=csv"]
            ) from None
        self._writer = SummaryWriter(str(folder))

    def __call__(self, event: AnyEvent) -> None:
        if isinstance(event, StepDone):
            for name in ("loss", "learning_rate", "grad_norm"):
                self._writer.add_scalar(f"train/{name}", getattr(event, name), event.step)
        elif isinstance(event, Validated):
            self._writer.add_scalar("validation/loss", event.lora, event.step)
            if event.train is not None:
                self._writer.add_scalar("validation/train", event.train, event.step)
        elif isinstance(event, Compared):
            for name in ("likeness", "drift", "score", "clip_image", "clip_text"):
                if (value := getattr(event, name)) is not None:
                    self._writer.add_scalar(f"validation/{name}", value, event.step)

    def close(self) -> None:
        self._writer.close()


class TerminalLog:
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream, self.clock = stream or sys.stderr, clock
        self._bar: tqdm | None = None
        self._stage = ""
        self._printed = float("-inf")
        self._last: StepDone | None = None

    def __call__(self, event: AnyEvent) -> None:
        if isinstance(event, StepDone):
            self._step(event)
        elif isinstance(event, Progress):
            self._progress(event)
        else:
            for line in sentences(event):
                self._say(line)
        if isinstance(event, Finished):
            self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _step(self, event: StepDone) -> None:
        numbers = {"loss": f"{event.loss:.4f}", "lr": f"{event.learning_rate:.2g}"}
        if event.memory is not None:
            numbers["memory"] = f"{event.memory / GIB:.1f} GiB"
        if self.stream.isatty():
            bar = self._bar_of("training", event.steps)
            bar.set_postfix(numbers, refresh=False)
            bar.update(event.step - bar.n)
            return
        if event.step == event.steps or self.clock() - self._printed >= PLAIN_EVERY_SECONDS:
            left = _duration(event.seconds * (event.steps - event.step))
            rest = ", ".join(f"{name} {value}" for name, value in numbers.items())
            self._say(
                f"step {event.step}/{event.steps}, {1 / max(event.seconds, 1e-9):.2f} steps/s, {left} left, {rest}"
            )

    def _progress(self, event: Progress) -> None:
        if self.stream.isatty():
            bar = self._bar_of(event.stage, event.total)
            bar.update(event.done - bar.n)
        elif event.done == event.total or self.clock() - self._printed >= PLAIN_EVERY_SECONDS:
            left = f", {_duration(event.eta)} left" if event.eta is not None else ""
            self._say(f"{event.stage}: {event.done}/{event.total}{left}")

    def _bar_of(self, stage: str, total: int) -> tqdm:
        if self._bar is None or self._stage != stage:
            self.close()
            self._stage = stage
            self._bar = tqdm(total=total, desc=stage, file=self.stream, dynamic_ncols=True)
        return self._bar

    def _say(self, text: str) -> None:
        self._printed = self.clock()
        # Names of files may hold what moves a terminal's cursor.
        line = "\n".join(map(printable, text.split("\n")))
        if self._bar is not None:
            self._bar.write(line, file=self.stream)
        else:
            print(line, file=self.stream, flush=True)


def sentences(event: AnyEvent) -> Iterator[str]:
    """What there is to say about an event, a line each; nothing for steps and progress."""
    if isinstance(event, Notice):
        yield ("warning: " if event.level == "warning" else "") + event.text
    elif isinstance(event, Started):
        yield (
            f"{event.name}: {event.images} images, {event.steps} steps over {event.epochs} epochs, "
            f"effective batch {event.effective_batch}, on {event.device} in {event.precision}"
        )
        yield (
            f"{event.trainable:,} of {event.total:,} parameters train ({event.trainable / event.total:.2%}, "
            f"{event.modules} modules), LoRA scale {event.scale:g}"
        )
    elif isinstance(event, Forecast):
        known = event.memory is not None
        memory = f"needs {event.memory / GIB:.1f} of {event.available / GIB:.1f} GB, " if known else ""
        yield f"{memory}about {in_words(event.seconds)}"
    elif isinstance(event, Validated):
        yield f"step {event.step}: held-out loss {_against(event.lora, event.base, event.step)}{_beside(event)}"
    elif isinstance(event, Compared):
        yield from _compared(event)
    elif isinstance(event, RateFound):
        rate = "no learning rate found" if event.learning_rate is None else f"learning_rate={event.learning_rate:g}"
        yield f"{rate}: {event.why}"
    elif isinstance(event, Saved):
        yield f"saved {event.path}"
    elif isinstance(event, Finished):
        yield f"{event.state} after {event.steps} steps, {_duration(event.seconds)}"


def _against(loss: float, base: float, step: int) -> str:
    change = f"{loss / base - 1:+.1%} against the base" if base else f"the base {base:.4f}"
    return f"{loss:.4f}, {change}" if step else f"{loss:.4f} (the base)"


def _compared(event: Compared) -> Iterator[str]:
    clip = ""
    if event.clip_image is not None and event.clip_text is not None:
        clip = f"CLIP {event.clip_image:.3f} to training pictures, {event.clip_text:.3f} to prompts"
    if event.step:
        yield (
            f"step {event.step}: drawings are {event.likeness:.0%} of the way to the training pictures, other prompts "
            f"changed by {event.drift:.1%}, score {event.score:.2f}{f'; {clip}' if clip else ''}"
        )
    elif clip:
        yield f"step 0: drawings without the LoRA: {clip}"


def _beside(event: Validated) -> str:
    """The same of training pictures."""
    if event.train is None or event.train_base is None:
        return ""
    return f"; training pictures {_against(event.train, event.train_base, event.step)}"


def in_words(seconds: float) -> str:
    """45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
