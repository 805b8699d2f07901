"""Any picture a folder may hold, as upright 8-bit RGB."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError

from lora_trainer.errors import DataError, printable

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# The mask of NAME.jpg, beside it, as OneTrainer's tool writes them.
MASK_ENDING = "-masklabel.png"
MAX_PIXELS = 105_000_000
MAX_RUN_LENGTH_PIXELS = 8_000_000
# Pixels times passes: twice what the largest picture needs.
MAX_PROGRESSIVE_WORK = 20 * MAX_PIXELS

# Only these decoders are tried, whatever the suffix says. Others reach further than a picture should: EPS
# starts Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_READABLE = "JPEG, PNG, WebP, BMP, GIF, TIFF"
_TOO_LARGE = f"has too many pixels to be safe: expected at most {MAX_PIXELS:,}"
_ORIENTATION = 0x0112
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)


@dataclass(frozen=True)
class ImageFacts:
    """What a file tells without being decoded: its real format, (width, height) upright, and what training leaves out
    of it: later frames, transparency, bytes of EXIF."""

    format: str
    size: tuple[int, int]
    animated: bool
    transparent: bool
    exif: int


class ImageError(DataError):
    """One picture that cannot be used: `path`, and `why` in a few words."""

    def __init__(self, path: Path, why: str) -> None:
        self.path = path
        self.why = why
        super().__init__(f"{path}: {why}")


def is_picture(path: Path) -> bool:
    """Whether a file's name is that of a picture to train on; masks are none."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.lower().endswith(MASK_ENDING)


def load_image(path: Path, *, reduced: int | None = None) -> Image.Image:
    """The picture at `path`, upright, mode RGB (8 bits). For a thumbnail of `reduced` pixels a JPEG is decoded at an
    eighth to the whole of its size, whatever suffices; that is much faster.

    The first frame of an animation. Transparency is laid on white. 16 bits keep their full range. Colors with
    an ICC profile other than sRGB (RGB, grey and CMYK pictures) become sRGB; a profile that LittleCMS refuses
    is ignored, as viewers do. Raises ImageError: missing, not a picture, truncated, corrupt, over MAX_PIXELS.
    """
    return _loaded(path, _rgb, reduced)


def load_alpha(path: Path) -> Image.Image:
    """The opacity of the picture at `path`, upright, mode L: 255 where it hides what is behind it. Raises ImageError as
    `load_image` does."""
    return _loaded(path, _alpha)


def _loaded(path: Path, read: Callable[[Image.Image], Image.Image], reduced: int | None = None) -> Image.Image:
    with _opened(path) as image:
        orientation = _orientation(image)
        _refuse_slow(path, image)
        if reduced is not None:
            image.draft(None, (reduced, reduced))
        with _TRUNCATION:
            image.load()
        upright = _UPRIGHT.get(orientation)
        # Pillow turns a TIFF itself while loading it.
        if upright is not None and image.format != "TIFF":
            return read(image).transpose(upright)
        return read(image)


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels of the upright picture, from its header alone. Raises ImageError."""
    with _opened(path) as image:
        return _size(image)


def image_facts(path: Path) -> ImageFacts:
    """From the file's header alone. Raises ImageError."""
    with _opened(path) as image:
        # A phone's JPEG with another picture behind it, such as a depth map.
        is_mpo = image.format == "MPO"
        return ImageFacts(
            format="JPEG" if is_mpo else str(image.format),
            size=_size(image),
            animated=bool(getattr(image, "is_animated", False)) and not is_mpo,
            transparent=_has_transparency(image),
            exif=len(image.info.get("exif", b"")),
        )


def _size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    if image.format == "TIFF":
        width, height = int(image.tag_v2[_TIFF_WIDTH]), int(image.tag_v2[_TIFF_HEIGHT])
    return (height, width) if _orientation(image) in _SIDEWAYS else (width, height)


