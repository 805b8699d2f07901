"""Aspect-ratio buckets: which part of a picture is trained on, and at what size. Whole numbers only, so that
every machine cuts alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from PIL import Image

STEP = 64
MAX_ASPECT = 4


@dataclass(frozen=True)
class Bucket:
    """The size in pixels that a picture is trained at."""

    width: int
    height: int

    @property
    def area(self) -> int:
        return self.width * self.height


@dataclass(frozen=True)
class Placement:
    """A picture of size `original`, resized to `resized` (width, height) and cut to `crop` (left, top, right,
    bottom) in pixels of the resized picture, fills `bucket`."""

    bucket: Bucket
    resized: tuple[int, int]
    crop: tuple[int, int, int, int]
    original: tuple[int, int]

    @property
    def slack(self) -> tuple[int, int]:
        """How far the crop can move across and down, in pixels of the resized picture; one of them is 0."""
        return self.resized[0] - self.bucket.width, self.resized[1] - self.bucket.height

    def at(self, left: int, top: int) -> Placement:
        """Cut there instead."""
        return replace(self, crop=(left, top, left + self.bucket.width, top + self.bucket.height))


def buckets(resolution: int, *, step: int = STEP) -> tuple[Bucket, ...]:
    """The full-size buckets: sides are multiples of `step`, areas at most resolution², aspects 1:4 to 4:1.

    Raises ValueError when `resolution` is under `step`.
    """
    if resolution < step:
        raise ValueError(f"resolution {resolution} is under {step}")
    square = resolution // step * step
    found = {Bucket(square, square)}
    for width in range(step, MAX_ASPECT * resolution + 1, step):
        height = resolution**2 // width // step * step
        if height > 0 and max(width, height) <= MAX_ASPECT * min(width, height):
            found |= {Bucket(width, height), Bucket(height, width)}
    return tuple(sorted(found, key=lambda bucket: (bucket.width, bucket.height)))


def place(size: tuple[int, int], resolution: int, *, allow_upscaling: bool = False) -> Placement:
    """Where a picture of `size` (width, height) goes: the bucket of the nearest aspect ratio, cut centrally.

    Without upscaling a picture smaller than that bucket gets the largest one that fits inside it.
    Raises ValueError for a side under 64 pixels that may not be enlarged.
    """
    width, height = size
    if min(size) < STEP and not allow_upscaling:
        found = f"found {width}×{height}; allow_upscaling=true enlarges it"
        raise ValueError(f"is too small: expected at least {STEP} pixels a side, {found}")
    bucket = _nearest(buckets(resolution), width, height)
    if not allow_upscaling and (width < bucket.width or height < bucket.height):
        bucket = _largest_inside(width, height, resolution)
    resized = _cover(bucket, width, height)
    left = (resized[0] - bucket.width) // 2
    top = (resized[1] - bucket.height) // 2
    return Placement(bucket, resized, (left, top, left + bucket.width, top + bucket.height), size)


def fit(image: Image.Image, placement: Placement) -> Image.Image:
    """`image` resized and cut as `placement` says; only the part that is kept is resampled."""
    size = (placement.bucket.width, placement.bucket.height)
    return image.resize(size, Image.Resampling.LANCZOS, box=_box(placement))


def fit_mask(mask: Image.Image, placement: Placement, factor: int) -> Image.Image:
    """The same of a picture's mask, `factor` times smaller: each pixel is the mean of the part it stands for."""
    size = (placement.bucket.width // factor, placement.bucket.height // factor)
    return mask.resize(size, Image.Resampling.BOX, box=_box(placement))


def _box(placement: Placement) -> tuple[float, float, float, float]:
    """What is kept, in pixels of the original picture."""
    (width, height), (original_width, original_height) = placement.resized, placement.original
    left, top, right, bottom = placement.crop
    return (
        left * original_width / width,
        top * original_height / height,
        right * original_width / width,
        bottom * original_height / height,
    )


def _nearest(candidates: Iterable[Bucket], width: int, height: int) -> Bucket:
    return min(candidates, key=lambda bucket: (_mismatch(bucket, width, height), -bucket.area, bucket.width))


def _largest_inside(width: int, height: int, resolution: int) -> Bucket:
    """The largest bucket not larger than the picture, of the same bounds; of equals the nearest in aspect."""
    found = []
    for w in range(STEP, width + 1, STEP):
        h = min(height, resolution**2 // w, MAX_ASPECT * w) // STEP * STEP
        if h > 0 and w <= MAX_ASPECT * h:
            found.append(Bucket(w, h))
    area = max(bucket.area for bucket in found)
    return _nearest((bucket for bucket in found if bucket.area == area), width, height)


def _mismatch(bucket: Bucket, width: int, height: int) -> float:
    """The ratio of the two aspects, at least 1."""
    one, other = bucket.width * height, bucket.height * width
    return max(one, other) / min(one, other)


def _cover(bucket: Bucket, width: int, height: int) -> tuple[int, int]:
    """The smallest size of the picture's own aspect that covers the bucket: one side is the bucket's."""
    if bucket.width * height >= bucket.height * width:
        return bucket.width, _divide(height * bucket.width, width)
    return _divide(width * bucket.height, height), bucket.height


def _divide(numerator: int, denominator: int) -> int:
    """The nearest whole number."""
    return (2 * numerator + denominator) // (2 * denominator)
