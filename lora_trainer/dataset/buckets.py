"""Aspect-ratio buckets: which size a picture is trained at, and how it is cut."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from PIL import Image

STEP = 64
MAX_ASPECT = 4.0


@dataclass(frozen=True)
class Bucket:
    """A training size in pixels; both sides are multiples of STEP."""

    width: int
    height: int


@dataclass(frozen=True)
class Placement:
    """How a picture of `original` (width, height) fills its bucket: resized, then `crop` (left, top, right, bottom)."""

    bucket: Bucket
    resized: tuple[int, int]
    crop: tuple[int, int, int, int]
    original: tuple[int, int]


@cache
def buckets(resolution: int, *, step: int = STEP) -> tuple[Bucket, ...]:
    """For each width the tallest bucket of an area of at most resolution², no longer than MAX_ASPECT to 1."""
    area = resolution * resolution
    found = []
    for width in range(step, int(resolution * math.sqrt(MAX_ASPECT)) + 1, step):
        height = min(area // width, int(width * MAX_ASPECT)) // step * step
        if height and width / height <= MAX_ASPECT:
            found.append(Bucket(width, height))
    return tuple(found)


def place(size: tuple[int, int], resolution: int, *, allow_upscaling: bool = False) -> Placement:
    """The bucket nearest in aspect ratio to a picture of `size` (width, height).

    Without upscaling, a picture smaller than its bucket takes the largest one that fits inside it. Raises
    ValueError when a side is shorter than STEP pixels and may not be enlarged.
    """
    width, height = size
    if min(size) < STEP and not allow_upscaling:
        raise ValueError(
            f"expected at least {STEP} pixels a side, found {width}×{height}; allow_upscaling=true enlarges it"
        )
    bucket = min(buckets(resolution), key=lambda b: (_distance(b, size), -b.width * b.height))
    if not allow_upscaling and (bucket.width > width or bucket.height > height):
        fitting = [b for b in _inside(size) if b.width * b.height <= resolution * resolution]
        bucket = max(fitting, key=lambda b: (b.width * b.height, -_distance(b, size)))
    scale = max(bucket.width / width, bucket.height / height)
    resized = (max(bucket.width, round(width * scale)), max(bucket.height, round(height * scale)))
    left, top = (resized[0] - bucket.width) // 2, (resized[1] - bucket.height) // 2
    return Placement(bucket, resized, (left, top, left + bucket.width, top + bucket.height), size)


def fit(image: Image.Image, placement: Placement) -> Image.Image:
    """`image` resized and cut as `placement` says."""
    if image.size != placement.resized:
        image = image.resize(placement.resized, Image.Resampling.LANCZOS)
    return image.crop(placement.crop)


def _distance(bucket: Bucket, size: tuple[int, int]) -> float:
    return abs(math.log(bucket.width / bucket.height) - math.log(size[0] / size[1]))


def _inside(size: tuple[int, int]) -> list[Bucket]:
    """Buckets no wider and no higher than `size`, of at most MAX_ASPECT to 1."""
    widths = range(STEP, size[0] + 1, STEP)
    heights = range(STEP, size[1] + 1, STEP)
    return [Bucket(w, h) for w in widths for h in heights if max(w, h) <= MAX_ASPECT * min(w, h)]
