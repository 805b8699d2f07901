"""Folders named one by one, as one train_data_dir with concepts in it."""

from __future__ import annotations

import ntpath
import posixpath
from typing import Any

from lora_trainer.config.convert import Problem, convert
from lora_trainer.config.options import options, options_of
from lora_trainer.config.schema import Concept
from lora_trainer.imports.taken import Taken


def take_concepts(taken: Taken, entries: list[tuple[str, dict[str, Any]]]) -> None:
    """`entries` are (source key, concept); a folder that comes again is left."""
    concepts: dict[str, dict[str, Any]] = {}
    for source, concept in entries:
        folder = concept["folder"]
        again = concepts.setdefault(_rules([folder]).normpath(folder), concept) is not concept
        if again:
            sizes = "; extra_resolutions shows pictures at other sizes too" if "extra_resolutions" in options() else ""
            taken.leave(source, folder, f"the same folder again: a picture belongs to one concept{sizes}")
    if not concepts:
        return
    home = _common([concept["folder"] for concept in concepts.values()])
    inside = [{**concept, "folder": _relative(concept["folder"], home)} for concept in concepts.values()]
    taken.take("train_data_dir", home, "image_dir")
    if inside != [{"folder": "."}]:
        taken.take("concepts", inside, "image_dir")


def concept_of(taken: Taken, folder: str, values: dict[str, tuple[str, object]]) -> dict[str, Any]:
    """A concept of `folder` and of what is allowed in `values` (field: source key, value) and not the default."""
    fields, concept = options_of(Concept), {"folder": folder}
    for field, (source, value) in values.items():
        try:
            converted = convert(fields[field], value)
        except Problem as problem:
            taken.leave(source, value, str(problem))
            continue
        if converted != fields[field].default:
            concept[field] = converted
    return concept


def _common(folders: list[str]) -> str:
    """The folder that all are in, or of one itself; the current one where there is none."""
    path = _rules(folders)
    if len(folders) == 1:
        return folders[0]
    try:
        return path.commonpath(folders) or "."
    except ValueError:  # several drives, or absolute beside relative
        return "."


def _relative(folder: str, home: str) -> str:
    path = _rules([folder, home])
    if home == "." or folder == home:
        return folder if home == "." else "."
    return path.relpath(folder, home).replace("\\", "/") if path is ntpath else path.relpath(folder, home)


def _rules(folders: list[str]) -> Any:
    """Windows' or the other systems' way to write paths, whatever system this is."""
    windows = any("\\" in folder or folder[1:2] == ":" for folder in folders)
    return ntpath if windows else posixpath
