"""A job's folder: its settings and its history, one JSON line an event."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import msgspec

from lora_trainer.errors import OutputError
from lora_trainer.files import append, not_written, publish, remove, sweep_folder
from lora_trainer.jobs.fold import Changed, Line, Told, fold
from lora_trainer.jobs.states import Kind
from lora_trainer.jobs.view import JobView

EVENTS, SETTINGS = "events.jsonl", "settings.json"


class Head(msgspec.Struct, frozen=True):
    """What is known of a job before it begins."""

    id: str
    name: str
    created: float
    settings: dict[str, object]
    kind: Kind = "train"


@dataclass
class JobFolder:
    """Appends to one job's history. Raises OutputError."""

    path: Path
    _file: BinaryIO | None = field(default=None, init=False)

    @classmethod
    def create(cls, parent: Path, head: Head) -> JobFolder:
        folder = cls(parent / head.id)
        try:
            publish(msgspec.json.format(msgspec.json.encode(head)), folder.path / SETTINGS)
        except OutputError:
            folder.discard()
            raise
        return folder

    def append(self, line: Line, *, durable: bool) -> None:
        """A durable line survives a power cut once this returns; others reach the disk soon."""
        try:
            if self._file is None:
                self._file = (self.path / EVENTS).open("ab")
                # A crash may have cut the last line; it must not swallow this one.
                append(self._file, b"\n", durable=False)
            append(self._file, msgspec.json.encode(line) + b"\n", durable=durable)
        except OSError as error:
            self.close()
            raise not_written(self.path / EVENTS, error) from error

    def flush(self) -> None:
        """Raises OutputError."""
        try:
            if self._file is not None:
                self._file.flush()
        except OSError as error:
            self.close()
            raise not_written(self.path / EVENTS, error) from error

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            # What its buffer still holds is telemetry.
            with suppress(OSError):
                file.close()

    def discard(self) -> None:
        """Of a job that was refused after all."""
        self.close()
        for name in (SETTINGS, EVENTS):
            remove(self.path / name)
        with suppress(OSError):
            self.path.rmdir()


def first_view(head: Head) -> JobView:
    known = {"name": head.name, "created": head.created, "settings": head.settings, "kind": head.kind}
    return JobView(id=head.id, state="queued", **known)


def read_jobs(parent: Path) -> Iterator[JobView]:
    """The jobs under `parent` as their histories left them, oldest first. Folders that make no sense are skipped."""
    for folder in sorted(parent.glob("*/")):
        sweep_folder(folder)
        try:
            head = msgspec.json.decode((folder / SETTINGS).read_bytes(), type=Head)
            view = first_view(head)
            for line in _lines(folder / EVENTS):
                view = fold(view, line)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            # Also the empty folder of a job whose process was killed before it was queued.
            with suppress(OSError):
                folder.rmdir()
            continue
        if view.id == folder.name:
            yield view


def _lines(path: Path) -> Iterator[Line]:
    """The whole lines: a crash may have cut one."""
    decoder = msgspec.json.Decoder(Changed | Told)
    for text in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(msgspec.MsgspecError):
            yield decoder.decode(text)
