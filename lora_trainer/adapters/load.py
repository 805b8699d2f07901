"""Reading LoRA files, kohya's and diffusers'."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lora_trainer.adapters.naming import UNET_PREFIX, Factors, kohya_name
from lora_trainer.errors import ModelError
from lora_trainer.models.checkpoint import read_header

_KOHYA = re.compile(r"(?P<name>lora_[a-z0-9]+_.+)\.(?P<part>lora_down\.weight|lora_up\.weight|alpha)")
_DIFFUSERS = re.compile(r"unet\.(?P<name>.+)\.(?P<part>lora_A\.weight|lora_B\.weight)")
_PARTS = {"lora_down.weight": "down", "lora_A.weight": "down", "lora_up.weight": "up", "lora_B.weight": "up"}


@dataclass(frozen=True)
class Lora:
    """A file's modules by kohya's name (`lora_unet_…`), and its metadata."""

    factors: dict[str, Factors]
    metadata: dict[str, str]
    precision: str


def read_lora(path: Path) -> Lora:
    """The LoRA in a .safetensors file. Raises ModelError."""
    header = read_header(path)
    keys = [key for key in header if key != "__metadata__"]
    places = {key: _place(key) for key in keys}
    strange = [key for key, place in places.items() if place is None]
    if not keys or len(strange) == len(keys):
        kind = "a checkpoint, not a LoRA" if any("diffusion_model." in key for key in keys) else "not a LoRA"
        raise ModelError(f"{path}: this is {kind} ({len(keys)} tensors, none with lora_down or lora_A)")
    if strange:
        raise ModelError(f"{path}: {len(strange)} of {len(keys)} tensors are of another adapter, such as {strange[0]}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key).clone() for key in keys}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: cannot be read, probably truncated ({error})") from error
    modules: dict[str, dict[str, Tensor]] = {}
    for key, (name, part) in places.items():
        modules.setdefault(name, {})[part] = tensors[key]
    precision = next(header[key]["dtype"] for key in keys if not key.endswith("alpha"))
    factors = {name: _factors(path, name, parts) for name, parts in modules.items()}
    return Lora(factors, dict(header.get("__metadata__", {})), precision)


def match(lora: Lora, model: nn.Module, prefix: str = UNET_PREFIX) -> tuple[dict[str, Factors], list[str]]:
    """(factors by module name in the model's order, names under `prefix` that the model does not have)."""
    wanted = {name: factors for name, factors in lora.factors.items() if name.startswith(prefix + "_")}
    modules = {
        kohya_name(prefix, name): name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }
    matched = {module: wanted[name] for name, module in modules.items() if name in wanted}
    return matched, [name for name in wanted if name not in modules]


def _place(key: str) -> tuple[str, str] | None:
    """(kohya's module name, down | up | alpha) of a tensor; None for other kinds of adapter."""
    if found := _KOHYA.fullmatch(key):
        return found["name"], _PARTS.get(found["part"], "alpha")
    if found := _DIFFUSERS.fullmatch(key):
        return kohya_name(UNET_PREFIX, found["name"]), _PARTS[found["part"]]
    return None


def _factors(path: Path, name: str, parts: dict[str, Tensor]) -> Factors:
    if "down" not in parts or "up" not in parts:
        missing = "lora_down" if "up" in parts else "lora_up"
        raise ModelError(f"{path}: {name} lacks its {missing}")
    down, up = parts["down"], parts["up"]
    if down.shape[0] != up.shape[1]:
        raise ModelError(f"{path}: {name} has ranks {down.shape[0]} and {up.shape[1]}; expected equal ones")
    # Without an alpha the scale is 1, as every loader has it.
    alpha = parts["alpha"].item() if "alpha" in parts else float(down.shape[0])
    return Factors(down, up, alpha)
