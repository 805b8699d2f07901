"""The whole story: one config in, one LoRA out."""

from __future__ import annotations

import time
from collections.abc import Callable

from lora_trainer.config import Config
from lora_trainer.events import EventSink, Finished, Notice
from lora_trainer.hosts.ports import Host
from lora_trainer.training import data, trial
from lora_trainer.training.fit import Outcome
from lora_trainer.training.job import Job
from lora_trainer.training.output import Output
from lora_trainer.training.settings import torch_settings


def run(
    config: Config,
    host: Host,
    sink: EventSink,
    *,
    clock: Callable[[], float] = time.time,
    stop: Callable[[], bool] = lambda: False,
) -> Finished:
    """Train `config` on the host's model and publish the LoRA.

    `clock` dates the file; `stop()` is asked at every step boundary, and what was learned until then is
    published. Raises UserError.
    """
    began = time.perf_counter()
    full = (config, data.find(config, sink))
    config, items = trial.shorten(*full) if config.trial else full
    job = Job(config, items, Output(config, host.store, sink, clock, host.painter), sink, stop)
    outcome = Outcome.HANDED_OVER
    with torch_settings(config.cpu_threads), host.lease.hold():
        while outcome is Outcome.HANDED_OVER:
            with host.models.borrow() as model:
                outcome = job.segment(model, host.lease)
                # The memory of what only the view holds is free when the host takes the model back.
                del model
    if config.trial and outcome is Outcome.DONE:
        sink(Notice(text=trial.forecast(*full, job.measured)))
    finished = Finished(
        state="done" if outcome is Outcome.DONE else "stopped",
        output=[str(path) for path in job.published],
        steps=job.step,
        loss=job.loss,
        seconds=time.perf_counter() - began,
        validation_base=job.validation.base,
        validation_lora=job.validation.lora,
    )
    sink(finished)
    return finished
