"""A folder of pictures with their captions."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lora_trainer.dataset.captions import (
    Complain,
    clean,
    clean_lines,
    posix,
    read_metadata,
    read_text,
    refuse_long,
    stop,
)
from lora_trainer.dataset.images import IMAGE_SUFFIXES
from lora_trainer.errors import DataError

METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
SIDECARS = (".txt", ".caption")
FROM_NAME = "file name"
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
    """A picture file and its caption; several are lines. `source` says where they came from, `weight` how much the
    picture counts."""

    path: Path
    caption: str
    source: str
    weight: float = 1.0


@dataclass(frozen=True)
class Contents:
    """What a folder holds, as training reads it. `empty` are pictures with a caption file or row that has no words,
    `deeper` are folders further down, which are not read, and `unnamed` files whose names are no text. `weights` are
    those of rows."""

    images: tuple[Path, ...]
    captions: Captions
    empty: frozenset[Path]
    others: tuple[Path, ...]
    deeper: tuple[Path, ...]
    unnamed: tuple[str, ...]
    notes: tuple[str, ...]
    weights: Mapping[Path, float]


@dataclass(frozen=True)
class Scan:
    """A folder's items in a stable order, what should be said aloud, and files left out."""

    items: tuple[Item, ...]
    notes: tuple[str, ...]
    skipped: tuple[str, ...]


def scan(folder: Path, *, metadata: Path | None = None, trigger_words: str = "", lines: bool = False) -> Scan:
    """The pictures of `folder` and of its direct sub-folders, with captions.

    Captions come from `metadata`, else metadata.csv or metadata.jsonl in the folder and sub-folders; where those
    have none for a picture, from a .txt or .caption file beside it, with `lines` each line a caption of its own; when
    no picture has any, from file names. Raises DataError.
    """
    found = read_folder(folder, metadata=metadata, lines=lines)
    _refuse_gaps(folder, found.images, found.captions)
    skipped = [f"{folder}: {text}: the file's name is not Unicode" for text in found.unnamed]
    others = [file for file in found.others if file.suffix.lower() in OTHER_PICTURES]
    skipped += [f"{file}: {file.suffix} pictures are not read; save it as PNG or JPEG" for file in others]
    captions = [found.captions[image] for image in found.images]
    items = [
        Item(image, _each_with_trigger(caption, trigger_words), source, found.weights.get(image, 1.0))
        for image, (caption, source) in zip(found.images, captions, strict=True)
    ]
    return Scan(tuple(items), found.notes, tuple(skipped))


def read_folder(
    folder: Path, *, metadata: Path | None = None, complain: Complain = stop, lines: bool = False
) -> Contents:
    """As `scan`, with gaps. What stops a training is told to `complain`; where that returns, the rest is read.

    Raises DataError when there is no such folder.
    """
    files, deeper, unnamed = _files(folder, complain)
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        kinds = " ".join(sorted(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES))
        complain(folder, DataError(f"{folder}: expected pictures ({kinds}), found none among {len(files)} files"))
    reading = _Reading(folder, images, complain)
    reading.add_metadata(metadata)
    reading.add_sidecars(clean_lines if lines else clean)
    if images and not reading.captions:
        reading.add_names()
    others = [file for file in files if file.suffix.lower() not in IMAGE_SUFFIXES]
    empty, notes = frozenset(reading.empty), tuple(reading.notes)
    return Contents(
        tuple(images), reading.captions, empty, tuple(others), tuple(deeper), tuple(unnamed), notes, reading.weights
    )


def nameless(text: str) -> bool:
    """Whether a camera or program gave this name, so that it says nothing about the picture."""
    return _NAMELESS.fullmatch(text) is not None


