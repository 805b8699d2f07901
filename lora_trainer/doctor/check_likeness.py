"""Findings about several pictures at once: the same, nearly the same, and the same mark on many."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lora_trainer.doctor.findings import Finding
from lora_trainer.doctor.measures import CORNER_HEIGHT, CORNER_WIDTH, THUMB_SIDE
from lora_trainer.doctor.subject import Subject

# Of 512 bits. The same photograph at JPEG quality 30, at half its size or brighter by 15 % differs in at most 59, cut
# by 2 % in 71 (median); of different photographs the nearest two differ in 167. Icons come nearer, down to 22.
NEAR_BITS = 80
# The greatest difference of a cell of 16 × 16, in standard deviations. The same picture again has at most 0.7, cut by
# 2 % 1.0 to 1.2 (medians); of different pictures within NEAR_BITS the nearest two, icons of faces, have 2.0.
NEAR_CELL = 1.3
_CELLS = 16
_BLOCK = 512

# A mark is where gradients agree over pictures: their mean at least this many grey levels, that many times its own
# standard error and that share of their standard deviation. Of unmarked photographs no place is one, of aligned icons
# none (their outlines reach 0.7 of the deviation); white text of half opacity on 23 photographs has 35.
MARK_LEVELS, MARK_ERRORS, MARK_SHARE, MARK_PLACES = 3.0, 5.0, 0.8, 10
# With fewer pictures, or of more at once, chance agrees too often, or memory runs short.
MARK_PICTURES, MARK_SAMPLE = 12, 1000
# Stronger gradients are the picture's own.
_CLIP = 24
_CORNERS = ("top left", "top right", "bottom left", "bottom right")


def duplicates(subject: Subject) -> Iterator[Finding]:
    """Groups of the very same pixels, then of nearly the same picture."""
    same: dict[bytes, list[Path]] = defaultdict(list)
    for file, measures in subject.measured():
        same[measures.pixels].append(file)
    for files in same.values():
        if len(files) > 1:
            texts = {subject.captions.get(file) for file in files}
            differ = "; their captions differ" if len(texts) > 1 else ""
            reason = f"the very same picture {len(files)} times, learned as often{differ}"
            yield Finding("duplicate", "warning", tuple(files), reason, "Keep one, with the better caption.")
    for files in _near([file for file, *_ in same.values()], subject):
        reason = f"{len(files)} pictures that are nearly the same weigh like {len(files)} different ones"
        mend = "Keep the best, unless the small difference is what should be learned."
        yield Finding("near-duplicate", "warning", tuple(files), reason, mend)


def _near(files: Sequence[Path], subject: Subject) -> Iterator[list[Path]]:
    """Groups of files, each near to another of its group."""
    chosen = set(files)
    # Blank pictures are all alike, and have a finding of their own.
    kept = [(file, m) for file, m in subject.measured() if file in chosen and m.spread >= 2]
    if len(kept) < 2:
        return
    signs = np.unpackbits(np.stack([m.hash for _, m in kept]), axis=1).astype(np.float32) * 2 - 1
    thumbs = np.stack([_normal(m.thumb) for _, m in kept])
    home = np.arange(len(kept))
    for first, others in _alike(signs):
        others = others[home[others] != home[first]]
        for other in others[_cell_difference(thumbs[first], thumbs[others]) <= NEAR_CELL]:
            home[home == home[other]] = home[first]
    groups: dict[int, list[Path]] = defaultdict(list)
    for (file, _), group in zip(kept, home.tolist(), strict=True):
        groups[group].append(file)
    yield from (group for group in groups.values() if len(group) > 1)


def _alike(signs: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each row of ±1, and which later ones differ from it in at most NEAR_BITS places: products count what agrees."""
    least = signs.shape[1] - 2 * NEAR_BITS
    for start in range(0, len(signs), _BLOCK):
        agreement = signs[start : start + _BLOCK] @ signs[start:].T
        for row, values in enumerate(agreement >= least):
            later = start + row + 1 + np.flatnonzero(values[row + 1 :])
            if later.size:
                yield start + row, later


def _cell_difference(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The greatest difference of a cell between one thumbnail and each of `others`."""
    size = THUMB_SIDE // _CELLS
    difference = np.abs(others - one).reshape(-1, _CELLS, size, _CELLS, size)
    return difference.mean(axis=(2, 4)).max(axis=(1, 2))


def _normal(thumb: np.ndarray) -> np.ndarray:
    """As bright and as rich in contrast as any other."""
    values = thumb.astype(np.float32)
    return (values - values.mean()) / max(float(values.std()), 1.0)


def marks(subject: Subject) -> Iterator[Finding]:
    """Watermarks, signatures and patterned frames: corners in which many different pictures agree.

    After Dekel et al., "On the Effectiveness of Visible Watermarks", CVPR 2017: gradients of a watermark stay when
    those of many pictures are put together.
    """
    different = {measures.pixels: (file, measures) for file, measures in subject.measured()}.values()
    cornered = [(file, measures.corners) for file, measures in different if measures.corners is not None]
    if len(cornered) < MARK_PICTURES:
        return
    sample = cornered[:: -(-len(cornered) // MARK_SAMPLE)]
    found: dict[Path, list[str]] = defaultdict(list)
    for index, name in enumerate(_CORNERS):
        gradients = np.stack([_gradients(corners[index]) for _, corners in sample])
        mean, spread = gradients.mean(axis=0), gradients.std(axis=0) + 2
        strength = np.abs(mean)
        agreeing = (
            (strength >= MARK_LEVELS)
            & (strength * len(sample) ** 0.5 >= MARK_ERRORS * spread)
            & (strength >= MARK_SHARE * spread)
        )
        if agreeing.sum() < MARK_PLACES:
            continue
        pattern = mean[agreeing]
        for file, corners in cornered:
            if _gradients(corners[index])[agreeing] @ pattern >= 0.5 * (pattern @ pattern):
                found[file].append(name)
    if found:
        where = sorted({name for names in found.values() for name in names}, key=_CORNERS.index)
        reason = f"the same lines in the corner {', '.join(where)} of {len(found)} pictures: a watermark, text or frame"
        mend = "Crop or paint it away, or the LoRA draws it too."
        yield Finding("watermark", "warning", tuple(found), reason, mend)


def _gradients(corner: np.ndarray) -> np.ndarray:
    """Across and down: [2, 31, 63]."""
    values = corner.astype(np.int16)
    base = values[: CORNER_HEIGHT - 1, : CORNER_WIDTH - 1]
    both = np.stack([values[:-1, 1:] - base, values[1:, :-1] - base])
    return both.clip(-_CLIP, _CLIP).astype(np.float32)


CHECKS = (duplicates, marks)