def _refuse_slow(path: Path, image: Image.Image) -> None:
    """Small files that would take minutes: each pass of a progressive JPEG visits every pixel, be it with nothing to
    say, and Pillow fills the rest of a line of a run-length coded BMP byte by byte."""
    pixels = image.width * image.height
    if image.format == "BMP" and image.tile and image.tile[0][0] == "bmp_rle" and pixels > MAX_RUN_LENGTH_PIXELS:
        raise ImageError(path, f"has too many pixels for a compressed BMP: expected at most {MAX_RUN_LENGTH_PIXELS:,}")
    if image.info.get("progressive"):
        passes = path.read_bytes().count(b"\xff\xda")
        if passes * pixels > MAX_PROGRESSIVE_WORK:
            raise ImageError(path, f"has too many passes to be safe, {passes:,}; save it as an ordinary JPEG")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The open picture; whatever goes wrong until it is closed becomes an ImageError."""
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(path, f"{_TOO_LARGE}, found {image.width}×{image.height}")
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        empty = path.stat().st_size == 0
        raise ImageError(path, "is empty" if empty else f"is no picture that is read ({_READABLE})") from error
    except Image.DecompressionBombError as error:
        # Pillow's own limit, which a host may have moved, comes before the size is known here.
        raise ImageError(path, f"{_TOO_LARGE}, found more") from error
    except Exception as error:
        # Decoders raise nearly anything on damaged bytes: OSError, SyntaxError, struct.error, KeyError, ….
        raise ImageError(path, f"cannot be decoded: {_one_line(error)}") from error


class _Truncation:
    """Within it a truncated picture is an error: some programs that share this process tell Pillow to fill what is
    missing with grey. Pillow's switch is one for the process, so the first thread in moves it and the last one out
    puts it back."""

    def __init__(self) -> None:
        self._lock, self._inside, self._before = Lock(), 0, False

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = ImageFile.LOAD_TRUNCATED_IMAGES
                ImageFile.LOAD_TRUNCATED_IMAGES = False
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = self._before


_TRUNCATION = _Truncation()


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8. Unreadable EXIF counts as none, as in viewers."""
    # Asked for the EXIF of a PNG that has none in its header, Pillow would decode the whole picture.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        plain = _eight_bits(image)
    elif _has_transparency(image):
        plain = _on_white(image.convert("RGBA"))
    elif image.mode in ("RGB", "L", "CMYK"):
        plain = image
    else:
        plain = image.convert("RGB")
    profile = image.info.get("icc_profile")
    if profile:
        plain = _srgb(plain, profile)
    # A copy without EXIF or profile, which no longer describe it, and without the file.
    rgb = plain.convert("RGB")
    rgb.info = {}
    return rgb


def _alpha(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray(np.where(np.asarray(image) == image.info.get("transparency"), 0, 255).astype(np.uint8))
    return image.convert("RGBA").getchannel("A")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Modes I;16, I and F as L. White is the least usual maximum that holds all values (65535; for floats 1,
    255, 65535), else the greatest value. Negative values and NaN are black."""
    values = np.asarray(image)
    usual = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    highest = max(np.nan_to_num(rows.astype(np.float64)).max() for rows in _strips(values))
    white = next((top for top in usual if highest <= top), highest)
    transparent = image.info.get("transparency")
    grey = np.empty(values.shape, np.uint8)
    for rows, target in zip(_strips(values), _strips(grey), strict=True):
        scaled = np.clip(np.nan_to_num(rows.astype(np.float64)) / white, 0, 1) * 255
        if isinstance(transparent, int):
            scaled[rows == transparent] = 255
        target[:] = scaled + 0.5
    return Image.fromarray(grey)


def _strips(values: np.ndarray) -> list[np.ndarray]:
    """Views of some rows each: at 8 bytes a number a large picture would take gigabytes."""
    return [values[row : row + 64] for row in range(0, len(values), 64)]


def _has_transparency(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _srgb(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image
        target = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, source, target, outputMode="RGB") or image
    except (ImageCms.PyCMSError, ImportError, OSError, TypeError, ValueError):
        return image


def _one_line(error: Exception) -> str:
    """An OSError's own words without its path, else the first line, else the kind of error."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return printable(text.splitlines()[0], 300)
