"""Which parts of a picture training sees, and at what sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from lora_trainer.config import Config
from lora_trainer.dataset.buckets import Placement, fit, fit_mask, place

Crop = Literal["center", "focus", "random"]
# The longer side of the picture in which detail is looked for.
_SMALL = 256
# How much detail the middle may lack to be taken all the same.
_NEARLY = (49, 50)


@dataclass(frozen=True)
class Sizes:
    """How pictures are cut: the area of a bucket is at most `resolution` squared. Random crops are chosen from up to
    `crops`; with `flip` each is seen mirrored too."""

    resolution: int
    allow_upscaling: bool = False
    crop: Crop = "center"
    crops: int = 1
    flip: bool = False


@dataclass(frozen=True)
class View:
    """One way to see a picture: cut as `placement` says, perhaps mirrored."""

    placement: Placement
    flipped: bool = False

    def of(self, image: Image.Image) -> Image.Image:
        cut = fit(image, self.placement)
        return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flipped else cut

    def mask_of(self, mask: Image.Image, factor: int) -> Image.Image:
        """What it shows of the picture's mask, `factor` times smaller, mode L."""
        cut = fit_mask(mask, self.placement, factor)
        return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flipped else cut

    @property
    def sizes(self) -> tuple[int, ...]:
        """What SDXL is told: original (height, width), crop (top, left) in the resized picture, target (height, width),
        in pixels (Podell et al. 2023, arXiv:2307.01952, section 2.2). Of a mirrored picture the left edge is what was
        the right one."""
        placement = self.placement
        (width, height), bucket = placement.original, placement.bucket
        left, top, right, _ = placement.crop
        return (height, width, top, placement.resized[0] - right if self.flipped else left, bucket.height, bucket.width)


def sizes_of(config: Config, resolution: int) -> list[Sizes]:
    """How pictures are cut, the main size first; `resolution` is the model's own."""
    crops = config.crops_per_image if config.crop == "random" else 1
    return [
        Sizes(side, config.allow_upscaling, config.crop, crops, config.flip)
        for side in dict.fromkeys([config.resolution or resolution, *config.extra_resolutions])
    ]


def views(image: Image.Image, sizes: Sizes) -> tuple[View, ...]:
    """The views of `image` between which each visit chooses, the plainest first; all of one bucket.

    Raises ValueError as `place` does.
    """
    placement = place(image.size, sizes.resolution, allow_upscaling=sizes.allow_upscaling)
    cuts = [placement]
    if sizes.crop == "focus":
        cuts = [focused(image, placement)]
    elif sizes.crop == "random":
        across, down = (spread(slack, sizes.crops) for slack in placement.slack)
        cuts = [placement.at(left, top) for left in across for top in down]
    return tuple(View(cut, flipped) for cut in cuts for flipped in ((False, True) if sizes.flip else (False,)))


def spread(slack: int, count: int) -> list[int]:
    """Up to `count` whole numbers from 0 to `slack`, evenly spaced, the middle first."""
    if slack == 0 or count == 1:
        return [slack // 2]
    found = {number * slack // (count - 1) for number in range(count)}
    return sorted(found, key=lambda offset: (abs(2 * offset - slack), offset))


def focused(image: Image.Image, placement: Placement) -> Placement:
    """The crop with the most detail in it; one nearer to the middle where that has nearly as much.

    Detail is the difference between neighbouring pixels of a small grey copy. In the lowest tenth, where watermarks
    are, it counts at most as much as it does elsewhere on average.
    """
    across, down = placement.slack
    if not across and not down:
        return placement
    detail = _detail(image)
    profile = detail.sum(axis=0) if across else detail.sum(axis=1)
    slack = across or down
    side = slack + (placement.bucket.width if across else placement.bucket.height)
    offset = _best(profile, slack, side)
    return placement.at(offset, 0) if across else placement.at(0, offset)


def _detail(image: Image.Image) -> np.ndarray:
    """[h, w] int64: how much each pixel of a small copy differs from its right and lower neighbours."""
    scale = max(1.0, max(image.size) / _SMALL)
    size = tuple(max(2, round(side / scale)) for side in image.size)
    grey = np.asarray(image.convert("L").resize(size, Image.Resampling.BOX), np.int64)
    detail = np.zeros_like(grey)
    detail[:, :-1] += np.abs(np.diff(grey, axis=1))
    detail[:-1] += np.abs(np.diff(grey, axis=0))
    lowest = len(detail) * 9 // 10
    if lowest:
        detail[lowest:] = np.minimum(detail[lowest:], int(detail[:lowest].sum()) // detail[:lowest].size)
    return detail


def _best(profile: np.ndarray, slack: int, side: int) -> int:
    """Where, from 0 to `slack`, a window over `side` pixels begins that holds the most of `profile`, which has fewer
    entries than the side has pixels. Whole numbers only, so that every machine cuts alike."""
    room = max(1, round(len(profile) * slack / side))
    window = len(profile) - room
    sums = np.concatenate([[0], np.cumsum(profile)])
    inside = sums[window : window + room + 1] - sums[: room + 1]
    good = np.flatnonzero(inside * _NEARLY[1] >= inside.max() * _NEARLY[0])
    start = min(map(int, good), key=lambda start: (abs(2 * start - room), start))
    return slack // 2 if abs(2 * start - room) <= 1 else start * slack // room
