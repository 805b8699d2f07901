"""Safetensors files whose equal inputs give equal bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping

import torch
from torch import Tensor

DTYPES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A .safetensors file (github.com/huggingface/safetensors, "Format") with sorted header and tensors."""
    return b"".join(in_parts(tensors, metadata))


def in_parts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """`serialize` in parts: the header, then each tensor, without copying those that lie whole in memory.

    The official library orders metadata at random in each process. Metadata is UTF-8: what cannot be encoded (a
    folder's name in another encoding, on Linux) becomes "?", since a finished run is worth more than a name.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    # Wide dtypes first, as the official writer has it, so that every tensor is aligned to its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    parts, end = [], 0
    for name in names:
        data = raw(tensors[name])
        header[name] = {
            "dtype": DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [end, end + data.nbytes],
        }
        parts.append(data)
        end += data.nbytes
    text = json.dumps(header, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    text += b" " * (-len(text) % 8)
    return [struct.pack("<Q", len(text)) + text, *parts]


def raw(tensor: Tensor) -> memoryview:
    """A tensor's numbers, without copying those that lie whole in memory."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
