"""Reading a single-file checkpoint: shapes first, tensors placed once.

The tensors of a file are never used through its memory mapping: whoever truncates or replaces a mapped file
kills the process that reads it (SIGBUS), so each tensor is copied to its place and the mapping is dropped.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_trainer.errors import ModelError

MAX_HEADER_BYTES = 100 * 1024 * 1024
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth")
# The parts of a Stable Diffusion file that a run needs; EMA copies and training leftovers stay in the file.
PARTS = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.", "alphas_cumprod")

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
    """The JSON header of a `.safetensors` file (8 bytes little-endian length, then JSON).

    Raises ModelError for a file that is missing, truncated or of another kind.
    """
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > MAX_HEADER_BYTES:
                raise ValueError("its header is too long")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError(f"a JSON {type(header).__name__}")
        return header
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; expected a .safetensors checkpoint") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError, struct.error) as error:
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
    header = read_header(path)
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def read_tensors(path: Path, device: torch.device, dtype_of: Placement) -> dict[str, Tensor]:
    """The tensors of the model's parts, each copied once to `device` as `dtype_of(name)`.

    Integer tensors keep their dtype. Raises ModelError for a truncated file.
    """
    if path.suffix.lower() in PICKLE_SUFFIXES:
        return {
            name: _placed(name, tensor, device, dtype_of)
            for name, tensor in _unpickle(path).items()
            if name.startswith(PARTS)
        }
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = [name for name in file.keys() if name.startswith(PARTS)]  # noqa: SIM118 (not a mapping)
            return {name: _placed(name, file.get_tensor(name), device, dtype_of) for name in names}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: cannot be read, probably a truncated download ({error})") from error


def _placed(name: str, tensor: Tensor, device: torch.device, dtype_of: Placement) -> Tensor:
    dtype = dtype_of(name) if tensor.is_floating_point() else tensor.dtype
    return tensor.to(device=device, dtype=dtype, copy=True).contiguous()


def _unpickle(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ModelError(
            f"{path}: not loaded, since it is truncated or holds more than tensors, and unpickling that could run "
            f"code; convert it to .safetensors first ({str(error).splitlines()[0]})"
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict):
        raise ModelError(f"{path}: expected a dictionary of tensors, found {type(loaded).__name__}")
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
