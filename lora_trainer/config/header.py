"""The JSON at the start of a .safetensors file."""

from __future__ import annotations

import json
import os
from pathlib import Path

# A quarter of a million tensors, or the tags of a hundred thousand pictures. Parsed, it can take 30 times as much.
MAX_HEADER_BYTES = 16 * 1024 * 1024


def read_json_header(path: Path) -> dict[str, object]:
    """8 bytes of length (little-endian), then a JSON object. Raises OSError, and ValueError for other files."""
    with path.open("rb") as file:
        start, size = file.read(8), os.fstat(file.fileno()).st_size
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise ValueError("the file is shorter than its header says")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"its header has {length:,} bytes, of which at most {MAX_HEADER_BYTES:,} are read")
        try:
            header = json.loads(file.read(length))
        except RecursionError:
            raise ValueError("its header is nested too deeply") from None
    if not isinstance(header, dict):
        raise ValueError(f"a JSON {type(header).__name__}")
    return header
