"""What a file really is, by its first bytes."""

from __future__ import annotations

from pathlib import Path

READ = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
PICTURES = (*READ, "HEIC", "AVIF", "JPEG XL", "JPEG 2000", "Photoshop")

_STARTS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"8BPS", "Photoshop"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"%PDF", "PDF"),
    (b"PK\x03\x04", "a ZIP archive"),
)
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF"} | dict.fromkeys((b"heic", b"heix", b"mif1", b"msf1", b"hevc"), "HEIC")


def kind_of(path: Path) -> str | None:
    """A picture's format, a web page, PDF or archive; None for anything else and for what cannot be opened."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError:
        return None
    known = next((kind for magic, kind in _STARTS if start.startswith(magic)), None)
    if known:
        return known
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WEBP"
    if start[4:8] == b"ftyp":
        return _BRANDS.get(start[8:12])
    # Two letters are not enough to know a bitmap by: bytes 14 to 17 are the size of its header.
    if start[:2] == b"BM" and start[14:18] in (b"\x0c\0\0\0", b"\x28\0\0\0", b"\x6c\0\0\0", b"\x7c\0\0\0"):
        return "BMP"
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "a web page"
    return None
