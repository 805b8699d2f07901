"""Writing files: safetensors whose equal inputs give equal bytes, and publishing that is all or nothing."""

from __future__ import annotations

import errno
import json
import os
import secrets
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from lora_trainer.errors import OutputError

_DTYPES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
}


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A .safetensors file (github.com/huggingface/safetensors, "Format") with sorted header and tensors.

    The official library orders metadata at random in each process. Metadata is UTF-8: what cannot be encoded (a
    folder's name in another encoding, on Linux) becomes "?", since a finished run is worth more than a name.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    # Wide dtypes first, as the official writer has it, so that every tensor is aligned to its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    parts, end = [], 0
    for name in names:
        data = _bytes(tensors[name])
        header[name] = {
            "dtype": _DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [end, end + len(data)],
        }
        parts.append(data)
        end += len(data)
    text = json.dumps(header, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    text += b" " * (-len(text) % 8)
    return b"".join([struct.pack("<Q", len(text)), text, *parts])


def publish(data: bytes, target: Path) -> None:
    """Put `data` under `target` whole: a temporary file in the same folder, flushed, then moved into place.

    Raises OutputError; `target` is then as it was and no temporary file is left.
    """
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise OutputError(f"{target}: not written: {reason} ({len(data):,} bytes)") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _sync_folder(folder: Path) -> None:
    """Make the new name survive a power cut, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
