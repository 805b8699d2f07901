"""Hostile text, values and bytes."""

from __future__ import annotations

import json
import struct

from hypothesis import strategies as st

from lora_trainer.config.options import options
from tests.fuzz.watch import ARENA

EVIL = [
    *("", " ", ".", "..", "../../etc/passwd", "C:\\x", "\\\\nas\\x", "nul", "~", "a\0b", "\ud800", "\u202eexe.png"),
    *("<script>alert(1)</script>", "</div><script>x</script>", "'\"><img src=x onerror=x>", "<!--", "&lt;script&gt;"),
    *(
        "\x1b[2J\x1b]0;x\x07",
        "a\nb",
        "\r\n\r\n",
        "%s%n",
        "{0.__class__}",
        "$(id)",
        "`id`",
    ),
    *("nan", "inf", "-1", "1e999", "0x" + "f" * 4000, "9" * 5000, "1:1:1", "2024-13-01", "null", "~", "yes", "é", "猫"),
    *("a" * 3000, "../" * 1500, "[" * 2000, "&a [*a]", '!!int ""', "!!python/object/apply:os.system [id]"),
]
CHARACTERS = st.characters()
TEXT = (
    st.sampled_from(EVIL) | st.text(CHARACTERS, max_size=30) | st.lists(st.sampled_from(EVIL), max_size=4).map("".join)
)
UNICODE = TEXT.map(lambda text: text.encode("utf-8", "replace").decode())
NUMBERS = (
    st.integers()
    | st.floats()
    | st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**400, 10**4000, 1e308, -0.0, 1e-320, float("inf"), float("nan")])
)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(list(options())) | TEXT
FINE = {"base_model": "b.safetensors", "train_data_dir": str(ARENA.inside / "pictures")}
SETTINGS = st.dictionaries(KEYS, VALUES, max_size=6)
_NUMBERS = [0, 1, 2, 127, 128, 255, 256, 32767, 65535, 2**24, 2**31 - 1, 2**31, 2**32 - 1]
_TOKENS = [struct.pack(kind, number) for number in _NUMBERS for kind in ("<I", ">I")]
_TOKENS += [struct.pack(kind, number) for number in _NUMBERS[:9] for kind in ("<H", ">H")]
_TOKENS += [bytes([byte]) for byte in (0, 1, 2, 0x7F, 0x80, 0xFF)] + [b"\0" * 8, b"\xff" * 8, b"-1", b"9" * 50]


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes], edits: int = 6, front: int = 400) -> bytes:
    """One of `seeds` with some bytes changed, put in, taken out, doubled or cut off, mostly in its first `front`."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, edits))):
        reach = len(data) if draw(st.integers(0, 3)) == 0 else min(len(data), front)
        at = draw(st.integers(0, max(0, reach - 1)))
        size = draw(st.integers(1, 16))
        how = draw(st.integers(0, 5))
        token = draw(st.sampled_from(_TOKENS) | st.binary(min_size=1, max_size=4))
        if how <= 2:
            data[at : at + len(token)] = token
        elif how == 3:
            data[at:at] = token
        elif how == 4:
            data[at : at + size] = bytes(data[at : at + size]) * 2 if draw(st.booleans()) else b""
        elif draw(st.integers(0, 3)) == 0:
            del data[at:]
    return bytes(data)


def dumps(value: object) -> str:
    """JSON, with what Python itself refuses to write."""
    try:
        return json.dumps(value)
    except ValueError:
        return '{"lora_rank": ' + "9" * 5000 + "}"


def pieces(tokens: list[str], most: int = 40) -> st.SearchStrategy[str]:
    """Text in the alphabet of a format."""
    return st.lists(st.sampled_from(tokens) | TEXT, max_size=most).map("".join)


def file(name: str, content: bytes | str):
    """A file in the arena with this content; lone surrogates as their three bytes."""
    path = ARENA.inside / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path
