"""Files that are never half there: written aside, flushed, then moved into place."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_trainer.errors import OutputError

# What a killed process leaves of a file: .NAME.0123456789abcdef.tmp beside NAME.
_SUFFIX = ".tmp"
_AT_ONCE = 32


def publish(data: bytes | Iterable[bytes | memoryview], target: Path, *, durable: bool = True) -> None:
    """Put `data`, whole or in parts, under `target`: a temporary file in the same folder, flushed, then moved there.
    What is not `durable` is not flushed: after a power cut it may be lost or damaged.

    Raises OutputError; `target` is then as it was and no temporary file is left, nor one of a process that was killed.
    """
    sweep(target)
    temporary = _aside(target)
    try:
        make_folder(target.parent)
        with temporary.open("xb") as file:
            for part in (data,) if isinstance(data, bytes) else data:
                _write(file, part)
            if durable:
                _flush(file)
        _rename(temporary, target)
    except OSError as error:
        raise not_written(target, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    if durable:
        _flush_folder(target.parent)


def publish_all(files: Mapping[Path, bytes | None]) -> None:
    """Put each file's bytes under its name, or remove it for None: every one is whole, before or after.

    All new bytes are on disk before the first name changes. Raises OutputError; what was moved by then stays moved.
    """
    folders = {target.parent for target in files}
    for folder in folders:
        sweep_folder(folder)
    asides = {target: _aside(target) for target, data in files.items() if data is not None}

    def put_aside(target: Path) -> None:
        with _told(target), asides[target].open("xb") as file:
            _write(file, files[target])
            _flush(file)

    def move(target: Path) -> None:
        with _told(target):
            _rename(asides[target], target) if target in asides else _unlink(target)

    try:
        # A disk does many at once nearly as fast as one.
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            list(threads.map(put_aside, asides))
            list(threads.map(move, files))
    finally:
        for aside in asides.values():
            remove(aside)
    for folder in folders:
        _flush_folder(folder)


@contextmanager
def _told(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise not_written(target, error) from error


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}{_SUFFIX}")


def make_folder(folder: Path) -> None:
    """`folder` and those above it. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)


def append(file: object, data: bytes, *, durable: bool) -> None:
    """At the end of an open file; a durable write survives a power cut once this returns. Raises OSError."""
    _write(file, data)
    if durable:
        _flush(file)


def trim(files: Iterable[Path], limit: int) -> None:
    """Remove of `files` those that were changed longest ago, until the rest takes at most `limit` bytes."""
    found = []
    for path in files:
        with suppress(OSError):
            stat = path.stat()
            found.append((stat.st_mtime, stat.st_size, path))
    size = sum(bytes_ for _, bytes_, _ in found)
    for _, bytes_, path in sorted(found):
        if size <= limit:
            break
        remove(path)
        size -= bytes_


def remove(path: Path) -> None:
    """If it can be: a file too many does no harm."""
    with suppress(OSError):
        _unlink(path)


def sweep(target: Path) -> None:
    """Remove what killed processes left half-written of `target`."""
    sweep_folder(target.parent, f"{target.name}.")


def sweep_folder(folder: Path, start: str = "") -> None:
    """Remove what killed processes left half-written in `folder` of files whose names begin with `start`."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.name.startswith(f".{start}") and path.suffix == _SUFFIX:
                remove(path)


def not_written(target: Path, error: OSError) -> OutputError:
    """What to tell of a file that could not be written."""
    full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))
    reason = "the disk is full" if full else error.strerror or str(error)
    return OutputError(f"{target}: not written: {reason}")


# The operations that reach the disk, one function each, so that tests can fail, kill or record any of them.


def _write(file: object, data: bytes | memoryview) -> None:
    file.write(data)


def _flush(file: object) -> None:
    file.flush()
    os.fsync(file.fileno())


def _rename(source: Path, target: Path) -> None:
    os.replace(source, target)


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Make new names survive a power cut, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
