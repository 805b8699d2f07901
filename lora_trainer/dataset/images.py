"""Any picture file to upright RGB."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lora_trainer.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 200_000_000
_ORIENTATION = 0x0112
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


class ImageError(DataError):
    """A picture that cannot be used: which, and why."""

    def __init__(self, path: Path, why: str) -> None:
        self.path, self.why = path, why
        super().__init__(f"{path}: {why}")


def load_image(path: Path) -> Image.Image:
    """The first frame, upright, RGB, 8 bits; alpha is composited on white. Raises ImageError."""
    try:
        with _open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            return _rgb(upright)
    except ImageError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, IndexError, TypeError) as error:
        raise ImageError(path, f"cannot be decoded: {_reason(error)}") from error


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) when upright, from the header alone. Raises ImageError."""
    try:
        with _open(path) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
            return (height, width) if turned else (width, height)
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageError(path, f"cannot be read: {_reason(error)}") from error


def _open(path: Path) -> Image.Image:
    """Pillow's lazy image, of a size that is safe to decode. Raises ImageError."""
    try:
        with warnings.catch_warnings():
            # Our own bound follows; Pillow's warning would come for pictures that are fine.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
    except Image.DecompressionBombError as error:
        raise ImageError(path, f"has too many pixels to be safe (expected at most {MAX_PIXELS:,})") from error
    except UnidentifiedImageError as error:
        size = path.stat().st_size
        raise ImageError(path, "is empty" if size == 0 else "is not a picture, or a damaged one") from error
    except OSError as error:
        raise ImageError(path, f"cannot be read: {_reason(error)}") from error
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width}×{image.height}"
        image.close()
        raise ImageError(path, f"has too many pixels to be safe: {size} (expected at most {MAX_PIXELS:,})")
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BIT or image.mode in ("I", "F"):
        return _from_deep(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _from_deep(image: Image.Image) -> Image.Image:
    """Greyscale of 16 or 32 bits: whole numbers are of 16 bits, floats from 0 to 1 or to their maximum."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        values = np.nan_to_num(values)
        top = values.max(initial=0.0)
        values = values * 255 if top <= 1 else values / top * 255
    else:
        values = values / 257
    grey = Image.fromarray(np.clip(values.round(), 0, 255).astype(np.uint8))
    return grey.convert("RGB")


def _reason(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return getattr(error, "strerror", None) or text
