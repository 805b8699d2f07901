"""The caption editor behind the page: the folders that are open, edits written at once, and undo."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock

from lora_trainer.dataset.captions import parse_metadata
from lora_trainer.dataset.encodings import decode
from lora_trainer.editing import rewriting
from lora_trainer.editing.actions import Action
from lora_trainer.editing.album import Album, Picture, by_name, open_album
from lora_trainer.errors import DataError, OutputError
from lora_trainer.files import publish_all

MAX_OPEN = 4
MAX_STEPS, MAX_UNDO_BYTES = 50, 64 * 1024 * 1024

Files = Mapping[Path, "bytes | None"]
"""Bytes of files; None for a file that is not there."""


@dataclass(frozen=True)
class Step:
    """What undo takes back, in words, as files and as the pictures on show; these hold for the `reading` of the folder
    in which they were changed."""

    label: str
    before: Files
    after: Files
    pictures: Mapping[str, Picture]
    reading: int

    @property
    def size(self) -> int:
        return sum(len(data or b"") for files in (self.before, self.after) for data in files.values())


@dataclass
class Opened:
    """An album with its history; `version` is another one after each change, `reading` counts how often the folder was
    read."""

    album: Album
    reading: int = 0
    version: str = field(default_factory=lambda: secrets.token_hex(8))
    steps: list[Step] = field(default_factory=list)

    def renew(self) -> None:
        """Read the folder again. Raises DataError."""
        self.album = open_album(self.album.folder, self.album.metadata)
        self.reading += 1
        self.version = secrets.token_hex(8)

    def update(self, files: Files, pictures: Mapping[str, Picture]) -> dict[str, Picture]:
        """Know what was written without reading a folder of thousands again; the pictures as they were."""
        before = {name: self.album.pictures[name] for name in pictures}
        self.album.files.update({path: data for path, data in files.items() if data is not None})
        self.album.pictures.update(pictures)
        self.version = secrets.token_hex(8)
        return before


class Editor:
    """One for the process, so that all pages see the same captions and take back the same steps."""

    def __init__(self) -> None:
        self._opened: OrderedDict[tuple[Path, Path | None], Opened] = OrderedDict()
        # One edit at a time: the files are read, compared and written in between.
        self._lock = RLock()

    def open(self, folder: Path, metadata: Path | None, *, fresh: bool = False) -> Opened:
        """The album of `folder`; `fresh`, read again from the disk. Raises DataError."""
        with self._lock:
            key = (folder, metadata)
            if key not in self._opened:
                self._opened[key] = Opened(open_album(folder, metadata))
            elif fresh:
                self._opened[key].renew()
            self._opened.move_to_end(key)
            while len(self._opened) > MAX_OPEN:
                self._opened.popitem(last=False)
            return self._opened[key]

    def edit(self, opened: Opened, version: str, pictures: Sequence[Picture], action: Action) -> int:
        """Do `action` to the captions of `pictures` and write them at once; how many changed.

        Raises DataError, and OutputError for a disk that does not take them. Where a file is no longer as it was read,
        nothing is written.
        """
        with self._lock:
            self._same(opened, version)
            changes = {}
            for picture in pictures:
                edited = action.edited(picture.caption)
                if edited != picture.caption:
                    changes[picture.name] = rewriting.usable(picture.name, edited)
            changes = {name: text for name, text in changes.items() if text != opened.album.pictures[name].caption}
            if not changes:
                return 0
            homes = {name: opened.album.new_home(opened.album.pictures[name]) for name in changes}
            changes = {name: opened.album.fitting(homes[name], name, text) for name, text in changes.items()}
            grouped: dict[Path, dict[str, str]] = {home: {} for home in homes.values()}
            for name, home in homes.items():
                grouped[home][name] = changes[name]
            before = {home: opened.album.files.get(home) for home in grouped}
            after = {home: _rewritten(opened.album, home, inside) for home, inside in grouped.items()}
            self._publish(opened, expected=before, new=after)
            known = _known(opened.album, homes, changes)
            # Without words in its place a caption may be found in another one.
            renewed = opened.album.from_names or not all(changes.values())
            was = {} if renewed else opened.update(after, known)
            self._remember(opened, Step(_described(action, changes), before, after, was, opened.reading))
            if renewed:
                opened.renew()
            return len(changes)

    def undo(self, opened: Opened, version: str) -> str:
        """Take back the last step; what it was, in words. Raises DataError, OutputError."""
        with self._lock:
            self._same(opened, version)
            if not opened.steps:
                raise DataError("there is nothing to undo")
            step = opened.steps[-1]
            self._publish(opened, expected=step.after, new=step.before)
            opened.steps.pop()
            same = step.reading == opened.reading and step.pictures
            if same and all(picture.caption for picture in step.pictures.values()):
                opened.update(step.before, step.pictures)
            else:
                opened.renew()
            return step.label

    @staticmethod
    def _same(opened: Opened, version: str) -> None:
        if opened.version != version:
            raise DataError("the captions were changed from another page meanwhile; look at them and try again")

    @staticmethod
    def _publish(opened: Opened, *, expected: Files, new: Files) -> None:
        """Write `new` where the files are still as `expected`."""
        for path, data in expected.items():
            if _bytes(path) != data:
                opened.renew()
                raise _changed(path)
        try:
            publish_all(new)
        except OutputError:
            # What was moved into place before the disk failed goes back, so that all is done or nothing.
            with suppress(OutputError):
                publish_all({path: data for path, data in expected.items() if _bytes(path) != data})
            opened.renew()
            raise

    @staticmethod
    def _remember(opened: Opened, step: Step) -> None:
        opened.steps.append(step)
        while len(opened.steps) > MAX_STEPS or sum(step.size for step in opened.steps) > MAX_UNDO_BYTES:
            opened.steps.pop(0)


def _known(album: Album, homes: Mapping[str, Path], changes: Mapping[str, str]) -> dict[str, Picture]:
    """The pictures as they are after `changes`, also those that share a text file with a changed one."""
    shared = {home: name for name, home in homes.items() if not album.in_table(home)}
    found = {}
    for name, picture in album.pictures.items():
        source = name if name in changes else shared.get(picture.home) if picture.home else None
        if source is not None:
            found[name] = Picture(name, picture.path, changes[source], homes[source])
    return found


def _rewritten(album: Album, home: Path, changes: Mapping[str, str]) -> bytes:
    """The new bytes of the file `home` with the captions `changes` of pictures by their names."""
    before = album.files.get(home)
    if not album.in_table(home):
        return rewriting.sidecar(home, before, next(iter(changes.values())))
    if before is None:
        raise DataError(f"{home}: expected a caption file that can be read; mend it first")
    rows = by_name(parse_metadata(home, decode(home, before)[0], [], lambda *_: None))
    keys = {name: album.row_name(home, album.pictures[name]) for name in changes}
    changed = {rows[key].number: changes[name] for name, key in keys.items() if key in rows}
    added = [(key, changes[name]) for name, key in keys.items() if key not in rows]
    return rewriting.metadata(home, before, rewriting.Rows(changed, added))


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _changed(path: Path) -> DataError:
    return DataError(f"{path}: was changed by another program meanwhile, so nothing was written; look and try again")


def _described(action: Action, changes: Mapping[str, str]) -> str:
    where = next(iter(changes)) if len(changes) == 1 else f"{len(changes):,} pictures"
    return f"{action.label()} ({where})"
