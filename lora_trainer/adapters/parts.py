"""The networks of a model that can carry a LoRA, and what their modules are called in files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from lora_trainer.adapters.naming import UNET_PREFIX, Factors, Weights, kohya_name, native_name, to_kohya
from lora_trainer.models.families import Family
from lora_trainer.models.mmdit import MMDiT
from lora_trainer.models.model import Model
from lora_trainer.models.unet_names import to_ldm

_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class Part:
    """One network: `prefix` begins its modules' names in files, `named` makes the rest of a module's name; `ldm` makes
    LDM's, which others' files may have in any family.

    `native` has the last word on the whole name. `packed`: its attention is one tensor in the host, which applies a
    LoRA of it whole or not at all. `alphas`: the host reads them.
    """

    module: nn.Module
    prefix: str
    named: Callable[[str], str] = str
    packed: bool = False
    ldm: Callable[[str], str] = str
    native: Callable[[str], str] = str
    alphas: bool = True

    def in_files(self, factors: Mapping[str, Weights]) -> dict[str, Weights]:
        """`factors` (by module name) by the names that kohya's form gives them, and what else the WebUI needs."""
        whole = whole_attention(factors) if self.packed else factors
        return {self.native(kohya_name(self.prefix, self.named(name))): f for name, f in whole.items()}

    def to_kohya(self, factors: Mapping[str, Weights]) -> dict[str, Tensor]:
        """The tensors of `factors` (by module name) as the WebUI reads them."""
        whole = whole_attention(factors) if self.packed else factors
        tensors = to_kohya(self.prefix, {self.named(name): f for name, f in whole.items()}, alphas=self.alphas)
        return {self.native(name): tensor for name, tensor in tensors.items()}


def parts_of(model: Model) -> dict[str, Part]:
    """By diffusers' names of them; the UNet first."""
    return parts(model.facts.family, model.unet, {name: text.module for name, text in model.text.networks.items()})


def parts(family: Family, unet: UNet2DConditionModel | MMDiT, encoders: Mapping[str, nn.Module]) -> dict[str, Part]:
    """The same of a model's networks by themselves, `encoders` in their order."""
    ldm = ldm_names(unet)
    found = {"unet": Part(unet, UNET_PREFIX, ldm if family.ldm_names else str, ldm=ldm, alphas=family.alphas)}
    for (network, module), text in zip(encoders.items(), family.text, strict=True):
        found[network] = Part(
            module,
            text.lora,
            packed=text.form == "open_clip",
            native=native_name if text.native else str,
            alphas=family.alphas,
        )
    return found


def ldm_names(unet: UNet2DConditionModel | MMDiT) -> Callable[[str], str]:
    """The checkpoint's own name of a module by the view's, diffusers' name in a UNet."""
    if isinstance(unet, MMDiT):
        return str
    attends = ["CrossAttn" in kind for kind in unet.config.up_block_types]
    return partial(to_ldm, layers_per_block=unet.config.layers_per_block, attends=attends)


def layer_name(network: str, module_name: str) -> str:
    """A module's name in a run, where the two text encoders' are told apart."""
    return f"{network}.{module_name}" if network == "text_encoder_2" else module_name


def whole_attention(factors: Mapping[str, Weights]) -> dict[str, Weights]:
    """`factors` with LoRAs of zeros for those of q, k, v and out that are missing beside others: the WebUI ignores a
    partial set of a packed attention without a word."""
    whole: dict[str, Weights] = dict(factors)
    for name, f in factors.items():
        attention, _, projection = name.rpartition(".")
        if projection in _ATTENTION:
            width = next(size for size in f.sizes if size)
            nothing = Factors(torch.zeros(1, width), torch.zeros(width, 1), 1.0)
            whole |= {f"{attention}.{p}": nothing for p in _ATTENTION if f"{attention}.{p}" not in whole}
    return whole
