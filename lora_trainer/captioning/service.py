"""Captioning off the thread that asked for it: one run at a time, and what there is to show of it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from lora_trainer.captioning.run import Result
from lora_trainer.errors import DataError, UserError
from lora_trainer.events import AnyEvent, EventSink, Notice, Progress

LINES = 50
_LOGGER = logging.getLogger(__name__)

Stopping = Callable[[], bool]
Work = Callable[[EventSink, Stopping], Result]


@dataclass(frozen=True)
class CaptionView:
    """A run at one moment; `eta` in seconds, `log` has the last lines, `end` says how it ended."""

    state: Literal["idle", "running", "stopping", "done", "stopped", "failed"] = "idle"
    done: int = 0
    total: int = 0
    eta: float | None = None
    log: tuple[str, ...] = ()
    end: str = ""

    @property
    def active(self) -> bool:
        return self.state in ("running", "stopping")


class CaptionService:
    """Runs one captioning at a time in a thread of its own. Views are immutable."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._view = CaptionView()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def view(self) -> CaptionView:
        return self._view

    def start(self, work: Work) -> None:
        """Raises DataError while another runs."""
        with self._lock:
            if self._view.active:
                raise DataError("pictures are being captioned just now; wait for the end, or stop it")
            self._stop = threading.Event()
            self._view = CaptionView(state="running")
            # A new thread has gradients on and no inference mode, whatever the page's thread had.
            self._thread = threading.Thread(
                target=self._run, args=(work, self._stop), name="lora-trainer-captions", daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """At the next picture."""
        with self._lock:
            self._stop.set()
            if self._view.active:
                self._view = replace(self._view, state="stopping")

    def wait(self, timeout: float) -> None:
        """For the end of what runs now."""
        if self._thread is not None:
            self._thread.join(timeout)

    def _run(self, work: Work, stop: threading.Event) -> None:
        try:
            result = work(self._tell, stop.is_set)
        except UserError as error:
            self._change(state="failed", end=str(error))
        except Exception as error:
            _LOGGER.exception("LoRA Trainer: captioning failed")
            self._change(state="failed", end=f"{type(error).__name__}: {error}")
        else:
            self._change(state=result.state, end=result.summary())

    def _tell(self, event: AnyEvent) -> None:
        if isinstance(event, Progress):
            self._change(done=event.done, total=event.total, eta=event.eta)
        elif isinstance(event, Notice):
            self._change(log=(*self._view.log, event.text)[-LINES:])

    def _change(self, **changes: object) -> None:
        with self._lock:
            self._view = replace(self._view, **changes)
