"""The whole story: one config in, one LoRA out."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from lora_trainer.config import Config
from lora_trainer.events import EventSink, Finished, Notice
from lora_trainer.hosts.ports import Control, Host
from lora_trainer.training import data, resume, trial
from lora_trainer.training.control import StopOnly
from lora_trainer.training.fit import Outcome
from lora_trainer.training.initial import Start
from lora_trainer.training.job import GOES_ON, Job
from lora_trainer.training.library import optimizer_class
from lora_trainer.training.output import Output
from lora_trainer.training.settings import torch_settings


def run(
    config: Config,
    host: Host,
    sink: EventSink,
    *,
    clock: Callable[[], float] = time.time,
    control: Control | None = None,
    resumes: bool = False,
) -> Finished:
    """Train `config` on the host's model and publish the LoRA.

    `clock` dates the file. `control` is asked at every step boundary; what was learned until a stop is published.
    With `resumes` the run in `output_dir` goes on, where there is one. Raises UserError.
    """
    began = time.perf_counter()
    # What is not installed is said before anything is encoded.
    optimizer_class(config)
    full = (config, data.find(config, sink))
    config, items = trial.shorten(*full) if config.trial else full
    begun = resume.begin(config, host.store, sink, resume=resumes)
    try:
        if begun.finished is not None:
            sink(Notice(text=f"the run of {begun.name} is finished already"))
            sink(begun.finished)
            return begun.finished
        started_at = begun.kept.facts.started_at if begun.kept is not None else clock()
        start = Start.of(config) if begun.kept is None else Start(begun.kept.facts.initial)
        output = Output(config, host.store, sink, begun.name, started_at, clock, host.painter, start)
        job = Job(config, items, output, sink, control or StopOnly(), begun, host.lighter)
        try:
            outcome = _segments(job, host)
        finally:
            job.close()
        if config.trial and outcome is Outcome.DONE:
            sink(Notice(text=trial.forecast(*full, job.measured)))
        finished = _finished(job, outcome, time.perf_counter() - began)
        if outcome is Outcome.DONE and begun.states is not None:
            begun.states.finish(finished)
    finally:
        if begun.states is not None:
            begun.states.release()
    sink(finished)
    return finished


def _segments(job: Job, host: Host) -> Outcome:
    """Borrow the model again and again until the run is over; in a pause others have the GPU and its memory."""
    outcome = Outcome.HANDED_OVER
    while outcome in GOES_ON:
        if outcome is Outcome.PAUSED:
            job.control.wait()
        with torch_settings(job.threads), host.lease.hold():
            outcome = _session(job, host)
    return outcome


def _session(job: Job, host: Host) -> Outcome:
    while True:
        try:
            with host.models.borrow(job.planning.plan.storage) as model:
                outcome = job.segment(model, host.lease)
                # The memory of what only the view holds is free when the host takes the model back.
                del model
        except torch.cuda.OutOfMemoryError:
            job.planning.store_lighter("while placing the base model")
            continue
        if outcome is Outcome.PAUSED or outcome not in GOES_ON:
            return outcome


def _finished(job: Job, outcome: Outcome, seconds: float) -> Finished:
    return Finished(
        state="done" if outcome is Outcome.DONE else "stopped",
        output=[str(path) for path in job.published],
        steps=job.step,
        loss=job.loss,
        seconds=seconds,
        **job.validation.summary(),
    )
