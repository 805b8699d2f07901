"""Small pictures for the page, made when they are first seen and kept on disk."""

from __future__ import annotations

import hashlib
import io
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import BoundedSemaphore

from PIL import Image

from lora_trainer.dataset.images import load_image
from lora_trainer.errors import DataError, OutputError
from lora_trainer.files import publish, trim

SIZES = {"small": 256, "large": 1024}
_JPEG_END = b"\xff\xd9"
# Some 20,000 small ones.
MAX_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class Thumbnails:
    """In `folder`. Few are made at once, since each may take a processor core and the memory of a whole picture."""

    folder: Path
    _making: BoundedSemaphore = field(default_factory=lambda: BoundedSemaphore(2))

    def get(self, picture: Path, size: str) -> bytes:
        """A JPEG of `picture`, upright, of at most SIZES[size] pixels a side. Raises DataError: also ImageError."""
        try:
            facts = picture.stat()
        except OSError as error:
            raise DataError(f"{picture}: cannot be read: {error.strerror}") from None
        key = hashlib.sha256(repr((str(picture), facts.st_mtime_ns, facts.st_size, size)).encode()).hexdigest()
        kept = self.folder / key[:2] / f"{key[2:]}.jpg"
        with suppress(OSError):
            data = kept.read_bytes()
            # Not what a power cut left.
            if data.endswith(_JPEG_END):
                return data
        with self._making:
            made = _made(picture, SIZES[size])
        # A full disk costs only time.
        with suppress(OutputError):
            publish(made, kept, durable=False)
        return made

    def trim(self, limit: int = MAX_BYTES) -> None:
        """Remove the oldest ones beyond `limit` bytes."""
        trim(self.folder.glob("*/*.jpg"), limit)


def _made(picture: Path, side: int) -> bytes:
    image = load_image(picture, reduced=side)
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=82)
    return out.getvalue()
