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

from lora_trainer.dataset.buckets import Bucket
from lora_trainer.dataset.crops import Sizes, View, views
from lora_trainer.dataset.images import ImageError

Item, Made = TypeVar("Item"), TypeVar("Made")
MOST_THREADS = 8
# Pictures that a GPU gets between two looks at whether somebody else wants it.
MOST_TOGETHER = 8


@dataclass(frozen=True)
class Cut:
    """The views of a picture at one size, and their images in the size of their bucket."""

    views: tuple[View, ...]
    images: tuple[Image.Image, ...]

    @property
    def bucket(self) -> Bucket:
        return self.views[0].placement.bucket


def cut(path: Path, image: Image.Image, sizes: Sizes) -> Cut:
    """Raises ImageError."""
    try:
        found = views(image, sizes)
    except ValueError as error:
        raise ImageError(path, str(error)) from error
    return Cut(found, tuple(view.of(image) for view in found))


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
                if len(waiting) > max(2 * threads, MOST_TOGETHER):
                    yield waiting.popleft().result
            while waiting:
                yield waiting.popleft().result

        try:
            yield results()
        finally:
            for future in waiting:
                future.cancel()
