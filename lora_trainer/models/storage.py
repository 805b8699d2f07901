"""The formats in which a frozen weight takes fewer bits than it computes in.

fp8 is plain e4m3 (Micikevicius et al. 2022, arXiv:2209.05433), cast without a scale, as the WebUI's fp8 and kohya's
fp8_base are. int8 is LLM.int8's (Dettmers et al. 2022, arXiv:2208.07339): each row by its largest weight, which takes
no column of outliers apart, since only weights are rounded and products stay in the compute dtype. nf4 is QLoRA's
(Dettmers et al. 2023, arXiv:2305.14314) in blocks of 64, each with its largest weight in fp32: quantising those too
would save 0.4 bits a weight and cost another kernel at each use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_trainer.errors import ConfigError

# As the base computes: no format of its own.
AUTO = "auto"
BLOCK = 64
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0

Codes = tuple[Tensor, ...]


@dataclass(frozen=True)
class Storage:
    """`encode` a matrix [out, in] of the compute dtype; `decode` it again to its shape and a dtype, without waiting for
    the device. `package`: whose kernels they are, None for torch's own."""

    name: str
    encode: Callable[[Tensor], Codes]
    decode: Callable[[Codes, torch.Size, torch.dtype], Tensor]
    package: str | None = None


def _to_fp8(weight: Tensor) -> Codes:
    # What is larger would become NaN.
    return (weight.clamp(-FP8_MAX, FP8_MAX).to(FP8),)


def _from_fp8(codes: Codes, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return codes[0].to(dtype)


def _to_int8(weight: Tensor) -> Codes:
    rows, largest, _ = _bitsandbytes().int8_vectorwise_quant(weight.half())
    return rows, (largest / 127).view(-1, 1)


def _from_int8(codes: Codes, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    rows, scale = codes
    # One kernel, which multiplies in fp32: bitsandbytes' own would write all of it in fp32 first.
    return torch.mul(rows, scale, out=torch.empty(shape, dtype=dtype, device=rows.device))


def _to_nf4(weight: Tensor) -> Codes:
    codes, state = _bitsandbytes().quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    return codes, state.absmax


def _from_nf4(codes: Codes, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    state = _bitsandbytes().QuantState(codes[1], shape=shape, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
    return _bitsandbytes().dequantize_4bit(codes[0], state)


def _bitsandbytes() -> Any:
    from bitsandbytes import functional

    return functional


STORAGES: Mapping[str, Storage] = {
    storage.name: storage
    for storage in (
        Storage("fp8", _to_fp8, _from_fp8),
        Storage("int8", _to_int8, _from_int8, "bitsandbytes"),
        Storage("nf4", _to_nf4, _from_nf4, "bitsandbytes"),
    )
}
# Those that take less, the nearest first. int8 takes as much as fp8, which needs no package.
LIGHTER = {AUTO: ("fp8", "nf4"), "fp8": ("nf4",), "int8": ("nf4",), "nf4": ()}


def storage_of(name: str, device: torch.device) -> Storage | None:
    """The format `name` (base_precision), None for AUTO. Raises ConfigError where its package is not installed or has
    nothing for `device`, which is tried on a small matrix."""
    if name == AUTO:
        return None
    storage = STORAGES[name]
    try:
        matrix = torch.ones(BLOCK, BLOCK, device=device)
        storage.decode(storage.encode(matrix), matrix.shape, matrix.dtype)
    except torch.cuda.OutOfMemoryError:
        return storage  # there is such a kernel
    except Exception as error:  # a package that is not made for this machine raises anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        if storage.package is None:
            raise ConfigError(
                [f"base_precision: {name} does not work on {device} ({reason}); take base_precision=auto"]
            ) from error
        missing = isinstance(error, ModuleNotFoundError)
        why = "is not installed" if missing else f"does not work on {device} ({reason})"
        raise ConfigError(
            [
                f"base_precision: {name} needs the package {storage.package}, which {why}; "
                f"`pip install {storage.package}`, or base_precision=fp8"
            ]
        ) from error
    return storage


def lighter_than(name: str, device: torch.device) -> tuple[str, ...]:
    """The formats that take less memory than `name` and work on `device`, the nearest first."""
    return tuple(each for each in LIGHTER[name] if _works(each, device))


def _works(name: str, device: torch.device) -> bool:
    try:
        storage_of(name, device)
    except ConfigError:
        return False
    return True
