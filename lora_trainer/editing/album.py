"""A folder's pictures with their captions as they are in the files, to look through."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from lora_trainer.dataset.captions import MAX_FILE_BYTES, Row, clean, parse_metadata, posix
from lora_trainer.dataset.encodings import decode
from lora_trainer.dataset.items import METADATA_NAMES, SIDECARS, read_folder
from lora_trainer.editing.spans import tidy
from lora_trainer.editing.tags import same, tags_of
from lora_trainer.errors import DataError

MAX_PICTURES = 50_000


@dataclass(frozen=True)
class Picture:
    """A picture by its name in the folder, its caption as its file has it (several are lines), and that file."""

    name: str
    path: Path
    caption: str
    home: Path | None

    @cached_property
    def tags(self) -> Mapping[str, str]:
        """As written, by what makes them the same."""
        return {same(tag): tag for tag in reversed(tags_of(self.caption))}

    @cached_property
    def text(self) -> str:
        """What a search looks in."""
        return f"{self.name}\n{self.caption}".casefold()


@dataclass(frozen=True)
class Search:
    """Which pictures are looked for: all of `words` in name or caption, all of `tags`, without a caption."""

    words: str = ""
    tags: tuple[str, ...] = ()
    without: bool = False

    def finds(self, picture: Picture) -> bool:
        return (
            not (self.without and picture.caption)
            and all(word in picture.text for word in self.words.casefold().split())
            and all(same(tag) in picture.tags for tag in self.tags)
        )


@dataclass
class Album:
    """What `folder` holds. `files` are the caption files' bytes as they were read, which tell when one has changed,
    and `tables` the metadata files that take new rows, by the folder of the picture."""

    folder: Path
    metadata: Path | None
    pictures: dict[str, Picture]
    files: dict[Path, bytes]
    tables: Mapping[Path, Path]
    notes: tuple[str, ...] = ()
    from_names: bool = False

    def found(self, search: Search) -> list[Picture]:
        return [picture for picture in self.pictures.values() if search.finds(picture)]

    def new_home(self, picture: Picture) -> Path:
        """Where the caption of a picture goes that has none: a row of the metadata file if there is one."""
        if picture.home is not None:
            return picture.home
        table = self.metadata or self.tables.get(picture.path.parent)
        if table is not None:
            return table
        alone = self._stems[picture.path.with_suffix("")] == 1
        return picture.path.with_suffix(SIDECARS[0]) if alone else Path(f"{picture.path}{SIDECARS[0]}")

    def fitting(self, home: Path, name: str, caption: str) -> str:
        """`caption` as `home` can hold it: a row has one line, unless it has several already."""
        many = not self.in_table(home) or "\n" in self.pictures[name].caption
        return caption if many else clean(caption)

    def row_name(self, home: Path, picture: Picture) -> str:
        """The picture's name in rows of `home`."""
        place = self.folder if home == self.metadata else home.parent
        return _normal(picture.path.relative_to(place).as_posix())

    @cached_property
    def _stems(self) -> Counter[Path]:
        return Counter(picture.path.with_suffix("") for picture in self.pictures.values())

    def in_table(self, home: Path) -> bool:
        return home == self.metadata or home.name in METADATA_NAMES


def open_album(folder: Path, metadata: Path | None) -> Album:
    """Raises DataError where there are no pictures, and keeps what else is wrong as notes."""
    problems: list[str] = []
    contents = read_folder(folder, metadata=metadata, complain=lambda _, problem: problems.append(str(problem)))
    if not contents.images:
        raise DataError(problems[0] if problems else f"{folder}: expected pictures, found none")
    if len(contents.images) > MAX_PICTURES:
        raise DataError(f"{folder}: expected at most {MAX_PICTURES:,} pictures, found {len(contents.images):,}")
    tables = _tables((folder, *contents.layout.roots), {image.parent for image in contents.images})
    album = Album(folder, metadata, {}, {}, tables, tuple(problems), bool(contents.captions) and not contents.homes)
    reading = _Reading(album)
    for table in (metadata, *tables.values()):
        # A larger one is among the problems already.
        if table is not None and table.is_file() and table.stat().st_size <= MAX_FILE_BYTES:
            reading.bytes_of(table)
    for image in contents.images:
        name = image.relative_to(folder).as_posix()
        picture = Picture(name, image, "", contents.homes.get(image))
        album.pictures[name] = replace(picture, caption=reading.caption(picture)) if picture.home else picture
    return album


def _tables(roots: Sequence[Path], places: Iterable[Path]) -> dict[Path, Path]:
    """The metadata file for new rows about pictures in each of `places`: that of the first root, else nearer ones."""
    found = {}
    for place in places:
        above = [root for root in roots if place.is_relative_to(root)]
        names = [where / name for where in (*above, place) for name in METADATA_NAMES]
        table = next((name for name in names if name.is_file()), None)
        if table is not None:
            found[place] = table
    return found


def by_name(rows: Iterable[Row]) -> dict[str, Row]:
    """The rows by the picture that they name, as `Album.row_name` writes it."""
    return {_normal(posix(row.file)): row for row in rows}


def common(pictures: Sequence[Picture], most: int, *, rare: bool = False) -> list[tuple[str, int]]:
    """The tags that most of the pictures have, or the fewest, with their numbers."""
    counts: Counter[str] = Counter()
    written: dict[str, str] = {}
    for picture in pictures:
        counts.update(picture.tags.keys())
        for key, tag in picture.tags.items():
            written.setdefault(key, tag)
    order = sorted(counts.items(), key=lambda pair: (pair[1] if rare else -pair[1], pair[0]))
    return [(written[key], count) for key, count in order[:most]]


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


@dataclass
class _Reading:
    """The caption files of an album, each read once."""

    album: Album
    rows: dict[Path, dict[str, Row]] = field(default_factory=dict)

    def caption(self, picture: Picture) -> str:
        home = picture.home
        assert home is not None
        if not self.album.in_table(home):
            return tidy(decode(home, self.bytes_of(home))[0])
        if home not in self.rows:
            text = decode(home, self.bytes_of(home))[0]
            self.rows[home] = by_name(parse_metadata(home, text, [], lambda *_: None))
        return self.rows[home][self.album.row_name(home, picture)].caption

    def bytes_of(self, home: Path) -> bytes:
        if home not in self.album.files:
            try:
                self.album.files[home] = home.read_bytes()
            except OSError as error:
                raise DataError(f"{home}: cannot be read: {error.strerror}") from None
        return self.album.files[home]
