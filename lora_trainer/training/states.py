"""Full states of a run on disk: all that the next process needs to go on as if nothing had happened.

`OUTPUT_DIR/state/NAME/` holds the newest two, each a .safetensors file of the trained weights and all that goes with
them, whose header says the rest, and after the run only what it came to. A power cut may leave a file whole in name
and broken inside: each carries a hash of its tensors, and the one before is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import msgspec
import safetensors
import safetensors.torch
from filelock import FileLock, Timeout
from torch import Tensor

from lora_trainer import __version__
from lora_trainer.adapters.writer import in_parts
from lora_trainer.curve import Point
from lora_trainer.errors import OutputError
from lora_trainer.events import Finished
from lora_trainer.files import publish, remove, sweep_folder
from lora_trainer.training.snapshot import Snapshot

FOLDER, FINISHED, LOCK = "state", "finished.json", "lock"
VERSION = 1
KEPT = 2
_FACTS, _HASH = "lora_trainer_state", "sha256"


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a state says beside its tensors. `base` and `data` tell what the run began with; `losses` are those of the
    window that the mean is taken over; `curve` is what was measured, and the weights at its best are among the tensors;
    `initial` is the LoRA that it started from; `checkpointing`, `parts` and `storage` are the memory ladder's rung."""

    version: int = VERSION
    step: int
    name: str
    started_at: float
    config: dict[str, object]
    base: str
    data: str
    losses: list[float]
    rollbacks: int
    curve: list[Point] = []
    initial: dict[str, str] = {}
    checkpointing: int
    parts: int
    storage: str = "auto"
    tier: str
    threads: int
    versions: dict[str, str]


@dataclass(frozen=True)
class Kept:
    """A state read back: tensors as `Snapshot.named` gave them."""

    facts: Facts
    tensors: Mapping[str, Tensor]


@dataclass
class StateFolder:
    """The states of one run, written in a thread of its own."""

    path: Path
    _lock: FileLock = field(init=False)
    _writer: ThreadPoolExecutor | None = field(default=None, init=False)
    _writing: Future | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._lock = FileLock(self.path / LOCK, timeout=0)

    def claim(self) -> bool:
        """Whether no other process is at this run; from now on none can be. Raises OutputError."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            return False
        except NotImplementedError:
            pass  # a file system without locks
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror or error}") from error
        sweep_folder(self.path)
        return True

    def release(self) -> None:
        """Wait for what is being written, then let others in. A folder with nothing to go on from goes."""
        if self._writer is not None:
            self._writer.shutdown()
            self._writer = None
        remove(self.path / LOCK)
        self._lock.release()
        for folder in (self.path, self.path.parent):
            with suppress(OSError):
                folder.rmdir()

    def write_behind(self, snapshot: Snapshot, facts: Facts) -> bool:
        """Start writing; False while the one before is still on its way. Raises OutputError for that one."""
        if self._writing is not None and not self._writing.done():
            return False
        self.wait()
        self._writer = self._writer or ThreadPoolExecutor(1, thread_name_prefix="state")
        self._writing = self._writer.submit(self._write, snapshot, facts)
        return True

    def write(self, snapshot: Snapshot, facts: Facts) -> None:
        """Write now. Raises OutputError."""
        with suppress(OutputError):
            self.wait()
        self._write(snapshot, facts)

    def wait(self) -> None:
        """For what is being written. Raises OutputError when that failed."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def newest(self) -> tuple[Kept | None, list[Path]]:
        """The newest state that is whole, and those after it, which are not."""
        damaged = []
        for path in self._files():
            kept = _read(path)
            if kept is not None:
                return kept, damaged
            damaged.append(path)
        return None, damaged

    def finish(self, finished: Finished) -> None:
        """The run is over: what it came to takes the place of its states. If it cannot, they stay: who goes on from
        the last one only saves again."""
        with suppress(OutputError):
            publish(msgspec.json.encode(finished), self.path / FINISHED)
            for path in self._files():
                remove(path)

    def finished(self) -> Finished | None:
        with suppress(OSError, msgspec.MsgspecError):
            return msgspec.json.decode((self.path / FINISHED).read_bytes(), type=Finished)
        return None

    def clear(self) -> None:
        """Before another run takes the folder."""
        for path in (*self._files(), self.path / FINISHED):
            remove(path)

    @property
    def unfinished(self) -> bool:
        """Whether there is something to go on from."""
        return bool(self._files())

    def _files(self) -> list[Path]:
        """Newest first."""
        return sorted(self.path.glob("step*.safetensors"), reverse=True)

    def _write(self, snapshot: Snapshot, facts: Facts) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in snapshot.named().items()}
        header = {_FACTS: msgspec.json.encode(facts).decode(), _HASH: _digest(in_parts(tensors, {})[1:])}
        target = self.path / f"step{facts.step:08}.safetensors"
        publish(in_parts(tensors, header), target)
        # After a rollback there are newer ones, which lead back to where the numbers went bad.
        newer = [path for path in self._files() if path > target]
        for path in (*newer, *[path for path in self._files() if path not in newer][KEPT:]):
            remove(path)


def folders(output_dir: Path, wanted: str) -> Iterator[StateFolder]:
    """The runs called `wanted`, or `wanted` with a number, that left something in `output_dir`: unfinished ones first,
    then the newest."""
    paths = [path for path in (output_dir / FOLDER).glob("*") if _is_numbered(path.name, wanted)]
    newest = (StateFolder(path) for path in sorted(paths, key=_touched, reverse=True))
    yield from sorted(newest, key=lambda states: not states.unfinished)


def versions() -> dict[str, str]:
    """Of what the numbers of a run depend on."""
    return {name: metadata.version(name) for name in ("torch", "diffusers", "peft")} | {"lora_trainer": __version__}


def numbered(name: str, number: int) -> str:
    """The name of the `number`th run called `name`."""
    return name if number == 1 else f"{name}-{number}"


def _is_numbered(name: str, wanted: str) -> bool:
    number = name.removeprefix(f"{wanted}-")
    return name == wanted or (number != name and number.isdecimal())


def _touched(path: Path) -> float:
    times = [entry.stat().st_mtime for entry in path.glob("*") if entry.name != LOCK]
    return max(times, default=0.0)


def _read(path: Path) -> Kept | None:
    """None when the file is not whole, or of another version."""
    try:
        data = path.read_bytes()
        length = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:length])["__metadata__"]
        facts = msgspec.json.decode(header[_FACTS], type=Facts)
        if facts.version != VERSION or header[_HASH] != _digest([memoryview(data)[length:]]):
            return None
        return Kept(facts, safetensors.torch.load(data))
    except (OSError, ValueError, KeyError, TypeError, msgspec.MsgspecError, safetensors.SafetensorError):
        return None


def _digest(parts: list[bytes | memoryview]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()
