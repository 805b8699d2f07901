"""A folder of pictures with their captions."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_trainer.config.schema import Concept
from lora_trainer.dataset.captions import (
    Complain,
    clean,
    clean_lines,
    posix,
    read_metadata,
    read_text,
    refuse_long,
    relative,
    stop,
)
from lora_trainer.dataset.concepts import Layout, layout
from lora_trainer.dataset.folders import files_of
from lora_trainer.dataset.images import IMAGE_SUFFIXES, is_picture
from lora_trainer.errors import DataError, printable

METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
PARQUET = "metadata.parquet"
SIDECARS = (".txt", ".caption")
FROM_NAME, FROM_CONCEPT = "file name", "concept"
# Sources of captions that nobody wrote for the picture.
STAND_INS = (FROM_NAME, FROM_CONCEPT)
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
    """A picture file and its caption; several are lines. `source` says where they came from. An epoch sees it `repeats`
    times, and its loss counts `weight` times. `mask` is the file that tells which part of it counts, itself where
    transparency does. `prior`: nothing is learned from it. `original`: the picture before the change."""

    path: Path
    caption: str
    source: str
    repeats: int = 1
    weight: float = 1.0
    mask: Path | None = None
    prior: bool = False
    original: Path | None = None


@dataclass(frozen=True)
class Contents:
    """What a folder holds, as training reads it. `empty` are pictures with a caption file or row that has no words,
    `deeper` are folders further down, which are not read, and `unnamed` files whose names are no text. `layout` tells
    which concept a picture belongs to, `weights` are those of rows, and `homes` which file holds its caption, be it
    empty."""

    images: tuple[Path, ...]
    captions: Captions
    empty: frozenset[Path]
    others: tuple[Path, ...]
    deeper: tuple[Path, ...]
    unnamed: tuple[str, ...]
    notes: tuple[str, ...]
    layout: Layout
    weights: Mapping[Path, float]
    homes: Mapping[Path, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Scan:
    """A folder's items in a stable order, what should be said aloud, and files left out."""

    items: tuple[Item, ...]
    notes: tuple[str, ...]
    skipped: tuple[str, ...]


def scan(
    folder: Path,
    *,
    metadata: Path | None = None,
    trigger_words: str = "",
    concepts: Sequence[Concept] = (),
    lines: bool = False,
) -> Scan:
    """The pictures of `folder` and of its direct sub-folders, with captions; or those of the folders in `concepts`.

    Captions come from `metadata`, else metadata.csv or metadata.jsonl in the folder and sub-folders; where those
    have none for a picture, from a .txt or .caption file beside it, with `lines` each line a caption of its own; else
    from its concept; when no picture has any, from file names. Raises DataError.
    """
    found = read_folder(folder, metadata=metadata, concepts=concepts, lines=lines)
    _refuse_gaps(folder, found.images, found.captions)
    skipped = [f"{folder}: {text}: the file's name is not Unicode" for text in found.unnamed]
    others = [file for file in found.others if file.suffix.lower() in OTHER_PICTURES]
    skipped += [f"{file}: {file.suffix} pictures are not read; save it as PNG or JPEG" for file in others]
    items = [_item(found, image, trigger_words) for image in found.images]
    return Scan(tuple(items), found.notes, tuple(skipped))


def _item(found: Contents, image: Path, trigger_words: str) -> Item:
    (caption, source), concept = found.captions[image], found.layout.concept(image)
    words = trigger_words if concept.trigger_words is None else concept.trigger_words
    led = "\n".join(with_trigger(line, words) for line in caption.split("\n"))
    return Item(image, led, source, concept.repeats, found.weights.get(image, 1.0))


def read_folder(
    folder: Path,
    *,
    metadata: Path | None = None,
    concepts: Sequence[Concept] = (),
    complain: Complain = stop,
    lines: bool = False,
) -> Contents:
    """As `scan`, with gaps. What stops a training is told to `complain`; where that returns, the rest is read.

    Raises DataError when there is no such folder.
    """
    plan = layout(folder, concepts)
    read = [files_of(root, complain) for root in plan.roots]
    files, deeper, unnamed = (
        list(dict.fromkeys(entry for part in parts for entry in part)) for parts in zip(*read, strict=True)
    )
    images = [file for file in files if is_picture(file)]
    if not images:
        kinds = " ".join(sorted(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES))
        complain(folder, DataError(f"{folder}: expected pictures ({kinds}), found none among {len(files)} files"))
    reading = _Reading(folder, images, complain, plan)
    reading.add_metadata(metadata)
    reading.add_sidecars(clean_lines if lines else clean)
    reading.add_words()
    if images and not reading.captions:
        reading.add_names()
    others = [file for file in files if file.suffix.lower() not in IMAGE_SUFFIXES]
    empty, notes = frozenset(reading.empty), tuple(reading.notes)
    rest = (tuple(others), tuple(deeper), tuple(unnamed), notes, plan, reading.weights, reading.homes)
    return Contents(tuple(images), reading.captions, empty, *rest)


