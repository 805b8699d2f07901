"""Items by their folders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_trainer.dataset.items import Item


def by_folder(items: Sequence[Item]) -> dict[str, list[Item]]:
    """The items of each folder under its name, or as much of its path as tells it from the others."""
    groups: dict[Path, list[Item]] = {}
    for item in items:
        groups.setdefault(item.path.parent, []).append(item)
    return {_distinct(folder, groups): group for folder, group in groups.items()}


def _distinct(folder: Path, folders: Iterable[Path]) -> str:
    others = [other.parts for other in folders if other != folder]
    own = folder.parts
    length = next((n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others)), len(own))
    return "/".join(own[-length:])
