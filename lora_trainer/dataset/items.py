"""A folder of pictures with their captions."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lora_trainer.dataset.captions import clean, posix, read_metadata, read_text, refuse_long
from lora_trainer.dataset.images import IMAGE_SUFFIXES
from lora_trainer.errors import DataError

METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
SIDECARS = (".txt", ".caption")
# Pictures of kinds that are not read, which it would be wrong to pass over in silence.
OTHER_PICTURES = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".svg", ".tga", ".dng", ".cr2", ".nef")
# Names that cameras and programs give say nothing about the picture: IMG_0001, DSC1234, 20240101_120000, a hash.
_NAMELESS = re.compile(
    r"(img|mvimg|dsc[fn]?|pxl|p|image|photo|pic|screenshot|download|file|untitled|mmexport|微信图片)?[\d\s_().-]*"
    r"|whatsapp image .*|(?=.*\d)[0-9a-f-]{16,}",
    re.IGNORECASE,
)

Captions = dict[Path, tuple[str, str]]
"""Of each picture its caption and where that comes from."""


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
    skipped: tuple[str, ...]


def scan(folder: Path, *, metadata: Path | None = None, trigger_words: str = "") -> Scan:
    """The pictures of `folder` and of its direct sub-folders, with captions.

    Captions come from `metadata`, else metadata.csv or metadata.jsonl in the folder and sub-folders; where those
    have none for a picture, from a .txt or .caption file beside it; when no picture has any, from file names.
    Raises DataError.
    """
    files, skipped = _files(folder)
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        kinds = " ".join(sorted(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES))
        raise DataError(f"{folder}: expected pictures ({kinds}), found none among {len(files)} files")
    notes: list[str] = []
    captions = _from_metadata(folder, metadata, images, notes)
    _add_sidecars(captions, images, notes)
    if not captions:
        captions = {image: (_from_name(image), "file name") for image in images}
        notes.append(
            f"{folder}: no captions found, so file and folder names are used ({images[0].name} is "
            f'"{captions[images[0]][0]}"); a metadata.csv with real captions trains better'
        )
    _refuse_gaps(folder, images, captions)
    items = [Item(image, with_trigger(captions[image][0], trigger_words), captions[image][1]) for image in images]
    others = [file for file in files if file.suffix.lower() in OTHER_PICTURES]
    skipped += [f"{file}: {file.suffix} pictures are not read; save it as PNG or JPEG" for file in others]
    return Scan(tuple(items), tuple(notes), tuple(skipped))


def with_trigger(caption: str, words: str) -> str:
    """`caption` led by `words`, unless it has them already."""
    words = words.strip(" ,")
    if not words or re.search(rf"(?<!\w){re.escape(words)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{words}, {caption}" if caption else words


def _files(folder: Path) -> tuple[list[Path], list[str]]:
    """The visible files of `folder` and its direct sub-folders, in an order that no locale changes; and those
    left out because their names are no text, so that no log or caption could hold them."""
    try:
        if not folder.exists():
            raise DataError(f"{folder}: no such folder; expected pictures to train on")
        if not folder.is_dir():
            raise DataError(f"{folder}: expected a folder of pictures, found a file")
        visible = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
        below = [file for entry in visible if entry.is_dir() for file in entry.iterdir()]
        files = [file for file in (*visible, *below) if file.is_file() and not file.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{error.filename or folder}: cannot be read: {error.strerror}") from None
    named = {file.relative_to(folder).as_posix(): file for file in files}
    shown = {name: name.encode(errors="backslashreplace").decode() for name in sorted(named)}
    skipped = [f"{folder}: {text}: the file's name is not Unicode" for name, text in shown.items() if text != name]
    return [named[name] for name, text in shown.items() if text == name], skipped


def _from_metadata(folder: Path, metadata: Path | None, images: Sequence[Path], notes: list[str]) -> Captions:
    if metadata is not None:
        return _from_rows(folder, metadata, images, notes)
    captions: Captions = {}
    # The folder's own file comes last, so that it overrides those of its sub-folders.
    for place in sorted({folder, *(image.parent for image in images)}, reverse=True):
        found = next((place / name for name in METADATA_NAMES if (place / name).is_file()), None)
        if found is not None:
            captions |= _from_rows(place, found, images, notes)
    return captions


def _from_rows(folder: Path, metadata: Path, images: Sequence[Path], notes: list[str]) -> Captions:
    """The captions of `metadata`, whose rows name pictures relative to `folder`."""
    rows, said = read_metadata(metadata)
    notes.extend(said)
    inside = [image for image in images if image.is_relative_to(folder)]
    by_name = {_normal(image.relative_to(folder).as_posix()): image for image in inside}
    missing, captions = [], {}
    for row in rows:
        image = by_name.get(_normal(_inside(metadata, row.number, row.file)))
        if image is None:
            missing.append(f"line {row.number}: {row.file}")
        elif row.caption:
            captions[image] = (row.caption, metadata.name)
    if missing:
        count = f"{len(missing)} of {len(rows)} rows"
        raise DataError(f"{metadata}: {count} name pictures that are not in {folder} ({_few(missing)})")
    return captions


def _normal(name: str) -> str:
    """macOS writes accents and kana marks as characters of their own, other systems do not."""
    return unicodedata.normalize("NFC", name)


def _inside(metadata: Path, number: int, file: str) -> str:
    """The file name of a row, relative to the folder it must stay in. Raises DataError."""
    path = PurePosixPath(posix(file))
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", file):
        raise DataError(f"{metadata}, line {number}: expected a name inside the folder, found {file}")
    return path.as_posix()


def _add_sidecars(captions: Captions, images: Sequence[Path], notes: list[str]) -> None:
    """Fill the gaps of `captions` from the text files beside the pictures."""
    for image in images:
        places = [place for suffix in SIDECARS for place in (image.with_suffix(suffix), Path(f"{image}{suffix}"))]
        for place in places:
            if image in captions or not place.is_file():
                continue
            text, encoding = read_text(place)
            if encoding != "UTF-8":
                notes.append(f"{place.name}: read as {encoding}")
            if text.strip():
                refuse_long(str(place), text)
                captions[image] = (clean(text), place.suffix)


def _from_name(image: Path) -> str:
    """The words of a file name without its number, or the folder's name where it has none."""
    words = re.sub(r"[\s_-]*\(?\d+\)?$", "", re.sub(r"^\d+[\s_-]+", "", image.stem))
    if _NAMELESS.fullmatch(image.stem) or not words:
        words = re.sub(r"^\d+_", "", image.absolute().parent.name)
    return clean(re.sub(r"[_-]+", " ", words))


def _refuse_gaps(folder: Path, images: Sequence[Path], captions: Mapping[Path, tuple[str, str]]) -> None:
    without = [image.relative_to(folder).as_posix() for image in images if image not in captions]
    if without:
        raise DataError(
            f"{folder}: {len(without)} of {len(images)} pictures have no caption ({_few(without)}); "
            "add a row or a .txt file for each, or take them out of the folder"
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
