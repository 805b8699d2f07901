"""Reading a single-file checkpoint: shapes first, tensors placed once.

The tensors of a file are read, never mapped into memory: whoever truncates or replaces a mapped file kills the process
that reads it (SIGBUS).
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_trainer.config.header import read_json_header
from lora_trainer.errors import ModelError

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth")
# The parts of a Stable Diffusion file that a run needs; EMA copies and training leftovers stay in the file.
PARTS = (
    *("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.", "alphas_cumprod"),
    *("text_encoders.clip_l.", "text_encoders.clip_g."),
)
# Tensors that say by being there that a model predicts v, and that its schedule ends without signal.
V_PREDICTION, ZERO_TERMINAL = FLAGS = ("v_pred", "ztsnr")

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

Shapes = Mapping[str, tuple[int, ...]]
Placement = Callable[[str], torch.dtype]


@dataclass(frozen=True)
class FileIdentity:
    """What tells that a file is still the one that was read."""

    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> FileIdentity:
        stat = path.stat()
        return cls(stat.st_size, stat.st_mtime_ns)


def read_header(path: Path) -> dict[str, dict]:
    """The JSON header of a `.safetensors` file, in which each tensor has its `dtype` and `shape`.

    Raises ModelError for a file that is missing, truncated or of another kind.
    """
    try:
        header = read_json_header(path)
        strange = next((name for name, entry in header.items() if not _describes(name, entry)), None)
        if strange is not None:
            raise ValueError(f"no dtype and shape for {strange!r}")
        return header
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; expected a .safetensors checkpoint") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(
            f"{path}: not a .safetensors file, or a truncated download (expected a header, found: {error})"
        ) from error


def read_shapes(path: Path) -> Shapes:
    """Name and shape of every tensor, without reading the tensors of a `.safetensors` file.

    Raises ModelError.
    """
    if not path.exists():
        raise ModelError(f"{path}: no such file; expected a Stable Diffusion checkpoint")
    if path.suffix.lower() in PICKLE_SUFFIXES:
        return {name: tuple(tensor.shape) for name, tensor in _unpickle(path).items()}
    _refuse_gguf(path)
    header = read_header(path)
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def _refuse_gguf(path: Path) -> None:
    """github.com/ggml-org/ggml, docs/gguf.md. What cannot be read is said by who reads it."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) == b"GGUF":
                raise ModelError(
                    f"{path}: this is a quantised model in GGUF; expected a .safetensors or .ckpt checkpoint"
                )


def _describes(name: str, entry: object) -> bool:
    """Whether this is what a header says of the tensor `name`, or the metadata."""
    if not isinstance(entry, dict):
        return False
    shape = entry.get("shape")
    sizes = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    return name == "__metadata__" or (sizes and isinstance(entry.get("dtype"), str))


def read_tensors(
    path: Path,
    device: torch.device,
    dtype_of: Placement,
    stored: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> dict[str, Tensor]:
    """The tensors of the model's parts, each copied once to `device` as `dtype_of(name)`, and kept as `stored` returns
    it before the next is read.

    Integer tensors keep their dtype. Raises ModelError for a truncated file.
    """
    if path.suffix.lower() in PICKLE_SUFFIXES:
        return {
            name: stored(name, tensor.to(device=device, dtype=_dtype(name, tensor, dtype_of), copy=True).contiguous())
            for name, tensor in _unpickle(path).items()
            if _needed(name)
        }
    return {
        name: stored(name, tensor.to(device=device, dtype=_dtype(name, tensor, dtype_of)))
        for name, tensor in stored_tensors(path, _needed)
    }


def _needed(name: str) -> bool:
    return name.startswith(PARTS) or name in FLAGS


def stored_tensors(
    path: Path, wanted: Callable[[str], bool] = lambda name: True, *, as_stored: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of a `.safetensors` file where `wanted(name)`, each in memory of its own; in the order of their
    names, or `as_stored` in that of the file.

    Not by safetensors' `get_tensor`, which loses two integers a call (seen with 0.4.2 and 0.8.0). Raises ModelError.
    """
    header = read_header(path)
    try:
        # It checks that the header fits the file.
        with safe_open(path, framework="pt", device="cpu") as checked:
            names = sorted(name for name in checked.keys() if wanted(name))  # noqa: SIM118 (not a mapping)
        if as_stored:
            # Those without numbers share their place with others.
            names.sort(key=lambda name: header[name]["data_offsets"])
        with path.open("rb") as file:
            start = 8 + struct.unpack("<Q", file.read(8))[0]
            for name in names:
                if header[name]["dtype"] not in DTYPES:
                    raise ModelError(f"{path}: {name!r} holds {header[name]['dtype']} numbers; expected F16 or F32")
                yield name, _read(file, start, header[name])
    except (SafetensorError, OSError, EOFError, struct.error, LookupError, RuntimeError, TypeError) as error:
        raise ModelError(f"{path}: cannot be read, probably a truncated download ({error})") from error


def _read(file: BinaryIO, start: int, entry: Mapping) -> Tensor:
    begin, end = entry["data_offsets"]
    data = torch.empty(end - begin, dtype=torch.uint8)
    file.seek(start + begin)
    if file.readinto(data.numpy()) != end - begin:
        raise EOFError("it ends before its last tensor")
    return data.view(DTYPES[entry["dtype"]]).view(entry["shape"])


def _dtype(name: str, tensor: Tensor, dtype_of: Placement) -> torch.dtype:
    return dtype_of(name) if tensor.is_floating_point() else tensor.dtype


def _unpickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled checkpoint, by torch's unpickler that makes nothing but tensors and plain values."""
    try:
        _refuse_packed(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # On damaged bytes it raises nearly anything: UnpicklingError, RuntimeError, KeyError, EOFError, ….
        raise ModelError(
            f"{path}: not loaded, since it is truncated or holds more than tensors, and unpickling that could run "
            f"code; convert it to .safetensors first ({str(error).partition(chr(10))[0] or type(error).__name__})"
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict):
        raise ModelError(f"{path}: expected a dictionary of tensors, found {type(loaded).__name__}")
    return {name: tensor for name, tensor in state.items() if isinstance(name, str) and _is_whole(tensor)}


def _refuse_packed(path: Path) -> None:
    """torch never compresses; what is compressed may be a thousand times as large as the file."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            packed = next((entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED), None)
        if packed is not None:
            raise ValueError(f"{packed.filename!r} is compressed")


def _is_whole(value: object) -> bool:
    """Whether this is a tensor that lies in memory number by number: a pickle can name a few as if they were many."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
        return False
    return math.prod(value.shape) * value.element_size() <= value.untyped_storage().nbytes()
