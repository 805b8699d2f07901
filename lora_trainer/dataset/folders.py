"""What lies in a folder."""

from __future__ import annotations

from pathlib import Path

from lora_trainer.dataset.captions import Complain
from lora_trainer.errors import DataError


def files_of(folder: Path, complain: Complain) -> tuple[list[Path], list[Path], list[str]]:
    """The visible files of `folder` and its direct sub-folders, in an order that no locale changes; the folders
    further down; and the files left out because their names are no text, so that no log or caption could hold them."""
    try:
        if not folder.exists():
            raise DataError(f"{folder}: no such folder; expected pictures to train on")
        if not folder.is_dir():
            raise DataError(f"{folder}: expected a folder of pictures, found a file")
    except OSError as error:
        raise DataError(f"{error.filename or folder}: cannot be read: {error.strerror}") from None
    folders, files = _visible(folder, complain)
    below = [_visible(place, complain) for place in folders]
    files += [file for _, inside in below for file in inside]
    named = {file.relative_to(folder).as_posix(): file for file in files}
    shown = {name: name.encode(errors="backslashreplace").decode() for name in sorted(named)}
    unnamed = [text for name, text in shown.items() if text != name]
    deeper = sorted(place for places, _ in below for place in places)
    return [named[name] for name, text in shown.items() if text == name], deeper, unnamed


def _visible(place: Path, complain: Complain) -> tuple[list[Path], list[Path]]:
    """The folders and the files in `place`."""
    folders: list[Path] = []
    files: list[Path] = []
    try:
        for entry in place.iterdir():
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry)
            elif entry.is_file():
                files.append(entry)
    except OSError as error:
        complain(place, DataError(f"{error.filename or place}: cannot be read: {error.strerror}"))
    return folders, files
