"""The queue: jobs run one after another in one worker thread."""

from __future__ import annotations

import secrets
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from lora_trainer.config import Config, output_name_of
from lora_trainer.errors import DataError, UserError
from lora_trainer.events import AnyEvent, EventSink, Finished, Progress, StepDone
from lora_trainer.jobs.fold import Changed, Told, fold
from lora_trainer.jobs.states import ENDED, FOLLOWS, State
from lora_trainer.jobs.store import Head, JobFolder, first_view, read_jobs
from lora_trainer.jobs.view import JobView

Work = Callable[[str, Config, EventSink, Callable[[], bool]], Finished]
FLUSH_SECONDS = 1.0
CLOSED_BEFORE, CLOSED_WHILE = "the WebUI was closed before it began", "the WebUI was closed while it ran"


@dataclass
class _Job:
    view: JobView
    folder: JobFolder
    config: Config | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    flushed: float = 0.0


class JobService:
    """Every job of this WebUI, those of earlier processes too.

    A change of state is on disk before a view shows it. `work` runs a job; it raises UserError for what the user can
    mend. Views are immutable, and reading them never waits for work.
    """

    def __init__(self, folder: Path, work: Work, *, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._work, self._clock = folder, work, clock
        self._changed = threading.Condition()
        self._jobs: dict[str, _Job] = {}
        self._closing = False
        for view in read_jobs(folder):
            self._jobs[view.id] = _Job(view, JobFolder(folder / view.id))
        for job in self._jobs.values():
            self._bury(job)
        self._worker = threading.Thread(target=self._run, name="lora-trainer-jobs", daemon=True)
        self._worker.start()

    def submit(self, config: Config) -> JobView:
        """Queue a job. Raises OutputError when its folder cannot be written."""
        created = self._clock()
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(created))
        settings: Mapping[str, object] = msgspec.structs.asdict(config)
        head = Head(f"{stamp}-{secrets.token_hex(3)}", output_name_of(config), created, dict(settings))
        job = _Job(first_view(head), JobFolder.create(self._folder, head), config)
        job.folder.append(Changed(created, "queued", "waiting"), durable=True)
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
        """End a waiting job at once, a running one at its next step, where it saves. Raises DataError."""
        job = self._find(id)
        with self._changed:
            job.stop.set()
            if job.view.state == "queued":
                self._enter(job, "stopped", "stopped before it began")
            return job.view

    def folder_of(self, id: str) -> Path:
        """Raises DataError."""
        return self._find(id).folder.path

    def close(self, timeout: float = 5.0) -> None:
        """Stop what runs and wait for it; what waits stays on disk."""
        with self._changed:
            self._closing = True
            for job in self._jobs.values():
                job.stop.set()
            self._changed.notify_all()
        self._worker.join(timeout)

    def _find(self, id: str) -> _Job:
        with self._changed:
            if id not in self._jobs:
                raise DataError(f"there is no job {id!r}")
            return self._jobs[id]

    def _bury(self, job: _Job) -> None:
        """Jobs that an earlier process left unfinished."""
        if job.view.state in ENDED:
            return
        state, why = ("stopped", CLOSED_BEFORE) if job.view.state == "queued" else ("failed", CLOSED_WHILE)
        try:
            self._enter(job, state, why)
        except UserError:
            job.view = fold(job.view, Changed(self._clock(), state, why))

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._next() is not None)
                if self._closing:
                    return
                job = self._next()
            try:
                self._do(job)
            except UserError as error:
                # Its history could not be written; the next job may have more luck.
                job.view = fold(job.view, Changed(self._clock(), "failed", str(error)))
            finally:
                job.folder.close()

    def _next(self) -> _Job | None:
        return next((job for job in self._jobs.values() if job.view.state == "queued"), None)

    def _do(self, job: _Job) -> None:
        with self._changed:
            if job.view.state != "queued":
                return
            self._enter(job, "preparing", "waiting for the WebUI")
        try:
            finished = self._work(job.view.id, job.config, lambda event: self._tell(job, event), job.stop.is_set)
        except UserError as error:
            self._enter(job, "failed", str(error))
        except Exception as error:
            self._keep_traceback(job)
            self._enter(job, "failed", f"{type(error).__name__}: {error}")
        else:
            self._enter(job, finished.state)

    def _tell(self, job: _Job, event: AnyEvent) -> None:
        if isinstance(event, StepDone) and job.view.state == "preparing":
            self._enter(job, "training")
        line = Told(self._clock(), event)
        job.folder.append(line, durable=False)
        if not isinstance(event, (StepDone, Progress)) or line.at - job.flushed >= FLUSH_SECONDS:
            job.folder.flush()
            job.flushed = line.at
        job.view = fold(job.view, line)

    def _enter(self, job: _Job, state: State, why: str | None = None) -> None:
        if state not in FOLLOWS[job.view.state]:
            raise AssertionError(f"a job cannot go from {job.view.state} to {state}")
        line = Changed(self._clock(), state, why)
        job.folder.append(line, durable=True)
        job.view = fold(job.view, line)

    def _keep_traceback(self, job: _Job) -> None:
        text = traceback.format_exc()
        try:
            (job.folder.path / "error.log").write_text(text, encoding="utf-8")
        except OSError:
            print(text)
