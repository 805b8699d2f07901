"""The networks of a model that can carry a LoRA, and what their modules are called in files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from lora_trainer.adapters.naming import UNET_PREFIX, Factors, Weights, to_kohya
from lora_trainer.models.model import Model
from lora_trainer.models.unet_names import to_ldm

_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class Part:
    """One network: `prefix` begins its modules' names in files, `named` makes the rest of a module's name.

    `packed`: its attention is one tensor in the host, which applies a LoRA of it whole or not at all.
    """

    module: nn.Module
    prefix: str
    named: Callable[[str], str] = str
    packed: bool = False

    def to_kohya(self, factors: Mapping[str, Weights]) -> dict[str, Tensor]:
        """The tensors of `factors` (by module name) as the WebUI reads them."""
        whole = whole_attention(factors) if self.packed else factors
        return to_kohya(self.prefix, {self.named(name): f for name, f in whole.items()})


def parts_of(model: Model) -> dict[str, Part]:
    """By diffusers' names of them; the UNet first."""
    family = model.facts.family
    parts = {"unet": Part(model.unet, UNET_PREFIX, ldm_names(model.unet) if family.ldm_names else str)}
    for (network, encoder), text in zip(model.text.networks.items(), family.text, strict=True):
        parts[network] = Part(encoder.module, text.lora, packed=text.form == "open_clip")
    return parts


def ldm_names(unet: UNet2DConditionModel) -> Callable[[str], str]:
    """The checkpoint's own name of a module by diffusers' name."""
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
            width = f.sizes[1]
            nothing = Factors(torch.zeros(1, width), torch.zeros(width, 1), 1.0)
            whole |= {f"{attention}.{p}": nothing for p in _ATTENTION if f"{attention}.{p}" not in whole}
    return whole
