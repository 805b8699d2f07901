"""Where captions are read from and written to: a text file beside each picture, or one table."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from lora_trainer.dataset.captions import FILE_COLUMNS, TEXT_COLUMNS, posix, read_metadata, read_text
from lora_trainer.dataset.items import METADATA_NAMES, SIDECARS, STAND_INS, Contents, read_folder, sidecars
from lora_trainer.errors import ConfigError, DataError, printable
from lora_trainer.files import publish

TABLES = (".csv", ".jsonl")


class Book(Protocol):
    """The captions of a folder's `images`, those that are there and new ones."""

    images: tuple[Path, ...]
    place: Path

    def before(self, image: Path) -> str:
        """The caption that is there, or nothing."""
        ...

    def refusal(self, image: Path) -> str | None:
        """Why no caption can be written for `image`."""
        ...

    def put(self, image: Path, caption: str) -> None:
        """Raises OutputError."""
        ...

    def publish(self) -> None:
        """All that was put is on disk. Raises OutputError."""
        ...


def open_book(folder: Path, output: Path | None, *, overwrites: bool) -> tuple[Book, tuple[str, ...]]:
    """The captions of `folder`, and what should be said about them. With no `output`: in its own metadata.csv or
    .jsonl where there is one, else in .txt files.

    Raises DataError for what training could not read either, and where captions that `overwrites` is about stand in
    a file that would win over what is written.
    """
    found = next((folder / name for name in METADATA_NAMES if (folder / name).is_file()), None)
    output = output or found
    if output is None:
        contents = read_folder(folder)
        _refuse_hidden(folder, contents, overwrites)
        return Sidecars(folder, contents), _notes(contents)
    _refuse_output(output)
    # A training that finds the table by itself reads those of sub-folders too.
    by_itself = output.parent.resolve() == folder.resolve() and (
        output.name == found.name if found else output.name in METADATA_NAMES
    )
    if by_itself:
        contents = read_folder(folder)
        return Table(folder, contents, output), _notes(contents)

    def complain(place: Path, problem: DataError) -> None:
        if place != output or output.exists():
            raise problem

    contents = read_folder(folder, metadata=output, complain=complain)
    note = f"training finds these captions with metadata_path={output}"
    return Table(folder, contents, output), (*_notes(contents), note)


class Sidecars:
    """A .txt beside each picture, or the .caption that it has."""

    def __init__(self, folder: Path, contents: Contents) -> None:
        self.images, self.place = contents.images, folder
        self._captions = _known(contents)
        self._sharing = Counter(image.with_suffix("") for image in self.images)

    def before(self, image: Path) -> str:
        return self._captions.get(image, "")

    def refusal(self, image: Path) -> str | None:
        place = self._place(image)
        if self._sharing[image.with_suffix("")] > 1 and place.with_suffix("") == image.with_suffix(""):
            return f"{place.name} is the caption of several pictures; give each a name of its own"
        return None

    def put(self, image: Path, caption: str) -> None:
        publish(f"{caption}\n".encode(), self._place(image))
        self._captions[image] = caption

    def publish(self) -> None:
        """Each file was whole once it was put."""

    def _place(self, image: Path) -> Path:
        """The file that is read: the one with words, else one that is there, else a new one. A new one for one of
        two pictures of the same name (a.png, a.jpg) is called after all of it (a.png.txt)."""
        there = [place for place in sidecars(image) if place.is_file()]
        shared = self._sharing[image.with_suffix("")] > 1
        full = [place for place in there if place.stat().st_size and read_text(place)[0].strip()]
        empty = [place for place in there if not (shared and place.with_suffix("") == image.with_suffix(""))]
        new = Path(f"{image}{SIDECARS[0]}") if shared else image.with_suffix(SIDECARS[0])
        return next(iter((*full, *empty)), new)


class Table:
    """A metadata.csv or .jsonl, whose rows name pictures relative to the folder. Rows that are there keep their words,
    and those of JSON what else they hold."""

    def __init__(self, folder: Path, contents: Contents, place: Path) -> None:
        self.images, self.place, self._folder = contents.images, place, folder
        self._captions = _known(contents)
        self._rows = _rows(place) if place.exists() else {}
        self._changed = False

    def before(self, image: Path) -> str:
        return self._captions.get(image, "")

    def refusal(self, image: Path) -> str | None:
        return None

    def put(self, image: Path, caption: str) -> None:
        name = image.relative_to(self._folder).as_posix()
        row = self._rows.setdefault(_normal(name), {"file_name": name})
        row[next((column for column in TEXT_COLUMNS if column in row), "text")] = caption
        self._captions[image] = caption
        self._changed = True

    def publish(self) -> None:
        if not self._changed:
            return
        is_json = self.place.suffix.lower() == ".jsonl"
        publish((_jsonl(self._rows) if is_json else _csv(self._rows)).encode(), self.place)
        self._changed = False


def _known(contents: Contents) -> dict[Path, str]:
    """Names of files and folders are no captions."""
    return {image: text for image, (text, source) in contents.captions.items() if source not in STAND_INS}


def _notes(contents: Contents) -> tuple[str, ...]:
    """Without the last one where names or concepts serve as captions: that is about to change."""
    stands_in = any(source in STAND_INS for _, source in contents.captions.values())
    return contents.notes[:-1] if stands_in else contents.notes


def _refuse_hidden(folder: Path, contents: Contents, overwrites: bool) -> None:
    hidden = [image for image, (_, source) in contents.captions.items() if source not in (*SIDECARS, *STAND_INS)]
    if overwrites and hidden:
        raise DataError(
            f"{folder}: the captions of {len(hidden)} pictures stand in a {contents.captions[hidden[0]][1]} of a "
            f"sub-folder, which wins over text files; expected --output {folder / METADATA_NAMES[0]}"
        )


def _refuse_output(output: Path) -> None:
    if output.suffix.lower() not in TABLES:
        raise ConfigError([f"output: expected a name that ends in {' or '.join(TABLES)}, found {output.name}"])
    if output.exists() and not output.is_file():
        raise ConfigError([f"output: expected a file, found a folder or a device: {output}"])


def _rows(place: Path) -> dict[str, dict[str, object]]:
    """What a table holds, by the pictures' names. Raises DataError where writing it again would lose something."""
    rows, _ = read_metadata(place)
    text, _ = read_text(place)
    if place.suffix.lower() != ".jsonl":
        first = next(line for line in text.splitlines() if line.strip())
        columns = [name.strip(' "\ufeff').lower() for name in re.split("[,;\t]", first)]
        others = set(columns) - {*FILE_COLUMNS, *TEXT_COLUMNS, ""}
        if set(columns) & {*FILE_COLUMNS} and set(columns) & {*TEXT_COLUMNS} and others:
            named = printable(", ".join(sorted(others)), 100)
            raise DataError(f"{place}: expected no columns but names and captions, found {named}; use another output")
        return {_normal(row.file): {"file_name": row.file, "text": row.caption} for row in rows}
    entries = [json.loads(line) for line in text.split("\n") if line.strip()]
    return {_normal(row.file): entry for row, entry in zip(rows, entries, strict=True)}


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", posix(name))


def _csv(rows: Mapping[str, Mapping[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("file_name", "text"))
    writer.writerows((row["file_name"], row["text"]) for row in rows.values())
    return text.getvalue()


def _jsonl(rows: Mapping[str, Mapping[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values())
