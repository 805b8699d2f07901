"""Pictures read, decoded and cut in threads, some of them ahead of their use."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image

from lora_trainer.dataset.buckets import Bucket, fit, place
from lora_trainer.dataset.images import ImageError, load_image

Item, Made = TypeVar("Item"), TypeVar("Made")
MOST_THREADS = 8


@dataclass(frozen=True)
class Sizes:
    """How pictures are cut: the area of a bucket is at most `resolution` squared."""

    resolution: int
    allow_upscaling: bool = False


@dataclass(frozen=True)
class Cut:
    """A picture in the size of its bucket."""

    bucket: Bucket
    image: Image.Image


def cut(path: Path, sizes: Sizes) -> Cut:
    """Raises ImageError."""
    image = load_image(path)
    try:
        placement = place(image.size, sizes.resolution, allow_upscaling=sizes.allow_upscaling)
    except ValueError as error:
        raise ImageError(path, str(error)) from error
    return Cut(placement.bucket, fit(image, placement))


def content_hash(path: Path) -> str | None:
    """SHA-256 of the file; None where it cannot be read."""
    whole = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                whole.update(block)
    except OSError:
        return None
    return whole.hexdigest()


@contextmanager
def made_ahead(items: Sequence[Item], make: Callable[[Item], Made]) -> Iterator[Iterator[Callable[[], Made]]]:
    """For each item in order a callable that gives `make(item)` or raises what that raised. Threads only: a process
    would be spawned into a WebUI. What is not asked for any more is not made."""
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        waiting: deque[Future[Made]] = deque()

        def results() -> Iterator[Callable[[], Made]]:
            for item in items:
                waiting.append(pool.submit(make, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result
            while waiting:
                yield waiting.popleft().result

        try:
            yield results()
        finally:
            for future in waiting:
                future.cancel()
