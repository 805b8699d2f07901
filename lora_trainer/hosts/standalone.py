"""A terminal as the host: the model from a file, the GPU ours alone, results into `output_dir`."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from lora_trainer.adapters.hashes import checkpoint_hashes
from lora_trainer.config import Config
from lora_trainer.errors import ConfigError
from lora_trainer.events import EventSink, Finished
from lora_trainer.files import publish
from lora_trainer.hosts.ports import Host
from lora_trainer.logs import CsvLog, TensorBoardLog, fan_out
from lora_trainer.models.checkpoint import FileIdentity
from lora_trainer.models.model import CheckpointHashes, Model
from lora_trainer.models.single_file import model_of, place
from lora_trainer.models.storage import AUTO, lighter_than, storage_of
from lora_trainer.training.control import StopOnly
from lora_trainer.training.finder import Finding, find_rate
from lora_trainer.training.precision import resolve
from lora_trainer.training.run import run


def train(config: Config, sink: EventSink, *, resumes: bool = False) -> Finished:
    """Run `config` in this process, logging to `output_dir/logs` as well as to `sink`.

    With `resumes` the run in `output_dir` goes on, where there is one. The first Ctrl-C saves what was learned;
    SOURCE_DATE_EPOCH, when set, is the clock. Raises UserError.
    """
    # What is not there is said before any log of an earlier run is touched.
    device_of(config.device)
    logs = Path(config.output_dir) / "logs"
    kinds = [CsvLog] + ([TensorBoardLog] if config.log_with == "tensorboard" else [])
    with stop_on_interrupt() as stop, fan_out(sink, *(kind(logs, resumes) for kind in kinds)) as events:
        return run(config, host_of(config), events, clock=clock, control=StopOnly(stop), resumes=resumes)


def find_learning_rate(config: Config, sink: EventSink) -> Finding:
    """Sweep the learning rate, and put its curve as `find-lr.csv` and `find-lr.png` into `output_dir`. Ctrl-C judges
    what was measured. Raises UserError."""
    with stop_on_interrupt() as stop:
        finding = find_rate(config, host_of(config), sink, StopOnly(stop))
    finding.put(Path(config.output_dir), sink)
    return finding


def host_of(config: Config) -> Host:
    """This process as the host of `config`. Raises ConfigError."""
    device = device_of(config.device)
    dtype = resolve(config.mixed_precision, device)[0].compute
    storage_of(config.base_precision, device)
    if config.caption_syntax == "webui":
        raise ConfigError(["caption_syntax: webui works only inside the WebUI; expected literal here"])
    models = FileModels(
        Path(config.base_model), device, dtype, config.clip_skip, config.train_text_encoder, config.base_precision
    )
    return Host(
        models,
        AloneLease(),
        FolderStore(Path(config.output_dir), config.overwrite),
        lighter=partial(lighter_than, device=device),
    )


def device_of(name: str) -> torch.device:
    """`auto` is the first GPU where there is one. Raises ConfigError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            [f"device: expected auto, cpu or a device of this machine, found {name!r} ({reason})"]
        ) from None
    return device


def clock() -> float:
    """Seconds since 1970; SOURCE_DATE_EPOCH makes runs repeatable (https://reproducible-builds.org)."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH")
    return float(fixed) if fixed else time.time()


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Yields `stop`: true after the first Ctrl-C (or SIGTERM). The second Ctrl-C interrupts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def handle(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def open_model(path: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> Model:
    """The model of a checkpoint file, for pictures and measurements. Raises ModelError."""
    family, state = place(path, device, dtype)
    return model_of(state, family, path, device=device, hashes=CheckpointHashes)


@dataclass
class FileModels:
    """The model of one checkpoint file, placed at the first borrow and kept; placed anew for another storage."""

    path: Path
    device: torch.device
    dtype: torch.dtype
    clip_skip: int | None = None
    train_text: bool = False
    storage: str = AUTO
    _state: tuple | None = field(default=None, init=False)
    _hashes: Callable[[], CheckpointHashes] | None = field(default=None, init=False)

    @contextmanager
    def borrow(self, storage: str | None = None) -> Iterator[Model]:
        if self._state is None or storage not in (None, self.storage):
            self._place(storage or self.storage)
        family, state, hashes = self._state
        yield model_of(state, family, self.path, device=self.device, hashes=hashes, clip_skip=self.clip_skip)

    def _place(self, storage: str) -> None:
        # The one before goes first, and what its views have left in cycles.
        self._state, self.storage = None, storage
        gc.collect()
        stored = storage_of(storage, self.device)
        placed = place(self.path, self.device, self.dtype, train_text=self.train_text, storage=stored)
        self._hashes = self._hashes or in_background(self.path)
        self._state = (*placed, self._hashes)


def in_background(path: Path) -> Callable[[], CheckpointHashes]:
    """Hash `path` in a thread; the result waits for it, and is empty if the file has changed meanwhile."""
    before = FileIdentity.of(path)
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hash")

    def hashes() -> CheckpointHashes:
        try:
            legacy, sha256 = checkpoint_hashes(path)
            same = FileIdentity.of(path) == before
        except OSError:
            return CheckpointHashes()
        return CheckpointHashes(legacy, sha256) if same else CheckpointHashes()

    future = executor.submit(hashes)
    executor.shutdown(wait=False)
    return future.result


class AloneLease:
    """Nobody else wants the GPU."""

    @contextmanager
    def hold(self) -> Iterator[None]:
        yield

    def hand_over(self, make_room: Callable[[], object] = lambda: None) -> bool:
        return True


@dataclass(frozen=True)
class FolderStore:
    """Results in one folder; another run's LoRA is only overwritten when told to."""

    folder: Path
    overwrite: bool

    def free(self, name: str) -> bool:
        return self.overwrite or not (self.folder / f"{name}.safetensors").exists()

    def publish(self, file: str, data: bytes, *, final: bool) -> Path:
        target = self.folder / file
        publish(data, target)
        return target
