"""Text files of unknown encoding: UTF-8, UTF-16, or what Excel writes in China (GBK) and Japan (Shift-JIS)."""

from __future__ import annotations

import codecs
from pathlib import Path

from lora_trainer.errors import DataError

_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig", "UTF-8"),
    (codecs.BOM_UTF16_LE, "utf-16", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16", "UTF-16"),
)


def decode(path: Path, data: bytes) -> tuple[str, str]:
    """(text, name of the encoding). Raises DataError for bytes that are no text in any of them."""
    for bom, codec, name in _BOMS:
        if data.startswith(bom):
            return _decoded(path, data, codec, name)
    try:
        return data.decode("utf-8"), "UTF-8"
    except UnicodeDecodeError:
        pass
    candidates = {}
    for codec, name in (("gb18030", "GBK"), ("cp932", "Shift-JIS")):
        try:
            candidates[name] = data.decode(codec)
        except UnicodeDecodeError:
            continue
    if not candidates:
        raise DataError(f"{path}: expected UTF-8, GBK or Shift-JIS text, found neither; save it as UTF-8")
    best = max(candidates, key=lambda name: _plausible(candidates[name], name))
    return candidates[best], best


def _decoded(path: Path, data: bytes, codec: str, name: str) -> tuple[str, str]:
    try:
        return data.decode(codec), name
    except UnicodeDecodeError:
        raise DataError(f"{path}: expected {name} text, as its first bytes say, found other bytes") from None


def _plausible(text: str, name: str) -> float:
    """How much the characters look like writing in the encoding's language, from -1 to 1 a character.

    Bytes of one encoding read as the other give half-width katakana, rare hanzi and mixed punctuation.
    """
    scores = [_score(character, name) for character in text if ord(character) > 127]
    return sum(scores) / max(1, len(scores))


def _score(character: str, name: str) -> float:
    code = ord(character)
    if 0x3040 <= code <= 0x30FF:  # kana; Chinese has none
        return 1.0 if name == "Shift-JIS" else -0.5
    if 0xFF61 <= code <= 0xFF9F or 0xE000 <= code <= 0xF8FF:  # half-width katakana, private use
        return -1.0
    if code in (0x3001, 0x3002) or 0xFF01 <= code <= 0xFF5E:  # shared punctuation
        return 0.5
    if 0x4E00 <= code <= 0x9FFF:
        return 1.0 if _common(character, name) else -0.5
    return -0.2


def _common(character: str, name: str) -> bool:
    """In the first level of GB 2312 (lead bytes B0–D7) or of JIS X 0208 (lead bytes 88–97)."""
    try:
        lead = character.encode("gb2312" if name == "GBK" else "cp932")[0]
    except UnicodeEncodeError:
        return False
    return 0xB0 <= lead <= 0xD7 if name == "GBK" else 0x88 <= lead <= 0x97
