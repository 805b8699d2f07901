"""The queue: jobs run one after another in one worker thread."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from lora_trainer.config import Config, build, output_name_of
from lora_trainer.errors import DataError, OutputError, UserError
from lora_trainer.events import (
    AnyEvent,
    Compared,
    EventSink,
    Finished,
    Progress,
    RateFound,
    RateTried,
    Saved,
    Saving,
    Started,
    StepDone,
    Validated,
)
from lora_trainer.hosts.ports import Control
from lora_trainer.jobs.control import JobControl
from lora_trainer.jobs.fold import Changed, Told, fold
from lora_trainer.jobs.states import ENDED, FOLLOWS, Kind, State
from lora_trainer.jobs.store import Head, JobFolder, first_view, read_jobs
from lora_trainer.jobs.view import JobView
from lora_trainer.report import report

# Runs a job, from where an earlier call left it.
Work = Callable[[str, Config, EventSink, Control], Finished]
# What is on disk before it shows; the rest is telemetry, which comes again when a run goes on from before it.
LIFECYCLE = (Started, Saved, Validated, Compared, RateFound, Finished)
FLUSH_SECONDS = 1.0
_LOGGER = logging.getLogger(__name__)
INTERRUPTED: dict[Kind, str] = {
    "train": "interrupted when the WebUI closed; Continue goes on where it was",
    "find-lr": "interrupted when the WebUI closed; Continue begins again",
}


@dataclass
class _Job:
    view: JobView
    folder: JobFolder
    control: JobControl = field(default_factory=JobControl)
    flushed: float = 0.0


class JobService:
    """Every job of this WebUI, those of earlier processes too.

    A change of state is on disk before a view shows it. Jobs run in the order they came; one that is paused, or was
    interrupted by the end of the process, keeps its place until it is told to go on or to stop. `work` runs a training,
    `find` a search for a learning rate; both raise UserError for what the user can mend. Views are immutable, and
    reading them never waits for work.
    """

    def __init__(
        self, folder: Path, work: Work, *, find: Work | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._folder, self._clock = folder, clock
        self._works: dict[Kind, Work | None] = {"train": work, "find-lr": find}
        self._changed = threading.Condition()
        self._jobs: dict[str, _Job] = {}
        self._closing = False
        # Names tell seconds; who came first in one of them, only the clock.
        for view in sorted(read_jobs(folder), key=lambda view: view.created):
            self._jobs[view.id] = self._job(view, JobFolder(folder / view.id))
        for job in self._jobs.values():
            self._find_again(job)
        self._worker = threading.Thread(target=self._run, name="lora-trainer-jobs", daemon=True)
        self._worker.start()

    def submit(self, config: Config, kind: Kind = "train") -> JobView:
        """Queue a job. Raises OutputError when its folder cannot be written."""
        created = self._clock()
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(created))
        settings: Mapping[str, object] = msgspec.to_builtins(config)
        head = Head(f"{stamp}-{secrets.token_hex(3)}", output_name_of(config), created, dict(settings), kind)
        job = self._job(first_view(head), JobFolder.create(self._folder, head))
        try:
            job.folder.append(Changed(created, "queued", "waiting"), durable=True)
        except OutputError:
            job.folder.discard()
            raise
        with self._changed:
            self._jobs[head.id] = job
            self._changed.notify_all()
            return job.view

    def jobs(self) -> list[JobView]:
        """Newest first."""
        with self._changed:
            return [job.view for job in reversed(self._jobs.values())]

    def job(self, id: str) -> JobView:
        """Raises DataError."""
        return self._find(id).view

    def stop(self, id: str) -> JobView:
        """End a waiting job at once, another at its next step, where it saves. Raises DataError."""
        job = self._find(id)
        with self._changed:
            if job.view.state == "queued":
                self._enter(job, "stopped", "stopped before it began")
            if job.view.state not in ENDED:
                job.control.stop()
            self._changed.notify_all()
            return job.view

    def pause(self, id: str) -> JobView:
        """Give the GPU and its memory free at the next step, until told to go on. Raises DataError."""
        job = self._find(id)
        with self._changed:
            if job.view.state == "queued":
                self._enter(job, "paused", "paused before it began")
            if job.view.state not in ENDED:
                job.control.pause()
            return job.view

    def go_on(self, id: str) -> JobView:
        """With a paused job, and with one that stopped or failed from its last state. Raises DataError."""
        job = self._find(id)
        with self._changed:
            job.control.go_on()
            if job.view.state in ("stopped", "failed"):
                self._enter(job, "queued", "waiting")
            self._changed.notify_all()
            return job.view

    def folder_of(self, id: str) -> Path:
        """Raises DataError."""
        return self._find(id).folder.path

    def close(self, timeout: float = 5.0) -> None:
        """Stop what runs and wait for it; what waits stays on disk."""
        with self._changed:
            self._closing = True
            for job in self._jobs.values():
                job.control.stop()
            self._changed.notify_all()
        self._worker.join(timeout)

    def _job(self, view: JobView, folder: JobFolder) -> _Job:
        job = _Job(view, folder)
        job.control.entered = lambda paused: self._paused(job, paused)
        return job

    def _find(self, id: str) -> _Job:
        with self._changed:
            if id not in self._jobs:
                raise DataError(f"there is no job {id!r}")
            return self._jobs[id]

    def _find_again(self, job: _Job) -> None:
        """A job that an earlier process left: what ran then waits to be told to go on."""
        if job.view.state in ENDED or job.view.state == "queued":
            return
        job.control.pause()
        if job.view.state == "paused":
            return
        self._enter(job, "paused", INTERRUPTED[job.view.kind])

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._next() is not None)
                if self._closing:
                    return
                job = self._next()
            try:
                self._do(job)
            finally:
                job.folder.close()

    def _next(self) -> _Job | None:
        """The first that has not ended, unless it is paused."""
        waiting = next((job for job in self._jobs.values() if job.view.state not in ENDED), None)
        return None if waiting is None or waiting.control.pausing() else waiting

    def _do(self, job: _Job) -> None:
        with self._changed:
            if job.view.state in ENDED:
                return
            self._enter(job, "preparing", "waiting for the WebUI")
        try:
            config = build(job.view.settings)
            work = self._works[job.view.kind]
            finished = work(job.view.id, config, lambda event: self._tell(job, event), job.control)
        except UserError as error:
            self._fail(job, error, str(error))
        except Exception as error:
            self._fail(job, error, f"{type(error).__name__}: {error}")
        else:
            self._enter(job, finished.state)

    def _paused(self, job: _Job, paused: bool) -> None:
        self._enter(job, "paused" if paused else "preparing", None if paused else "waiting for the WebUI")

    def _tell(self, job: _Job, event: AnyEvent) -> None:
        if isinstance(event, (StepDone, RateTried)) and job.view.state != "training":
            self._enter(job, "training")
        if isinstance(event, Saving) and job.view.state != "saving":
            self._enter(job, "saving")
        line = Told(self._clock(), event)
        soon = not isinstance(event, (StepDone, RateTried, Progress)) or line.at - job.flushed >= FLUSH_SECONDS
        self._record(job, line, flush=soon)
        job.flushed = line.at if soon else job.flushed

    def _enter(self, job: _Job, state: State, why: str | None = None, details: str | None = None) -> None:
        if state not in FOLLOWS[job.view.state]:
            raise AssertionError(f"a job cannot go from {job.view.state} to {state}")
        self._record(job, Changed(self._clock(), state, why, details))

    def _record(self, job: _Job, line: Changed | Told, *, flush: bool = True) -> None:
        """On disk, then in the view. A job does not end because its history cannot be written."""
        try:
            job.folder.append(line, durable=isinstance(line, Changed) or isinstance(line.event, LIFECYCLE))
            if flush:
                job.folder.flush()
        except OutputError as error:
            _LOGGER.warning("LoRA Trainer: %s", error)
        job.view = fold(job.view, line)

    def _fail(self, job: _Job, error: Exception, why: str) -> None:
        self._enter(job, "failed", why, report(error, job.view.settings, job.view.log))