def nameless(text: str) -> bool:
    """Whether a camera or program gave this name, so that it says nothing about the picture."""
    return _NAMELESS.fullmatch(text) is not None


def with_trigger(caption: str, words: str) -> str:
    """`caption` led by `words`, unless it has them already."""
    words = words.strip(" ,")
    if not words or re.search(rf"(?<!\w){re.escape(words)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{words}, {caption}" if caption else words


class _Reading:
    """The captions of a folder's pictures, found source by source."""

    def __init__(self, folder: Path, images: Sequence[Path], complain: Complain, plan: Layout) -> None:
        self.folder, self.images, self.complain, self.plan = folder, images, complain, plan
        self.captions: Captions = {}
        self.empty: set[Path] = set()
        self.weights: dict[Path, float] = {}
        self.homes: dict[Path, Path] = {}
        self.notes: list[str] = list(plan.notes)

    def add_metadata(self, metadata: Path | None) -> None:
        if metadata is not None:
            self._add_rows(self.folder, metadata)
            return
        # The folder's own file comes last, so that it overrides those of its sub-folders.
        for place in sorted({self.folder, *self.plan.roots, *(image.parent for image in self.images)}, reverse=True):
            found = next((place / name for name in METADATA_NAMES if (place / name).is_file()), None)
            if found is not None:
                self._add_rows(place, found)
            elif (place / PARQUET).is_file():
                wanted = "expected captions as metadata.csv or metadata.jsonl, found Parquet, which is not read"
                self.complain(place / PARQUET, DataError(f"{place / PARQUET}: {wanted}; save it as one of those"))

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
                image = by_name.get(_normal(relative(metadata, row.number, row.file)))
            except DataError as problem:
                self.complain(metadata, problem)
                continue
            if image is None and self.plan.partial and os.path.isfile(place / posix(row.file)):
                continue
            if image is None:
                missing.append(f"line {row.number}: {row.file}")
            elif row.caption:
                self.captions[image] = (row.caption, metadata.name)
                self.homes[image] = metadata
            else:
                self.empty.add(image)
                self.homes.setdefault(image, metadata)
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
                    self.homes[image] = place
                else:
                    self.empty.add(image)
                    self.homes.setdefault(image, place)

    def add_words(self) -> None:
        """What concepts say of pictures that have no caption of their own."""
        words = {image: self.plan.concept(image).caption for image in self.images if image not in self.captions}
        words = {image: clean(text) for image, text in words.items() if text.strip()}
        self.captions |= {image: (text, FROM_CONCEPT) for image, text in words.items()}
        if words:
            count = f"{len(words)} of {len(self.images)} pictures have no caption of their own"
            listed = _few([f'"{text}"' for text in dict.fromkeys(words.values())])
            self.notes.append(printable(f"{self.folder}: {count}: they get that of their concept, {listed}"))

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


def _from_name(image: Path) -> str:
    """The words of a file name without its number, or the folder's name where it has none."""
    words = re.sub(r"[\s_-]*\(?\d+\)?$", "", re.sub(r"^\d+[\s_-]+", "", image.stem))
    if nameless(image.stem) or not words:
        words = re.sub(r"^\d+_", "", image.absolute().parent.name)
    return clean(re.sub(r"[_-]+", " ", words))


def _refuse_gaps(folder: Path, images: Sequence[Path], captions: Mapping[Path, tuple[str, str]]) -> None:
    without = [_shown(image, folder) for image in images if image not in captions]
    if without:
        raise DataError(
            f"{folder}: {len(without)} of {len(images)} pictures have no caption ({_few(without)}); "
            "add a row or a .txt file for each, or take them out of the folder"
        )


def _shown(image: Path, folder: Path) -> str:
    return image.relative_to(folder).as_posix() if image.is_relative_to(folder) else str(image)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
