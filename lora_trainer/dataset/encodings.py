"""Text files of unknown encoding: UTF-8, UTF-16, or what Excel writes in China (GBK) and Japan (Shift-JIS)."""

from __future__ import annotations

import codecs
import unicodedata
from pathlib import Path

from lora_trainer.errors import DataError

_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig", "UTF-8"),
    (codecs.BOM_UTF16_LE, "utf-16", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16", "UTF-16"),
)
# name: codec to read, the national standard's codec, lead bytes of its symbols, of its everyday characters,
# of its other characters. GB 2312 keeps kana in A4–A5; Chinese has no use for them.
_NATIONAL = {
    "GBK": ("gb18030", "gb2312", range(0xA1, 0xA4), range(0xB0, 0xD8), range(0xD8, 0xF8)),
    "Shift-JIS": ("cp932", "shift_jis", range(0x81, 0x82), range(0x82, 0x98), range(0x98, 0xEB)),
}
# A score that only everyday text reaches.
_CLEAR = 0.5


def decode(path: Path, data: bytes) -> tuple[str, str]:
    """(text, name of the encoding). Raises DataError for bytes that are no text in any of them."""
    for bom, codec, name in _BOMS:
        if data.startswith(bom):
            return _decoded(path, data, codec, name)
    try:
        utf8 = data.decode("utf-8")
    except UnicodeDecodeError:
        utf8 = None
    if utf8 is not None and not _looks_mixed(utf8):
        return utf8, "UTF-8"
    scores: dict[str, float] = {}
    texts: dict[str, str] = {}
    for name, (codec, *_) in _NATIONAL.items():
        try:
            texts[name] = data.decode(codec)
        except UnicodeDecodeError:
            continue
        scores[name] = _plausible(texts[name], name)
    best = max(scores, key=lambda name: scores[name], default=None)
    if utf8 is not None and (best is None or scores[best] < _CLEAR):
        return utf8, "UTF-8"
    if best is None or scores[best] <= 0:
        raise DataError(f"{path}: expected UTF-8, GBK or Shift-JIS text, found none of them; save it as UTF-8")
    return texts[best], best


def _decoded(path: Path, data: bytes, codec: str, name: str) -> tuple[str, str]:
    try:
        return data.decode(codec), name
    except UnicodeDecodeError:
        raise DataError(f"{path}: expected {name} text, as its first bytes say, found other bytes") from None


def _looks_mixed(text: str) -> bool:
    """Whether the foreign characters all take two bytes of UTF-8, and are of several scripts, one of them rare.
    A few Chinese characters of GBK can be valid UTF-8, but then look like this: 蔷薇 becomes Ǿ and a Thaana letter.
    """
    foreign = {character for character in text if ord(character) > 127}
    if any(ord(character) > 0x7FF for character in foreign):
        return False
    scripts = {unicodedata.name(c, "").split(" ")[0] if ord(c) >= 0x250 else "LATIN" for c in foreign}
    return len(scripts) > 1 and not scripts <= {"LATIN", "GREEK", "CYRILLIC"}


def _plausible(text: str, name: str) -> float:
    """How much the text looks like writing in the encoding's language, from -1 to 1 a character.

    Bytes of one encoding read as another give half-width katakana, private and rare characters.
    """
    foreign = [character for character in text[:200_000] if ord(character) > 127]
    return sum(_score(character, name) for character in foreign) / max(1, len(foreign))


def _score(character: str, name: str) -> float:
    _, standard, symbols, common, rare = _NATIONAL[name]
    try:
        encoded = character.encode(standard)
    except UnicodeEncodeError:
        return -1.0
    if len(encoded) == 1:  # half-width katakana
        return -1.0
    lead = encoded[0]
    return 1.0 if lead in common else 0.5 if lead in symbols else 0.0 if lead in rare else -0.5
