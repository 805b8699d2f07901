"""Uploaded pictures, captions and zip files into one folder, without trusting their names or sizes.

It is flat, but for kohya's `10_name class` folders, whose names mean something.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from lora_trainer.config.rules import RESERVED
from lora_trainer.dataset.concepts import numbered
from lora_trainer.dataset.images import IMAGE_SUFFIXES
from lora_trainer.errors import DataError, printable

CAPTION_SUFFIXES = (".txt", ".caption", ".csv", ".jsonl")
MAX_NAME_BYTES = 200
_DEVICES = RESERVED - {"none", "addams"}
_BAD_NAME = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f]')
_CHUNK = 1024 * 1024


@dataclass(frozen=True)
class Upload:
    """A file that the browser sent: what the user called it, and where it lies."""

    name: str
    path: Path


@dataclass(frozen=True)
class Limits:
    """What one upload may hold. Sizes are counted while unpacking, since a zip can lie about them."""

    files: int = 20_000
    total: int = 8 * 1024**3
    entries: int = 100_000


@dataclass
class Received:
    """What arrived in `folder`."""

    folder: Path
    pictures: int = 0
    captions: int = 0
    skipped: list[str] = field(default_factory=list)


def receive(uploads: Sequence[Upload], folder: Path, *, limits: Limits | None = None) -> Received:
    """Put `uploads` into the empty `folder`, zip files unpacked. On a DataError `folder` is removed."""
    inbox = _Inbox(Received(folder), limits or Limits())
    try:
        for upload in uploads:
            if upload.name.lower().endswith(".zip"):
                _unpack(upload, inbox)
            else:
                with open(upload.path, "rb") as source:
                    inbox.take(upload.name, source)
        if not inbox.received.pictures:
            kinds = " ".join(suffix.removeprefix(".") for suffix in sorted(IMAGE_SUFFIXES))
            raise DataError(f"upload: expected pictures ({kinds}) or a zip of them, found none")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise DataError(f"upload: {error.filename or folder}: {error.strerror or error}") from None
    except DataError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return inbox.received


@dataclass
class _Inbox:
    """The folder as it fills, and what is left of the limits."""

    received: Received
    limits: Limits
    bytes: int = 0
    names: dict[str, str] = field(default_factory=dict)

    def take(self, shown: str, source: BinaryIO, place: str = "") -> None:
        """Copy `source` under the last part of its name `shown`, in the sub-folder `place`; leave it out if it is no
        data set's file."""
        name = PurePosixPath(shown.replace("\\", "/")).name
        why = _unwanted(name)
        if why is not None:
            self.received.skipped.append(f"{printable(shown, 200)}: {why}")
            return
        self._register(f"{place}/{name}" if place else name, printable(shown, 200))
        folder = self.received.folder / place
        folder.mkdir(exist_ok=True)
        with (folder / name).open("xb") as target:
            self._copy(shown, source, target)
        if Path(name).suffix.lower() in IMAGE_SUFFIXES:
            self.received.pictures += 1
        else:
            self.received.captions += 1

    def _register(self, name: str, shown: str) -> None:
        # Windows and macOS do not tell A.png from a.png.
        before = self.names.get(name.casefold())
        if before is not None:
            raise DataError(
                f"upload: expected every file to have a name of its own, found {name} twice ({before} and {shown}); "
                "rename one, or give the folder's path instead"
            )
        self.names[name.casefold()] = shown
        if len(self.names) > self.limits.files:
            raise DataError(f"upload: expected at most {self.limits.files:,} files; give the folder's path instead")

    def _copy(self, shown: str, source: BinaryIO, target: BinaryIO) -> None:
        while chunk := source.read(_CHUNK):
            self.bytes += len(chunk)
            if self.bytes > self.limits.total:
                raise DataError(
                    f"upload: expected at most {self.limits.total / 1024**3:.3g} GiB unpacked, found more "
                    f"(at {printable(shown, 200)}); give the folder's path instead"
                )
            target.write(chunk)


def _unpack(upload: Upload, inbox: _Inbox) -> None:
    with _zip_errors(upload.name), zipfile.ZipFile(upload.path) as archive:
        entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        if len(entries) > inbox.limits.entries:
            raise DataError(f"{upload.name}: expected at most {inbox.limits.entries:,} files, found {len(entries):,}")
        entries = [entry for entry in entries if not _clutter(entry.filename)]
        places = _places([entry.filename for entry in entries])
        for entry in entries:
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DataError(f"{upload.name}: packed in a rare way; pack it as an ordinary zip")
            with archive.open(entry) as source:
                inbox.take(entry.filename, source, places.get(entry.filename, ""))


@contextmanager
def _zip_errors(name: str) -> Iterator[None]:
    """Whatever is wrong with a zip file becomes a DataError."""
    try:
        yield
    except (DataError, OSError):
        raise
    except RuntimeError:
        raise DataError(f"{name}: expected an ordinary zip file without a password") from None
    except Exception as error:
        # On damaged bytes it raises nearly anything: BadZipFile, zlib.error, IndexError for a file without a name, ….
        raise DataError(f"{name}: not a whole zip file: {error}") from None


def _clutter(path: str) -> bool:
    """Hidden files, such as those macOS puts into every zip: nobody needs to hear of them."""
    parts = path.replace("\\", "/").split("/")
    return "__MACOSX" in parts or any(part.startswith(".") and part not in (".", "..") for part in parts)


def _places(names: Sequence[str]) -> dict[str, str]:
    """The sub-folder of each file of a zip: its own folder's name, where all that hold pictures have kohya's form."""
    parents = {name: PurePosixPath(name.replace("\\", "/")).parent.name for name in names}
    folders = {parents[name] for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES} - {""}
    kept = {folder for folder in folders if numbered(folder) and not _unnameable(folder)}
    return {name: parent for name, parent in parents.items() if parent in kept} if kept == folders else {}


def _unwanted(name: str) -> str | None:
    """Why a file of this name is left out."""
    if Path(name).suffix.lower() not in (*IMAGE_SUFFIXES, *CAPTION_SUFFIXES):
        return "neither a picture nor captions"
    return "a name that not every system can hold" if _unnameable(name) else None


def _unnameable(name: str) -> bool:
    """Whether some system cannot hold it."""
    stem = name.split(".")[0].strip().lower()
    odd = not name.isprintable() or len(name.encode(errors="replace")) > MAX_NAME_BYTES or name != name.rstrip(" .")
    return odd or bool(_BAD_NAME.search(name)) or stem in _DEVICES or not stem
