"""Which folders of a data set belong to a run, how often an epoch sees their pictures, and what their names say.

Told by the settings (`concepts`), or by the names of sub-folders: `10_name class` as kohya's trainer has them (each
picture 10 times an epoch; `name class` is the caption of those that have none), or `train` beside `validation` and
`test` as in Hugging Face's imagefolder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_trainer.config.schema import MAX_REPEATS, Concept
from lora_trainer.dataset.images import is_picture
from lora_trainer.errors import printable

# Hugging Face's words for the splits of a data set (datasets/data_files.py).
_TRAIN = ("train", "training")
_OTHER_SPLITS = ("validation", "valid", "dev", "val", "test", "testing", "eval", "evaluation")
_NUMBERED = re.compile(r"(\d{1,6})_(.*)", re.DOTALL)


@dataclass(frozen=True)
class Layout:
    """`roots` are read with their direct sub-folders; `concepts` hold of the pictures in a folder, those of the
    nearest one, and `notes` are to be said aloud. With `partial`, caption files may also name pictures left out."""

    roots: tuple[Path, ...]
    concepts: Mapping[Path, Concept] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    partial: bool = False

    def home(self, picture: Path) -> Path | None:
        """The folder of a picture's concept; None where nothing was said."""
        return next((place for place in picture.parents if place in self.concepts), None)

    def concept(self, picture: Path) -> Concept:
        """What holds of a picture."""
        home = self.home(picture)
        return _PLAIN if home is None else self.concepts[home]


_PLAIN = Concept(folder=".")


def layout(folder: Path, concepts: Sequence[Concept] = ()) -> Layout:
    """How `folder` is read: as `concepts` say, else as its sub-folders' names do. Nothing in it is opened."""
    if concepts:
        places = {folder / concept.folder: concept for concept in concepts}
        return Layout(tuple(places), places, partial=True)
    folders, loose = _listed(folder)
    split = [place for place in folders if place.name.lower() in _TRAIN]
    if len(split) == 1 and not loose and all(place.name.lower() in (*_TRAIN, *_OTHER_SPLITS) for place in folders):
        others = [place.name for place in folders if place not in split]
        if others:
            note = f"{folder}: only {split[0].name} is trained on; {_listing(others)} can be the validation_data_dir"
            return Layout((split[0],), notes=(printable(note),), partial=True)
        return Layout((split[0],))
    with_pictures = [place for place in folders if _listed(place)[1]]
    return _numbered(folder, with_pictures, loose=loose)


def described(counts: Iterable[tuple[str, int, int]]) -> str:
    """One line about (name, pictures, repeats) of each concept: `castle 4 × 10, knight 20 × 1: 60 of 24 pictures`."""
    parts = list(counts)
    listed = _listing([f"{name} {pictures} × {repeats}" for name, pictures, repeats in parts])
    total = sum(pictures * repeats for _, pictures, repeats in parts)
    return f"{listed}: an epoch sees {sum(pictures for _, pictures, _ in parts):,} pictures {total:,} times in all"


def _numbered(folder: Path, with_pictures: Sequence[Path], *, loose: bool) -> Layout:
    """kohya's form, where all sub-folders with pictures have it (library/config_util.py of sd-scripts)."""
    read = {place: numbered(place.name) for place in with_pictures}
    found = {place: concept for place, concept in read.items() if concept is not None}
    if not found:
        return Layout((folder,))
    if len(found) < len(read):
        others = _listing([place.name for place, concept in read.items() if concept is None])
        first = next(iter(found)).name
        note = f"{folder}: numbers such as that of {first} repeat no pictures, since {others} has none"
        return Layout((folder,), notes=(printable(note),))
    told = _listing([f"{concept.repeats} × {place.name}" for place, concept in found.items()])
    note = f"{folder}: an epoch repeats the pictures of folders as their names say: {told}"
    if loose:
        note += "; those in no sub-folder once"
    return Layout((folder,), found, (printable(note),))


def numbered(name: str) -> Concept | None:
    """What a folder's name says in kohya's form; None where it does not have it."""
    match = _NUMBERED.fullmatch(name)
    if match is None or not 1 <= int(match[1]) <= MAX_REPEATS:
        return None
    return Concept(folder=name, repeats=int(match[1]), caption=" ".join(match[2].replace("_", " ").split()))


def _listed(place: Path) -> tuple[list[Path], bool]:
    """The visible folders in `place`, in a stable order, and whether there are pictures. Whoever reads the folder
    tells why it cannot be listed."""
    folders, pictures = [], False
    try:
        for entry in place.iterdir():
            if entry.name.startswith("."):
                continue
            if is_picture(entry) and entry.is_file():
                pictures = True
            elif entry.is_dir():
                folders.append(entry)
    except OSError:
        pass
    return sorted(folders, key=lambda entry: entry.name), pictures


def _listing(names: Sequence[str], most: int = 8) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")
