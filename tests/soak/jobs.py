"""Ten kinds of tiny jobs, each of which ends in its own way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lora_trainer.config import Config, build
from lora_trainer.config.schema import PATHS
from lora_trainer.events import AnyEvent, EventSink, Finished, Progress, Saved
from lora_trainer.hosts.ports import Control, Host
from lora_trainer.hosts.standalone import AloneLease, FileModels, FolderStore
from lora_trainer.jobs.service import JobService
from lora_trainer.jobs.states import ENDED, State
from lora_trainer.logs import CsvLog, TensorBoardLog, fan_out
from lora_trainer.models.model import Model
from lora_trainer.training.run import run

# Called with an event of a job's run, its service and its id.
Meddle = Callable[[AnyEvent, JobService, str], object]


class GoneOnce(AloneLease):
    """At the first step's boundary the model is no longer ours."""

    asked = 0

    def hand_over(self, make_room: Callable[[], object] = lambda: None) -> bool:
        self.asked += 1
        return self.asked != 3


class Short(FileModels):
    """The first step's memory does not suffice."""

    failed = False

    @contextmanager
    def borrow(self, storage: str | None = None) -> Iterator[Model]:
        with super().borrow(storage) as model:
            model.unet.conv_out.register_forward_hook(self._fail)
            yield model

    def _fail(self, *_: object) -> None:
        if torch.is_grad_enabled() and not self.failed:
            self.failed = True
            raise torch.cuda.OutOfMemoryError("by the test")


@dataclass(frozen=True)
class Kind:
    ends: State
    settings: Mapping[str, object] = field(default_factory=dict)
    meddle: Meddle = lambda event, service, id: None
    models: type[FileModels] = FileModels
    lease: type[AloneLease] = AloneLease


def _when(kind: type[AnyEvent], what: Callable[[JobService, str], object]) -> Meddle:
    return lambda event, service, id: what(service, id) if isinstance(event, kind) else None


def _fail(service: JobService, id: str) -> None:
    raise ZeroDivisionError("by the test")


EVERYTHING = {
    "target_modules": ["default"],
    "validation_split": 0.5,
    "validate_every": 1,
    "save_steps": 1,
    "checkpoint_every": 1,
    "cache_dir": "cache",
    "train_text_encoder": True,
    "output_format": "both",
    "gradient_checkpointing": True,
    "log_with": "tensorboard" if find_spec("tensorboard") else "csv",
    "cpu_threads": 2,
}
KINDS = {
    "everything": Kind("done", EVERYTHING),
    "drawn": Kind("done", {"sample_prompts": ["a cat"], "sample_every": 1, "sample_steps": 1}),
    "handed-over": Kind("done", lease=GoneOnce),
    "short-of-memory": Kind("done", models=Short),
    "paused": Kind("done", {"save_steps": 1}, _when(Saved, JobService.pause)),
    "stopped": Kind("stopped", {"save_steps": 1, "max_train_steps": 99}, _when(Saved, JobService.stop)),
    "stopped-early": Kind("stopped", {}, _when(Progress, JobService.stop)),
    "no-picture": Kind("failed", {"train_data_dir": "broken"}),
    "raises": Kind("failed", {"save_steps": 1}, _when(Saved, _fail)),
    "unsaved": Kind("failed", {"output_dir": "occupied"}),
}


@dataclass(frozen=True)
class Bench:
    """A folder with a tiny checkpoint and pictures, in which rounds of one job of each kind run."""

    folder: Path
    checkpoint: Path

    def __post_init__(self) -> None:
        for name in ("pictures", "broken"):
            (self.folder / name).mkdir()
        for index in range(2):
            values = np.random.default_rng(index).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(values).save(self.folder / "pictures" / f"{index}.png")
        (self.folder / "broken" / "0.png").write_bytes(b"no picture")
        (self.folder / "occupied").write_bytes(b"no folder")

    def round(self, number: int, also: Callable[[int], object] = lambda job: None) -> None:
        """One job of each kind, all queued at once; `also` is called in each, with the job's number.

        The service is closed afterwards: it remembers its jobs, which is measured elsewhere.
        """
        service = JobService(self.folder / f"jobs{number}", lambda *given: work(service, self.folder, *given))
        try:
            jobs = {name: service.submit(self._config(name)) for name in KINDS}
            for index, (name, job) in enumerate(jobs.items()):
                also(len(KINDS) * number + index)
                assert ended(service, job.id) == KINDS[name].ends, (name, service.job(job.id))
        finally:
            service.close()

    def _config(self, name: str) -> Config:
        given = {
            "base_model": str(self.checkpoint),
            "train_data_dir": "pictures",
            "output_dir": "output",
            "output_name": name,
            "overwrite": True,
            "device": "cpu",
            "mixed_precision": "no",
            "resolution": 64,
            "batch_size": 2,
            "max_train_steps": 2,
            "lora_rank": 4,
            "target_modules": ["to_q"],
            "cpu_threads": 1,
        } | dict(KINDS[name].settings)
        return build(given | {key: str(self.folder / given[key]) for key in PATHS if key in given})


def work(service: JobService, folder: Path, id: str, config: Config, sink: EventSink, control: Control) -> Finished:
    """The service's `Work`, by the command line's host."""
    kind = KINDS[config.output_name]

    def meddle(event: AnyEvent) -> None:
        kind.meddle(event, service, id)

    logs = [CsvLog] + ([TensorBoardLog] if config.log_with == "tensorboard" else [])
    with fan_out(sink, meddle, *(log(folder / "logs") for log in logs)) as events:
        models = kind.models(
            Path(config.base_model), torch.device("cpu"), torch.float32, train_text=config.train_text_encoder
        )
        host = Host(models, kind.lease(), FolderStore(Path(config.output_dir), config.overwrite))
        return run(config, host, events, control=control)


def ended(service: JobService, id: str, timeout: float = 60.0) -> State:
    """How the job ended; a pause is no end."""
    deadline = time.monotonic() + timeout
    while service.job(id).state not in ENDED:
        assert time.monotonic() < deadline, service.job(id)
        if service.job(id).state == "paused":
            service.go_on(id)
        time.sleep(0.002)
    return service.job(id).state
