"""Damaged pictures, and small files that say they are large."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image, ImageCms

from lora_trainer.dataset.images import MAX_PIXELS, ImageError, image_size, load_image
from tests.fuzz.harness import fuzz, works_or_refuses
from tests.fuzz.inputs import file, mutated


def picture(kind: str, mode: str = "RGB", **how: object) -> bytes:
    image = Image.effect_noise((24, 16), 50).convert(mode if mode != "I;16" else "I")
    with io.BytesIO() as buffer:
        (image.convert(mode) if mode == "I;16" else image).save(buffer, kind, **how)
        return buffer.getvalue()


def run_length_bmp(width: int, height: int, lines: int) -> bytes:
    """Each line is one point and its end: two bytes that stand for a whole line of points."""
    body, start = b"\1\0\0\0" * lines, 14 + 40 + 1024
    size = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + size + bytes(1024) + body


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
FRAMES = [Image.new("P", (24, 16), color) for color in (1, 2)]
PNGS = [picture("PNG", mode) for mode in ("RGB", "RGBA", "L", "P", "1", "LA", "I;16")]
PNGS += [picture("PNG", exif=exif(6)), picture("PNG", icc_profile=PROFILE), picture("PNG", "L", transparency=7)]
SEEDS = [
    *PNGS,
    *(picture("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
    *(picture("JPEG", progressive=True), picture("JPEG", exif=exif(8), icc_profile=SRGB), picture("MPO")),
    *(picture("WEBP"), picture("WEBP", "RGBA", lossless=True), picture("WEBP", save_all=True, append_images=FRAMES)),
    *(picture("GIF", "P"), picture("GIF", "P", save_all=True, append_images=FRAMES, transparency=3)),
    *(picture("BMP"), picture("BMP", "1"), picture("BMP", "P"), run_length_bmp(24, 16, 16)),
    *(picture("TIFF", mode) for mode in ("RGB", "RGBA", "I;16", "F", "CMYK", "1")),
    *(picture("TIFF", compression=how) for how in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")),
    *(picture("ICO"), picture("PPM"), picture("EPS"), picture("ICNS") if "ICNS" in Image.SAVE else picture("PCX")),
]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
SUFFIXES = st.sampled_from([".png", ".jpg", ".webp", ".gif", ".bmp", ".tiff"])


def look_at(name: str, content: bytes) -> None:
    path = file(name, content)
    size = None
    with works_or_refuses():
        size = image_size(path)
        assert all(type(side) is int and side > 0 for side in size)
        assert size[0] * size[1] <= MAX_PIXELS
    with works_or_refuses():
        image = load_image(path)
        assert image.mode == "RGB"
        assert image.size == size
        assert image.info == {}


@fuzz("images", 240, content=mutated(SEEDS, front=120), suffix=SUFFIXES)
def test_damage(content, suffix):
    look_at(f"damaged{suffix}", content)


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """(kind, body) of each chunk of a PNG."""
    found, at = [], 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


@st.composite
def png(draw: st.DrawFn) -> bytes:
    """A PNG of right checksums and wrong content: without them nobody looks any further."""
    out = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks(draw(st.sampled_from(PNGS))):
        how = draw(st.integers(0, 9))
        if how == 0 and kind != b"IHDR":
            kind = draw(
                st.sampled_from([b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"tRNS", b"acTL", b"fcTL", b"iCCP", b"gAMA"])
            )
        elif how == 1:
            body = draw(mutated([body], front=40))
        elif how == 2 and kind == b"IDAT":
            body = zlib.compress(bytes(draw(st.integers(0, 10**6))))
        elif how == 3 and kind == b"IHDR":
            sides = st.sampled_from([0, 1, 2, 25, 2000, 2**16, 2**31 - 1, 2**31])
            body = struct.pack(">II", draw(sides), draw(sides)) + body[8:]
        out += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return out


@fuzz("images", 120, content=png())
def test_png_with_right_checksums(content):
    look_at("checked.png", content)


def progressive(passes: int) -> bytes:
    """Its last pass, which says nothing new, over and over."""
    with io.BytesIO() as buffer:
        Image.new("L", (4000, 4000)).save(buffer, "JPEG", progressive=True)
        data = buffer.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * passes + data[-2:]


BOMBS = {
    "a line for two bytes.bmp": (lambda: run_length_bmp(10_000, 10_000, 10_000), "compressed BMP"),
    "passes.jpg": (lambda: progressive(400), "too many passes"),
    "sides.bmp": (lambda: run_length_bmp(2**31 - 1, 2**31 - 1, 1), "too many pixels"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(tmp_path, name):
    make, words = BOMBS[name]
    (tmp_path / name).write_bytes(make())
    with pytest.raises(ImageError, match=words):
        load_image(tmp_path / name)


def test_a_deep_picture_is_the_same_strip_by_strip(tmp_path):
    ramp = np.arange(256, dtype=np.uint16).reshape(256, 1).repeat(256, 1)
    Image.fromarray(ramp * 257).save(tmp_path / "ramp.png")
    assert load_image(tmp_path / "ramp.png").getchannel(0).tobytes() == ramp.astype(np.uint8).tobytes()
