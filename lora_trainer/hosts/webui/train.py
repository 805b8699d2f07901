"""One job inside the WebUI."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from modules import devices, shared
from modules.call_queue import queue_lock

from lora_trainer.config import Config
from lora_trainer.events import AnyEvent, EventSink, Finished, Progress, RateFound, StepDone
from lora_trainer.hosts.ports import Control, Host
from lora_trainer.hosts.webui.card import write_card
from lora_trainer.hosts.webui.interrupt import interrupted
from lora_trainer.hosts.webui.lease import QueueLease
from lora_trainer.hosts.webui.loaded import LoadedModel
from lora_trainer.hosts.webui.painter import Txt2Img
from lora_trainer.hosts.webui.store import LoraFolder, lora_dir
from lora_trainer.logs import CsvLog, TensorBoardLog, fan_out
from lora_trainer.training.finder import EVERY, NothingMeasured, find_rate
from lora_trainer.training.run import run
from lora_trainer.training.states import FOLDER as STATES


@dataclass(frozen=True)
class Interruptible:
    """A Control for which the WebUI's Interrupt, while the training has the GPU, is a stop too."""

    asked: Control
    lease: QueueLease

    def stopping(self) -> bool:
        return self.asked.stopping() or (self.lease.held and interrupted())

    def pausing(self) -> bool:
        return self.asked.pausing()

    def wait(self) -> None:
        self.asked.wait()


def train(config: Config, sink: EventSink, control: Control) -> Finished:
    """Run `config` on the loaded checkpoint, from where an earlier process left it. The WebUI's Interrupt, while the
    training has the GPU, stops it and saves. Raises UserError."""
    folder = Path(config.output_dir)
    kinds = [CsvLog] + ([TensorBoardLog] if config.log_with == "tensorboard" else [])
    with fan_out(sink, mirror, *(kind(folder / "logs", True) for kind in kinds)) as events:
        models = LoadedModel(config, events)
        lease = QueueLease(models.still_ours, models.give_back)
        host = Host(models, lease, LoraFolder(folder, config.overwrite, events), Txt2Img(folder, lease.disturb))
        with freed_after_errors():
            begun = (folder / STATES).is_dir()
            finished = run(config, host, events, control=Interruptible(control, lease), resumes=begun)
        for lora in map(Path, finished.output):
            if lora.is_relative_to(lora_dir()):
                write_card(lora, config, folder)
        return finished


def find(config: Config, sink: EventSink, control: Control) -> Finished:
    """Search a learning rate on the loaded checkpoint, and put its curve into the run's folder. The WebUI's Interrupt,
    while the search has the GPU, ends it: what was measured is judged. Raises UserError."""
    began, folder = time.perf_counter(), Path(config.output_dir)
    with fan_out(sink, mirror) as events:
        models = LoadedModel(config, events)
        lease = QueueLease(models.still_ours, models.give_back)
        host = Host(models, lease, LoraFolder(folder, config.overwrite, events))
        steps, stopped = 0, True
        with freed_after_errors(), suppress(NothingMeasured):
            finding = find_rate(config, host, events, Interruptible(control, lease))
            steps, stopped = EVERY * (len(finding.points) - 1), finding.stopped
            events(RateFound(learning_rate=finding.rate, why=finding.why))
            finding.put(folder, events)
        state, seconds = "stopped" if stopped else "done", time.perf_counter() - began
        events(finished := Finished(state=state, output=[], steps=steps, loss=None, seconds=seconds))
        return finished


@contextmanager
def freed_after_errors() -> Iterator[None]:
    """What the frames of a failed run hold on the GPU is given back before anybody draws again."""
    try:
        yield
    except Exception as error:
        link: BaseException | None = error
        while link is not None:
            traceback.clear_frames(link.__traceback__)
            link = link.__cause__ or link.__context__
        gc.collect()
        with queue_lock:
            devices.torch_gc()
        raise


def mirror(event: AnyEvent) -> None:
    """The WebUI's progress bar shows the job; the job itself never reads it back."""
    if isinstance(event, StepDone):
        done, total, text = event.step, event.steps, f"Training: loss {event.loss:.4f}"
    elif isinstance(event, Progress):
        done, total, text = event.done, event.total, event.stage
    else:
        return
    shared.state.job_no, shared.state.job_count, shared.state.textinfo = done, max(total, 1), text
