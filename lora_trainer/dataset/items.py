"""A folder of pictures with their captions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lora_trainer.dataset.captions import read_bytes, read_metadata
from lora_trainer.dataset.encodings import decode
from lora_trainer.dataset.images import IMAGE_SUFFIXES
from lora_trainer.errors import DataError

METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
SIDECARS = (".txt", ".caption")
_CAMERA = re.compile(
    r"^(img|dsc[fn]?|pxl|image|photo|pic|screenshot|download|file|untitled)?[\d\s_().-]*$", re.IGNORECASE
)


@dataclass(frozen=True)
class Item:
    """A picture file and its caption; `source` says where the caption came from."""

    path: Path
    caption: str
    source: str


@dataclass(frozen=True)
class Scan:
    """A folder's items in a stable order, what should be said aloud, and files left out."""

    items: tuple[Item, ...]
    notes: tuple[str, ...]
    skipped: tuple[str, ...] = ()


def scan(folder: Path, *, metadata: Path | None = None, trigger_words: str = "") -> Scan:
    """The pictures of `folder` and of its direct sub-folders, with captions.

    Captions come from `metadata`, else metadata.csv or metadata.jsonl in the folder, else .txt or .caption files
    beside the pictures, else, when no picture has any, from file names. Raises DataError.
    """
    images = _images(folder)
    notes: list[str] = []
    captions = _from_metadata(folder, metadata, images, notes)
    for image in images:
        if image not in captions:
            sidecar = _sidecar(image)
            if sidecar is not None:
                captions[image] = sidecar
    if not captions:
        captions = {image: (_from_name(image), "file name") for image in images}
        example = images[0]
        notes.append(
            f"{folder}: no captions found, so file and folder names are used ({example.name} is "
            f'"{captions[example][0]}"); a metadata.csv with real captions trains better'
        )
    _refuse_gaps(folder, images, captions)
    items = [Item(image, with_trigger(captions[image][0], trigger_words), captions[image][1]) for image in images]
    return Scan(tuple(items), tuple(notes))


def with_trigger(caption: str, words: str) -> str:
    """`caption` led by `words`, unless it has them already."""
    words = words.strip()
    if not words or re.search(rf"(?<!\w){re.escape(words)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{words}, {caption}" if caption else words


def _images(folder: Path) -> list[Path]:
    if not folder.exists():
        raise DataError(f"{folder}: no such folder; expected pictures to train on")
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder of pictures, found a file")
    try:
        folders = [folder, *(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))]
        files = [entry for place in folders for entry in place.iterdir()]
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from None
    images = [
        entry
        for entry in files
        if entry.suffix.lower() in IMAGE_SUFFIXES and not entry.name.startswith(".") and entry.is_file()
    ]
    if not images:
        kinds = " ".join(sorted(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES))
        raise DataError(f"{folder}: expected pictures ({kinds}), found none among {len(files)} entries")
    return sorted(images, key=lambda image: image.relative_to(folder).as_posix())


def _from_metadata(
    folder: Path, metadata: Path | None, images: Sequence[Path], notes: list[str]
) -> dict[Path, tuple[str, str]]:
    found = metadata or next((folder / name for name in METADATA_NAMES if (folder / name).is_file()), None)
    if found is None:
        return {}
    rows, said = read_metadata(found)
    notes.extend(said)
    by_name = {image.relative_to(folder).as_posix(): image for image in images}
    missing, captions = [], {}
    for row in rows:
        image = by_name.get(_relative(found, row.number, row.file))
        if image is None:
            missing.append(f"line {row.number}: {row.file}")
        elif row.caption:
            captions[image] = (row.caption, found.name)
    if missing:
        raise DataError(
            f"{found}: {len(missing)} of {len(rows)} rows name pictures that are not in {folder} ({_few(missing)})"
        )
    return captions


def _relative(metadata: Path, number: int, file: str) -> str:
    """The normal form of a file name in a row, which must stay inside the folder. Raises DataError."""
    path = PurePosixPath(file.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and ":" in path.parts[0]) or "\0" in file:
        raise DataError(f"{metadata}, line {number}: expected a name inside the folder, found {file!r}")
    return path.as_posix()


def _sidecar(image: Path) -> tuple[str, str] | None:
    for suffix in SIDECARS:
        for beside in (image.with_suffix(suffix), image.with_name(image.name + suffix)):
            if beside.is_file():
                text, _ = decode(beside, read_bytes(beside))
                caption = " ".join(text.split())
                return (caption, beside.suffix) if caption else None
    return None


def _from_name(image: Path) -> str:
    words = re.sub(r"[\s_-]+", " ", re.sub(r"[\s_-]*\(?\d+\)?$", "", image.stem)).strip()
    if _CAMERA.match(image.stem) or not words:
        words = re.sub(r"[\s_-]+", " ", re.sub(r"^\d+_", "", image.parent.resolve().name)).strip()
    return words


def _refuse_gaps(folder: Path, images: Sequence[Path], captions: Mapping[Path, tuple[str, str]]) -> None:
    without = [image.relative_to(folder).as_posix() for image in images if image not in captions]
    if without:
        raise DataError(
            f"{folder}: {len(without)} of {len(images)} pictures have no caption ({_few(without)}); "
            "add a row or a .txt file for each, or take them out of the folder"
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