def with_trigger(caption: str, words: str) -> str:
    """`caption` led by `words`, unless it has them already."""
    words = words.strip(" ,")
    if not words or re.search(rf"(?<!\w){re.escape(words)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{words}, {caption}" if caption else words


def _each_with_trigger(caption: str, words: str) -> str:
    return "\n".join(with_trigger(line, words) for line in caption.split("\n"))


def _files(folder: Path, complain: Complain) -> tuple[list[Path], list[Path], list[str]]:
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


class _Reading:
    """The captions of a folder's pictures, found source by source."""

    def __init__(self, folder: Path, images: Sequence[Path], complain: Complain) -> None:
        self.folder, self.images, self.complain = folder, images, complain
        self.captions: Captions = {}
        self.empty: set[Path] = set()
        self.weights: dict[Path, float] = {}
        self.notes: list[str] = []

    def add_metadata(self, metadata: Path | None) -> None:
        if metadata is not None:
            self._add_rows(self.folder, metadata)
            return
        # The folder's own file comes last, so that it overrides those of its sub-folders.
        for place in sorted({self.folder, *(image.parent for image in self.images)}, reverse=True):
            found = next((place / name for name in METADATA_NAMES if (place / name).is_file()), None)
            if found is not None:
                self._add_rows(place, found)

    def _add_rows(self, place: Path, metadata: Path) -> None:
        """The captions of `metadata`, whose rows name pictures relative to `place`."""
        try:
            rows, said = read_metadata(metadata, self.complain)
        except DataError as problem:
            self.complain(metadata, problem)
            return
        self.notes.extend(said)
        inside = [image for image in self.images if image.is_relative_to(place)]
        by_name = {_normal(image.relative_to(place).as_posix()): image for image in inside}
        missing = []
        for row in rows:
            try:
                image = by_name.get(_normal(_inside(metadata, row.number, row.file)))
            except DataError as problem:
                self.complain(metadata, problem)
                continue
            if image is None:
                missing.append(f"line {row.number}: {row.file}")
            elif row.caption:
                self.captions[image] = (row.caption, metadata.name)
            else:
                self.empty.add(image)
            if image is not None:
                self.weights[image] = row.weight
        if missing:
            count = f"{len(missing)} of {len(rows)} rows"
            problem = DataError(f"{metadata}: {count} name pictures that are not in {place} ({_few(missing)})")
            self.complain(metadata, problem)

    def add_sidecars(self, tidy: Callable[[str], str]) -> None:
        """Fill the gaps from the text files beside the pictures; `tidy` makes captions of texts."""
        for image in self.images:
            for place in sidecars(image):
                if image in self.captions or not place.is_file():
                    continue
                try:
                    text, encoding = read_text(place)
                    if text.strip():
                        refuse_long(str(place), text)
                except DataError as problem:
                    self.complain(place, problem)
                    continue
                if encoding != "UTF-8":
                    self.notes.append(f"{place.name}: read as {encoding}")
                if text.strip():
                    self.captions[image] = (tidy(text), place.suffix)
                else:
                    self.empty.add(image)

    def add_names(self) -> None:
        """Better than nothing, and said aloud."""
        self.captions = {image: (_from_name(image), FROM_NAME) for image in self.images}
        first = self.images[0]
        self.notes.append(
            f"{self.folder}: no captions found, so file and folder names are used ({first.name} is "
            f'"{self.captions[first][0]}"); a metadata.csv with real captions trains better'
        )


def sidecars(image: Path) -> list[Path]:
    """The text files that may hold the caption of `image`."""
    return [place for suffix in SIDECARS for place in (image.with_suffix(suffix), Path(f"{image}{suffix}"))]


def _normal(name: str) -> str:
    """macOS writes accents and kana marks as characters of their own, other systems do not."""
    return unicodedata.normalize("NFC", name)


def _inside(metadata: Path, number: int, file: str) -> str:
    """The file name of a row, relative to the folder it must stay in. Raises DataError."""
    path = PurePosixPath(posix(file))
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", file):
        raise DataError(f"{metadata}, line {number}: expected a name inside the folder, found {file}")
    return path.as_posix()


def _from_name(image: Path) -> str:
    """The words of a file name without its number, or the folder's name where it has none."""
    words = re.sub(r"[\s_-]*\(?\d+\)?$", "", re.sub(r"^\d+[\s_-]+", "", image.stem))
    if nameless(image.stem) or not words:
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
