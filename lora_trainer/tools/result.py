"""Where the tools' files go, and what their numbers are rounded to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from lora_trainer.adapters.load import Lora
from lora_trainer.adapters.metadata import sizes
from lora_trainer.adapters.naming import Factors
from lora_trainer.adapters.save import PRECISIONS, assemble
from lora_trainer.errors import OutputError
from lora_trainer.files import publish

SUFFIX = ".safetensors"


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """Before anything is computed. Raises OutputError."""
    if target.suffix != SUFFIX:
        raise OutputError(f"{target}: expected a name that ends in {SUFFIX}")
    if target.is_dir() or (target.exists() and not overwrite):
        raise OutputError(f"{target}: it exists already; expected a new name, or --overwrite")


def write(factors: Mapping[str, Factors], target: Path, metadata: Mapping[str, str], precision: str | None) -> None:
    """`factors` (by kohya's names) as the WebUI reads them, in `precision` or as they are; with their sizes in the
    header. Raises OutputError."""
    rounded = {name: in_precision(f, precision) for name, f in factors.items()}
    for name, f in rounded.items():
        if not (f.down.float().isfinite().all() and f.up.float().isfinite().all()):
            raise OutputError(f"{target}: not written: {name} is not finite, or needs --precision fp32")
    publish(assemble(kohya_tensors(rounded), {**metadata, **sizes(rounded.values())}), target)


def kohya_tensors(
    factors: Mapping[str, Factors], alphas: Mapping[str, Tensor | None] = MappingProxyType({})
) -> dict[str, Tensor]:
    """Each module's down, up and alpha: the tensor in `alphas` (None: without one), else an fp32 scalar."""
    tensors: dict[str, Tensor] = {}
    for name, f in factors.items():
        alpha = alphas.get(name, torch.tensor(f.alpha, dtype=torch.float32))
        parts = {"lora_down.weight": f.down, "lora_up.weight": f.up, "alpha": alpha}
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items() if tensor is not None}
    return tensors


def in_precision(f: Factors, precision: str | None) -> Factors:
    if precision is None:
        return f
    dtype = PRECISIONS[precision]
    return Factors(f.down.to(dtype), f.up.to(dtype), f.alpha)


def widest(loras: Iterable[Lora]) -> torch.dtype:
    """The number format that holds those of all, of at least 16 bits."""
    kinds = {t.dtype for lora in loras for f in lora.factors.values() for t in (f.down, f.up)}
    kinds = {kind if kind.itemsize > 1 else torch.float16 for kind in kinds}
    return reduce(torch.promote_types, kinds)
