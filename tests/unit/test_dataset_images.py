"""Any picture file becomes upright 8-bit RGB, or one clear error."""

from __future__ import annotations

import random
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from lora_trainer.dataset.images import IMAGE_SUFFIXES, ImageError, image_size, load_image

RED = (255, 0, 0)


def saved(path, image, **options):
    image.save(path, **options)
    return path


def pixel(path, at=(0, 0)):
    image = load_image(path)
    assert image.mode == "RGB"
    return image.getpixel(at)


def png(width, height, *, depth, color, rows):
    """A PNG of raw `rows`, for kinds that Pillow does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_kind_is_read(tmp_path, suffix):
    kind = {".jfif": "JPEG"}.get(suffix)
    path = saved(tmp_path / f"a{suffix}", Image.new("RGB", (20, 10), RED), format=kind)
    assert np.abs(np.subtract(pixel(path), RED)).max() <= 3
    assert load_image(path).size == image_size(path) == (20, 10)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize(
    ("orientation", "size", "red"),
    [(1, (40, 20), (5, 10)), (3, (40, 20), (35, 10)), (6, (20, 40), (10, 5)), (8, (20, 40), (10, 35))],
)
def test_exif_orientation_makes_it_upright(tmp_path, suffix, orientation, size, red):
    stored = Image.new("RGB", (40, 20), "white")
    stored.paste(RED, (0, 0, 20, 20))  # the left half, before it is turned
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / f"a{suffix}", stored, exif=exif)
    assert load_image(path).size == image_size(path) == size
    opposite = (size[0] - 1 - red[0], size[1] - 1 - red[1])
    assert np.abs(np.subtract(pixel(path, red), RED)).max() <= 5
    assert np.abs(np.subtract(pixel(path, opposite), (255, 255, 255))).max() <= 5


def test_alpha_is_composited_on_white(tmp_path):
    assert pixel(saved(tmp_path / "a.png", Image.new("RGBA", (4, 4), (255, 0, 0, 0)))) == (255, 255, 255)
    assert pixel(saved(tmp_path / "b.png", Image.new("RGBA", (4, 4), (255, 0, 0, 128)))) == (255, 127, 127)
    assert pixel(saved(tmp_path / "c.png", Image.new("LA", (4, 4), (0, 0)))) == (255, 255, 255)
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert pixel(saved(tmp_path / "d.webp", clear, lossless=True)) == (255, 255, 255)


@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_a_transparent_palette_color_is_white(tmp_path, suffix):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    path = saved(tmp_path / f"a{suffix}", image, transparency=1)
    assert pixel(path) == RED
    assert pixel(path, (3, 3)) == (255, 255, 255)


@pytest.mark.parametrize(("mode", "color", "clear"), [("L", 7, 7), ("RGB", (1, 2, 3), (1, 2, 3)), ("1", 0, 0)])
def test_a_transparent_color_of_a_png_is_white(tmp_path, mode, color, clear):
    path = saved(tmp_path / "a.png", Image.new(mode, (4, 4), color), transparency=clear)
    assert pixel(path) == (255, 255, 255)


def test_the_first_frame_of_a_gif(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    assert pixel(saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])) == RED


def test_grey_and_cmyk(tmp_path):
    assert pixel(saved(tmp_path / "a.png", Image.new("L", (4, 4), 90))) == (90, 90, 90)
    assert pixel(saved(tmp_path / "b.png", Image.new("1", (4, 4), 1))) == (255, 255, 255)
    cyan = pixel(saved(tmp_path / "c.jpg", Image.new("CMYK", (16, 16), (255, 0, 0, 0))))
    assert np.abs(np.subtract(cyan, (0, 255, 255))).max() <= 5
    assert pixel(saved(tmp_path / "d.tif", Image.new("CMYK", (4, 4), (0, 0, 0, 255)))) == (0, 0, 0)


def test_sixteen_bits_are_scaled(tmp_path):
    grey = np.full((4, 4), 0x8080, np.uint16)
    assert pixel(saved(tmp_path / "a.png", Image.fromarray(grey))) == (128, 128, 128)
    assert pixel(saved(tmp_path / "b.tif", Image.fromarray(grey))) == (128, 128, 128)
    dark = Image.fromarray(np.full((4, 4), 257 * 3, np.uint16))
    assert pixel(saved(tmp_path / "c.png", dark)) == (3, 3, 3)
    color = tmp_path / "d.png"
    color.write_bytes(png(2, 1, depth=16, color=2, rows=[bytes.fromhex("ffff80800000") * 2]))
    assert pixel(color) == (255, 128, 0)


@pytest.mark.parametrize(("top", "half"), [(1.0, 0.5), (255.0, 127.5), (65535.0, 32767.5), (1e6, 5e5)])
def test_floats_are_scaled_by_the_usual_maximum(tmp_path, top, half):
    values = np.array([[top, half, 0, -1, np.nan]], np.float32)
    path = saved(tmp_path / "a.tif", Image.fromarray(values))
    assert [pixel(path, (x, 0))[0] for x in range(5)] == [255, 128, 0, 0, 0]


def test_whole_numbers_of_32_bits(tmp_path):
    assert pixel(saved(tmp_path / "a.tif", Image.fromarray(np.full((2, 2), 0x8080, np.int32))))[0] == 128
    path = saved(tmp_path / "b.tif", Image.fromarray(np.array([[1 << 30, 1 << 29]], np.int32)))
    assert [pixel(path, (x, 0))[0] for x in range(2)] == [255, 128]


def test_a_bomb_is_refused_from_its_header(tmp_path):
    path = tmp_path / "a.png"
    for width, height in ((15_000, 15_000), (60_000, 60_000)):  # the second is over Pillow's own limit too
        path.write_bytes(png(width, height, depth=8, color=0, rows=[b"\0"]))
        for read in (load_image, image_size):
            with pytest.raises(ImageError, match="expected at most 105,000,000"):
                read(path)


def test_our_limit_holds_where_a_host_took_pillows_away(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    path = tmp_path / "a.png"
    path.write_bytes(png(15_000, 15_000, depth=8, color=0, rows=[b"\0"]))
    with pytest.raises(ImageError, match="found 15000×15000"):
        load_image(path)


def test_what_is_no_picture_is_named(tmp_path):
    empty, text, missing = tmp_path / "empty.png", tmp_path / "text.png", tmp_path / "missing.png"
    empty.touch()
    text.write_text("not a picture")
    for path, why in ((empty, "is empty"), (text, "no picture"), (missing, "No such file"), (tmp_path, "directory")):
        with pytest.raises(ImageError, match=why) as caught:
            load_image(path)
        assert str(caught.value) == f"{path}: {caught.value.why}"
        assert "\n" not in str(caught.value)


def test_a_program_that_pillow_would_start_is_no_picture(tmp_path):
    path = saved(tmp_path / "a.eps", Image.new("RGB", (4, 4))).rename(tmp_path / "a.png")
    with pytest.raises(ImageError, match="no picture"):
        load_image(path)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".gif", ".tif"])
def test_truncated_files_are_errors(tmp_path, suffix):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    path = saved(tmp_path / f"a{suffix}", noise)
    whole = path.read_bytes()
    for share in (0.001, 0.1, 0.5, 0.7):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ImageError):
            load_image(path)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".gif", ".tif"])
def test_damaged_files_give_a_picture_or_an_image_error(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 3
    options = {} if suffix in (".bmp", ".gif") else {"exif": exif}
    path = saved(tmp_path / f"a{suffix}", Image.radial_gradient("L").resize((24, 24)).convert("RGB"), **options)
    whole, rng = path.read_bytes(), random.Random(suffix)
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            damaged[rng.randrange(min(len(damaged), 400))] = rng.randrange(256)
        path.write_bytes(damaged)
        for read in (load_image, image_size):
            with suppress(ImageError):
                read(path)
