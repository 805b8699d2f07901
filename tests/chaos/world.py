"""A small world to break: one job through the queue, in a process of its own, and what it must come to."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from lora_trainer import files
from lora_trainer.config import build
from lora_trainer.events import Finished, Saved, Started, Validated
from lora_trainer.hosts.ports import Control, Host
from lora_trainer.hosts.standalone import AloneLease, FileModels, FolderStore
from lora_trainer.jobs.fold import Changed, Told
from lora_trainer.jobs.service import JobService
from lora_trainer.jobs.states import ENDED
from lora_trainer.jobs.store import EVENTS
from lora_trainer.jobs.view import JobView
from lora_trainer.training.run import run
from lora_trainer.training.states import FOLDER

LORA = "tiny.safetensors"
PATIENCE = 60.0


@dataclass(frozen=True)
class World:
    """Six pictures, four states, two files on the way, validations: everything a run writes, in half a second."""

    folder: Path
    settings: dict

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def lora(self) -> bytes | None:
        path = self.out / LORA
        return path.read_bytes() if path.exists() else None

    def service(self) -> JobService:
        return JobService(self.folder / "jobs", work)

    def begin(self) -> JobView:
        """Queue the job if it is not there yet, let it go on if it waits, and see it end."""
        service = self.service()
        config = build(self.settings, {"output_dir": str(self.out)})
        known = service.jobs()
        job = known[0] if known else service.submit(config)
        if known:
            service.go_on(job.id)
        deadline = time.monotonic() + PATIENCE
        while service.job(job.id).state not in ENDED and time.monotonic() < deadline:
            time.sleep(0.002)
        return service.job(job.id)

    def lifecycle(self) -> set[str]:
        """What its history says beside telemetry, without when."""
        # A job whose settings are there is queued, whether or not there was time to say so.
        told = {"state queued"}
        for path in (self.folder / "jobs").glob(f"*/{EVENTS}"):
            for line in path.read_bytes().splitlines():
                try:
                    event = msgspec.json.decode(line, type=Changed | Told)
                except msgspec.MsgspecError:
                    continue
                if isinstance(event, Changed):
                    told.add(f"state {event.state}")
                elif isinstance(event.event, (Saved, Validated)):
                    told.add(msgspec.json.encode(event.event).decode().replace(str(self.folder), ""))
                elif isinstance(event.event, (Started, Finished)):
                    told.add(type(event.event).__name__)
        return told

    def leftovers(self) -> list[Path]:
        """What must not be there after the end: temporary files, states, locks."""
        return [
            path
            for path in self.folder.rglob("*")
            if path.suffix == ".tmp"
            or path.name == "lock"
            or (path.parent.parent.name == FOLDER and path.suffix != ".json")
        ]


def work(_: str, config: object, sink: Callable, control: Control) -> Finished:
    models = FileModels(Path(config.base_model), torch.device("cpu"), torch.float32)
    host = Host(models, AloneLease(), FolderStore(Path(config.output_dir), config.overwrite))
    return run(
        config, host, sink, clock=lambda: 1.7e9, control=control, resumes=(Path(config.output_dir) / FOLDER).is_dir()
    )


def forked(body: Callable[[], object]) -> int:
    """The exit code of a child that does `body` and nothing else; 0 when `body` returned, negative for a signal."""
    process = child(body)
    process.join(PATIENCE)
    assert process.exitcode is not None, "the child hangs"
    return process.exitcode


def child(body: Callable[[], object]) -> multiprocessing.Process:
    """All imports are made here, once; a child begins where its parent is."""

    def quiet() -> None:
        body()
        # As the WebUI ends: no finally, no atexit.
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=quiet)
    process.start()
    return process


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Operations:
    """Counts the operations of `files` that reach the disk; `at(number, name, arguments, real)` replaces each."""

    NAMES = ("_write", "_flush", "_rename", "_unlink")

    def __init__(self, at: Callable[[int, str, tuple, Callable], object]) -> None:
        self.at, self.count = at, 0
        self.real = {name: getattr(files, name) for name in self.NAMES}

    def __enter__(self) -> Operations:
        for name in self.NAMES:
            setattr(files, name, self._replaced(name))
        return self

    def __exit__(self, *exception: object) -> None:
        for name, real in self.real.items():
            setattr(files, name, real)

    def _replaced(self, name: str) -> Callable:
        def operation(*arguments: object) -> object:
            number, self.count = self.count, self.count + 1
            return self.at(number, name, arguments, self.real[name])

        return operation


def fresh(world: World, folder: Path) -> World:
    """The same world elsewhere, before anything happened."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return World(folder, world.settings)
