"""Pairs of pictures before and after a change: two folders whose files bear the same names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora_trainer.dataset.captions import stop
from lora_trainer.dataset.folders import files_of
from lora_trainer.dataset.images import is_picture
from lora_trainer.dataset.items import Item
from lora_trainer.dataset.samples import Prepared, Sample
from lora_trainer.errors import DataError


def with_originals(items: Sequence[Item], home: Path, folder: Path, *, whole: bool) -> tuple[Item, ...]:
    """`items` of `home` with their originals in `folder`: the file of the same name, or if there is none the only one
    that differs in its ending. Where `items` are the `whole` of `home`, every original must have its item. Raises
    DataError."""
    found = {_name(path, folder): path for path in files_of(folder, stop)[0] if is_picture(path)}
    if not found:
        raise DataError(f"original_data_dir: expected the pictures before the change in {folder}, found none")
    paired = tuple(replace(item, original=_original(_name(item.path, home), found)) for item in items)
    lonely = [item.path for item in paired if item.original is None]
    if lonely:
        raise DataError(f"original_data_dir: {folder} has no picture of the same name for {_few(lonely, len(items))}")
    spare = sorted(set(found.values()) - {item.original for item in paired})
    if spare and whole:
        raise DataError(f"original_data_dir: {home} has no picture of the same name for {_few(spare, len(found))}")
    return paired


def flat(items: Sequence[Item]) -> list[Item]:
    """Each item, and after it its original as one of its own, with the same caption."""
    both = ((item, replace(item, path=item.original, original=None)) for item in items)
    return [item for pair in both for item in pair]


def joined(prepared: Prepared) -> Prepared:
    """What preparing `flat` items gave, each original beside its picture. A pair of which one could not be used is left
    out. Raises DataError where none is left, and where the two have not the same shape."""
    before: dict[Path, list[Sample]] = {}
    after: dict[Path, list[Sample]] = {}
    for sample in prepared.samples:
        (before if sample.item.original is None else after).setdefault(sample.item.path, []).append(sample)
    pairs = [(group, before[group[0].item.original]) for group in after.values() if group[0].item.original in before]
    if not pairs:
        raise DataError(f"original_data_dir: no pair has two pictures that can be used: {prepared.skipped[0]}")
    samples = [sample for ours, theirs in pairs for sample in _pair(ours, theirs)]
    return replace(prepared, samples=tuple(samples))


def _pair(ours: Sequence[Sample], theirs: Sequence[Sample]) -> list[Sample]:
    """The samples of one picture and of its original, at the same sizes."""
    shapes, others = ([tuple(sample.latents.shape) for sample in each] for each in (ours, theirs))
    if shapes != others:
        raise DataError(
            f"{theirs[0].item.path}: expected the shape of {ours[0].item.path}, which is trained at {_sizes(ours)}, "
            f"found {_sizes(theirs)}"
        )
    return [replace(sample, original=other.latents) for sample, other in zip(ours, theirs, strict=True)]


def _sizes(samples: Sequence[Sample]) -> str:
    return " and ".join(f"{sample.bucket.width}×{sample.bucket.height}" for sample in samples)


def _original(name: Path, found: dict[Path, Path]) -> Path | None:
    alike = [path for other, path in found.items() if other.with_suffix("") == name.with_suffix("")]
    return found.get(name) or (alike[0] if len(alike) == 1 else None)


def _name(path: Path, folder: Path) -> Path:
    """Within `folder`; a picture from elsewhere has only its own name."""
    return path.relative_to(folder) if path.is_relative_to(folder) else Path(path.name)


def _few(paths: Sequence[Path], total: int) -> str:
    return f"{len(paths)} of {total} ({', '.join(path.name for path in paths[:3])}{', …' if len(paths) > 3 else ''})"
