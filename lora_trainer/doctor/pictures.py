"""One picture examined: read as training reads it, measured, and let go."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
from PIL import Image

from lora_trainer.dataset.images import ImageError, ImageFacts, image_facts, load_image
from lora_trainer.doctor import measures

# Two of these at once would take gigabytes, so they go one by one.
LARGE_PIXELS = 30_000_000
# What sharpness is measured at: the area of SD 1.5's pictures, so that its threshold means the same for all.
SHARPNESS_AREA = 512 * 512


@dataclass(frozen=True)
class Measures:
    """About 10 KB about what a picture shows; `spread` is the standard deviation of its grey values."""

    pixels: bytes
    hash: np.ndarray
    thumb: np.ndarray
    spread: float
    sharpness: float | None
    bars: float
    corners: np.ndarray | None


@dataclass(frozen=True)
class Picture:
    """A picture file, what its header tells and what was measured; or `error`, why it cannot be read."""

    path: Path
    facts: ImageFacts | None = None
    measures: Measures | None = None
    error: str | None = None


def look(paths: tuple[Path, ...], workers: int) -> Iterator[Picture]:
    """Each picture, in order, read by `workers` threads a little ahead of whoever asks."""
    large = Lock()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="doctor")
    try:
        ahead = 4 * workers
        running = [pool.submit(_look, path, large) for path in paths[:ahead]]
        for path in (*paths[ahead:], *([None] * min(ahead, len(paths)))):
            yield running.pop(0).result()
            if path is not None:
                running.append(pool.submit(_look, path, large))
    finally:
        pool.shutdown(cancel_futures=True)


def _look(path: Path, large: Lock) -> Picture:
    try:
        facts = image_facts(path)
        with large if facts.size[0] * facts.size[1] > LARGE_PIXELS else nullcontext():
            return Picture(path, facts, _measured(load_image(path)))
    except ImageError as error:
        return Picture(path, error=error.why)


def _measured(image: Image.Image) -> Measures:
    whole = image.convert("L")
    grey = measures.at_most(whole, SHARPNESS_AREA)
    return Measures(
        pixels=hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).digest(),
        hash=np.packbits(measures.difference_hash(grey)),
        thumb=measures.thumbnail(grey),
        spread=float(np.asarray(grey, np.float32).std()),
        sharpness=measures.sharpness(grey),
        bars=measures.bars(grey),
        corners=measures.corners(grey),
    )
