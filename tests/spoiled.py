"""Pictures as photographs are, and a folder of them that is spoiled in every way known."""

from __future__ import annotations

import io
import os
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = (192, 160)


def scene(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """Soft light, sharp things, a little noise; another for each seed."""
    rng = np.random.default_rng(seed)
    light = Image.fromarray(rng.integers(0, 255, (3, 3, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(light)
    for _ in range(12):
        x, y = rng.integers(0, size[0]), rng.integers(0, size[1])
        wide, high = rng.integers(size[0] // 10, size[0] // 3), rng.integers(size[1] // 10, size[1] // 3)
        color = tuple(int(value) for value in rng.integers(0, 255, 3))
        shape = draw.rectangle if rng.random() < 0.5 else draw.ellipse
        shape((int(x), int(y), int(x + wide), int(y + high)), fill=color)
    values = np.asarray(light, np.float32) + rng.normal(0, 4, (size[1], size[0], 1))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def png_bomb() -> bytes:
    """A few bytes that claim 60,000 × 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bmp_bomb() -> bytes:
    """A run-length coded bitmap of 12,000 × 12,000 pixels in a few bytes."""
    info = struct.pack("<IiiHHIIiiII", 40, 12_000, 12_000, 1, 8, 1, 4, 0, 0, 256, 0)
    start = 14 + 40 + 1024
    return b"BM" + struct.pack("<IHHI", start + 4, 0, 0, start) + info + bytes(1024) + b"\0\1\0\1"


def scan_bomb() -> bytes:
    """A progressive JPEG of thousands of passes over its pixels."""
    whole = encoded(scene(50, (4000, 3000)), "JPEG", quality=10, progressive=True)
    at = whole.rindex(b"\xff\xda")
    return whole[:at] + whole[at:-2] * 400 + whole[-2:]


def huge_exif() -> bytes:
    exif = Image.Exif()
    exif[0x010E] = "x" * 3_000_000
    return encoded(scene(51), "PNG", exif=exif.tobytes())


def broken_exif() -> bytes:
    """Its directory points past its end: no reason to refuse the picture."""
    whole = encoded(scene(52), "JPEG", quality=95)
    data = b"Exif\0\0II*\0" + struct.pack("<IHHHII", 8, 9999, 0x0112, 3, 70_000, 0xFFFFFF)
    return whole[:2] + b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data + whole[2:]


def blurred() -> Image.Image:
    return scene(53).filter(ImageFilter.GaussianBlur(5))


def with_bars() -> Image.Image:
    image = scene(54)
    draw = ImageDraw.Draw(image)
    for top, bottom in ((0, 19), (SIZE[1] - 20, SIZE[1])):
        draw.rectangle((0, top, SIZE[0], bottom), fill="black")
    return image


def transparent() -> Image.Image:
    image = scene(55).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(SIZE))
    return image


def animation() -> bytes:
    return encoded(scene(56), "GIF", save_all=True, append_images=[scene(57)])


_HEIC = struct.pack(">I", 24) + b"ftypheic" + bytes(200)
# File: (what it holds, the kind of finding that must name it; None for a good one).
FILES: dict[str, tuple[Callable[[], bytes | Image.Image] | bytes, str | None]] = {
    **{f"good{seed:02}.png": ((lambda seed=seed: scene(seed)), None) for seed in range(12)},
    "城堡.png": (lambda: scene(20), None),
    "замок в тумане.webp": (lambda: encoded(scene(21), "WEBP", quality=95), None),
    "قلعة.jpg": (lambda: encoded(scene(22), "JPEG", quality=95), None),
    "e\u0301toile \U0001f3f0.png": (lambda: scene(23), None),
    "broken exif.jpg": (broken_exif, None),
    "zero.png": (b"", "unreadable"),
    "page.jpg": (b"<!DOCTYPE html><title>404</title>", "unreadable"),
    "cut.png": (lambda: encoded(scene(60), "PNG")[:20_000], "unreadable"),
    "cut.jpg": (lambda: encoded(scene(61), "JPEG")[:2_000], "unreadable"),
    "bomb.png": (png_bomb, "unreadable"),
    "bomb.bmp": (bmp_bomb, "unreadable"),
    "passes.jpg": (scan_bomb, "unreadable"),
    "iphone.jpg": (_HEIC, "unreadable"),
    "locked.png": (lambda: scene(62), "unreadable"),
    "camera.heic": (_HEIC, "not-read"),
    "download": (lambda: encoded(scene(63), "JPEG"), "not-read"),
    "really a jpeg.png": (lambda: encoded(scene(64), "JPEG", quality=95), "mistyped"),
    "exif.png": (huge_exif, "exif"),
    "twin.png": (lambda: scene(0), "duplicate"),
    "near.jpg": (lambda: encoded(scene(1).resize((150, 125)), "JPEG", quality=80), "near-duplicate"),
    "tiny.png": (lambda: scene(65, (40, 40)), "tiny"),
    "small.png": (lambda: scene(66, (70, 66)), "small"),
    "blurred.png": (blurred, "blurry"),
    "blank.png": (lambda: Image.new("RGB", SIZE, "#556677"), "blank"),
    "banner.png": (lambda: scene(67, (900, 120)), "aspect"),
    "film.png": (with_bars, "bars"),
    "glass.png": (transparent, "transparent"),
    "moving.gif": (animation, "animated"),
    "no caption.png": (lambda: scene(70), "caption-missing"),
    "empty caption.png": (lambda: scene(71), "caption-empty"),
    "empty caption.txt": (b" \n", None),
    "no text.png": (lambda: scene(72), None),
    "no text.txt": (bytes(range(128, 256)), "caption-file"),
    "nice.png": (lambda: scene(73), "caption-generic"),
    **{f"same{seed}.png": ((lambda seed=seed: scene(80 + seed)), "caption-identical") for seed in range(3)},
    "forgotten.txt": (b"a castle whose picture went away", "caption-orphan"),
    "more/deep/lost.png": (lambda: scene(90), None),
    "more/good.png": (lambda: scene(91), None),
    "more/good.txt": (b"sks castle, in the sub-folder", None),
    "more/metadata.csv": (b'good.png,"sks castle, below\n', "caption-file"),
}
CAPTIONS = {"nice.png": "nice photo", **{f"same{seed}.png": "sks castle, the same" for seed in range(3)}}
_NO_ROW = ("no caption.png", "empty caption.png", "no text.png")


def spoil(folder: Path) -> dict[str, str]:
    """Fill `folder`; returns of each spoiled file the kind of finding that must name it."""
    rows = []
    for name, (content, _) in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        made = content() if callable(content) else content
        path.write_bytes(made if isinstance(made, bytes) else encoded(made, "PNG"))
        if path.parent == folder and path.suffix not in (".txt", ".heic", "") and name not in _NO_ROW:
            rows.append(f'"{name}","{CAPTIONS.get(name, f"sks castle, view {len(rows)}, by day")}"')
    (folder / "metadata.csv").write_text("\n".join(rows), encoding="utf-8")
    (folder / "locked.png").chmod(0)
    (folder / "folder.png").mkdir()
    if sys.platform == "linux":
        (folder / "b.png").write_bytes(encoded(scene(92), "PNG"))
        os.rename(folder / "b.png", os.fsencode(folder) + b"/\xb9\xfb.png")
        os.mkfifo(folder / "pipe.png")
    damage = {name: kind for name, (_, kind) in FILES.items() if kind}
    return damage | {"more/deep": "not-read"}
