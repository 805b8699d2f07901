"""Names of LoRA tensors in files: kohya's form, which the WebUI reads, and diffusers' own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

UNET_PREFIX = "lora_unet"
TEXT_PREFIX = "lora_te"
# What a layer's parts are called in transformers and in OpenCLIP.
_PARTS = {"self_attn": "attn", "mlp_fc1": "mlp_c_fc", "mlp_fc2": "mlp_c_proj"}
_KOHYAS = re.compile(rf"{TEXT_PREFIX}2_text_model_encoder_layers_(\d+)_({'|'.join(_PARTS)})(?=[_.]|$)")
_NATIVE = re.compile(rf"0_model_transformer_resblocks_(\d+)_({'|'.join(_PARTS.values())})(?=[_.]|$)")


class Weights(Protocol):
    """One module's adapter, as a file holds it."""

    @property
    def alpha(self) -> float | None:
        """None where there is none, in files too."""
        ...

    @property
    def rank(self) -> int | None:
        """None where it has none."""
        ...

    @property
    def kind(self) -> str:
        """What it is called: LoRA, LoHa, …"""
        ...

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """(outputs, inputs of each) of the module: the numbers of a convolution's kernel count as inputs. None: the
        tensors do not tell."""
        ...

    def parts(self) -> dict[str, Tensor]:
        """The tensors by what files call them, without the alpha."""
        ...

    def delta(self, weight: Tensor) -> Tensor:
        """What is added to the module's `weight`, in its shape and the tensors' dtype, with gradients."""
        ...


@dataclass(frozen=True)
class Factors:
    """One module's LoRA: W + (alpha / r) up · down.

    down: [r, in] or [r, in, kh, kw]; up: [out, r] or [out, r, 1, 1]. With a dora_scale m, [1, in] or [1, in, 1, 1], it
    is DoRA (Liu et al. 2024, arXiv:2402.09353): each input channel of the sum is brought to the norm m. The paper
    normalises the weight's columns, as all hosts do for a scale of this shape; PEFT's own DoRA does its rows.
    """

    down: Tensor
    up: Tensor
    alpha: float
    dora_scale: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def kind(self) -> str:
        return "LoRA" if self.dora_scale is None else "DoRA"

    @property
    def sizes(self) -> tuple[int, int]:
        return self.up.shape[0], self.down[0].numel()

    def parts(self) -> dict[str, Tensor]:
        scale = {} if self.dora_scale is None else {"dora_scale": self.dora_scale}
        return {"lora_down.weight": self.down, "lora_up.weight": self.up, **scale}

    def delta(self, weight: Tensor) -> Tensor:
        product = (self.up.flatten(1) @ self.down.flatten(1) * (self.alpha / self.rank)).view(weight.shape)
        if self.dora_scale is None:
            return product
        return (weight + product) * self.channels(weight + product) - weight

    def channels(self, merged: Tensor) -> Tensor:
        """By what DoRA multiplies the input channels of W + (alpha / r) up · down, [1, in] or [1, in, 1, 1]."""
        return self.dora_scale.view(1, -1, *[1] * (merged.dim() - 2)) / column_norms(merged)


def column_norms(weight: Tensor) -> Tensor:
    """‖W‖ of each input channel: [1, in], or [1, in, 1, 1] of a convolution."""
    return weight.transpose(0, 1).flatten(1).norm(dim=1).view(1, -1, *[1] * (weight.dim() - 2))


def kohya_name(prefix: str, module_name: str) -> str:
    """kohya's name of a module, such as lora_unet_down_blocks_0_attentions_0_proj_in."""
    if prefix.startswith(TEXT_PREFIX):
        module_name = text_name(module_name)
    return f"{prefix}_{module_name.replace('.', '_')}"


def text_name(module_name: str) -> str:
    """A text encoder module's name in files: transformers 5 dropped CLIP's `text_model` level, files keep it."""
    return module_name if module_name.startswith("text_model.") else f"text_model.{module_name}"


def native_name(name: str) -> str:
    """kohya's name of a module or tensor of SDXL's second text encoder, as the WebUI itself calls it where that is the
    only one (a refiner's): kohya has no name for that, and the WebUI's loader finds no other
    (`assign_network_names_to_compvis_modules` in its Lora extension). Other names stay as they are."""
    return _KOHYAS.sub(lambda found: f"0_model_transformer_resblocks_{found[1]}_{_PARTS[found[2]]}", name)


def from_native(name: str) -> str:
    """kohya's name of what the WebUI calls `name`: the inverse of `native_name`."""
    theirs = {native: kohya for kohya, native in _PARTS.items()}
    return _NATIVE.sub(lambda found: f"{TEXT_PREFIX}2_text_model_encoder_layers_{found[1]}_{theirs[found[2]]}", name)


def to_kohya(prefix: str, factors: Mapping[str, Weights], *, alphas: bool = True) -> dict[str, Tensor]:
    """The tensors of `factors` (by module name) under kohya's names, each module with its true alpha, if it has one.
    LyCORIS names its own alike (github.com/KohakuBlueleaf/LyCORIS). Without `alphas`, LoRAs have alpha / rank folded
    into up, as all loaders read what has none."""
    tensors: dict[str, Tensor] = {}
    for module_name, f in factors.items():
        name = kohya_name(prefix, module_name)
        parts = f.parts() if alphas else folded(f).parts()
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        if alphas and f.alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(f.alpha, dtype=torch.float32)
    return tensors


def folded(f: Factors) -> Factors:
    """The same LoRA with alpha = rank."""
    return replace(f, up=f.up * (f.alpha / f.rank), alpha=float(f.rank))


def to_diffusers(factors: Mapping[str, Factors], network: str = "unet") -> dict[str, Tensor]:
    """The tensors of `factors` under the names of pytorch_lora_weights.safetensors; `network` is diffusers' name of it.

    Only recent diffusers can read an alpha with this form, from the header; every version applies up · down as it is
    when there is none, so alpha / rank is folded into up.
    """
    tensors: dict[str, Tensor] = {}
    for module_name, f in factors.items():
        tensors[f"{network}.{module_name}.lora_A.weight"] = f.down
        tensors[f"{network}.{module_name}.lora_B.weight"] = folded(f).up
    return tensors
