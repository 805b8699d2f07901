"""The hashes by which the WebUI and its tools know files."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

BLOCK = 1024 * 1024
WINDOW_START, WINDOW_SIZE = 0x100000, 0x10000


def model_hash(data: bytes) -> str:
    """`sshs_model_hash`: SHA-256 of what follows the header of a .safetensors file."""
    length = struct.unpack_from("<Q", data)[0]
    return hashlib.sha256(memoryview(data)[8 + length :]).hexdigest()


def legacy_hash(data: bytes) -> str:
    """`sshs_legacy_hash` of a file serialised with only its `ss_` metadata: 8 digits of a window's SHA-256."""
    return hashlib.sha256(data[WINDOW_START : WINDOW_START + WINDOW_SIZE]).hexdigest()[:8]


def checkpoint_hashes(path: Path) -> tuple[str, str]:
    """(A1111's old 8 digits, full SHA-256) of a checkpoint file: ss_sd_model_hash, ss_new_sd_model_hash.

    Raises OSError.
    """
    whole = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(WINDOW_START)
        legacy = hashlib.sha256(file.read(WINDOW_SIZE)).hexdigest()[:8]
        file.seek(0)
        while block := file.read(BLOCK):
            whole.update(block)
    return legacy, whole.hexdigest()
