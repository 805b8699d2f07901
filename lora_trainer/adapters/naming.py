"""Names of LoRA tensors in files: kohya's form, which the WebUI reads, and diffusers' own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

UNET_PREFIX = "lora_unet"
TEXT_PREFIX = "lora_te"


@dataclass(frozen=True)
class Factors:
    """One module's LoRA: W + (alpha / r) up · down.

    down: [r, in] or [r, in, kh, kw]; up: [out, r] or [out, r, 1, 1].
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def kohya_name(prefix: str, module_name: str) -> str:
    """kohya's name of a module, such as lora_unet_down_blocks_0_attentions_0_proj_in."""
    if prefix.startswith(TEXT_PREFIX):
        module_name = text_name(module_name)
    return f"{prefix}_{module_name.replace('.', '_')}"


def text_name(module_name: str) -> str:
    """A text encoder module's name in files: transformers 5 dropped CLIP's `text_model` level, files keep it."""
    return module_name if module_name.startswith("text_model.") else f"text_model.{module_name}"


def to_kohya(prefix: str, factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The tensors of `factors` (by module name) under kohya's names, each module with its true alpha."""
    tensors: dict[str, Tensor] = {}
    for module_name, f in factors.items():
        name = kohya_name(prefix, module_name)
        tensors[f"{name}.lora_down.weight"] = f.down
        tensors[f"{name}.lora_up.weight"] = f.up
        tensors[f"{name}.alpha"] = torch.tensor(f.alpha, dtype=torch.float32)
    return tensors


def to_diffusers(factors: Mapping[str, Factors], network: str = "unet") -> dict[str, Tensor]:
    """The tensors of `factors` under the names of pytorch_lora_weights.safetensors; `network` is diffusers' name of it.

    Only recent diffusers can read an alpha with this form, from the header; every version applies up · down as it is
    when there is none, so alpha / rank is folded into up.
    """
    tensors: dict[str, Tensor] = {}
    for module_name, f in factors.items():
        tensors[f"{network}.{module_name}.lora_A.weight"] = f.down
        tensors[f"{network}.{module_name}.lora_B.weight"] = f.up * (f.alpha / f.rank)
    return tensors
