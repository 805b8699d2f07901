"""The names of a Stable Diffusion VAE: CompVis' LDM form and diffusers' form."""

from __future__ import annotations

import re

LDM_PREFIX = "first_stage_model."

_PARTS = {
    "mid.block_1.": "mid_block.resnets.0.",
    "mid.block_2.": "mid_block.resnets.1.",
    "mid.attn_1.norm.": "mid_block.attentions.0.group_norm.",
    "mid.attn_1.q.": "mid_block.attentions.0.to_q.",
    "mid.attn_1.k.": "mid_block.attentions.0.to_k.",
    "mid.attn_1.v.": "mid_block.attentions.0.to_v.",
    "mid.attn_1.proj_out.": "mid_block.attentions.0.to_out.0.",
    "norm_out.": "conv_norm_out.",
    "nin_shortcut.": "conv_shortcut.",
}
_BLOCK = re.compile(r"\.(down|up)\.(\d+)\.block\.(\d+)\.")
_RESAMPLE = re.compile(r"\.(down|up)\.(\d+)\.(down|up)sample\.")


def to_diffusers(name: str, levels: int) -> str:
    """diffusers' name of the VAE tensor `name` (LDM form, without `first_stage_model.`).

    LDM numbers the decoder's levels from the picture inwards, diffusers from the latents outwards.
    """

    def level(side: str, number: str) -> int:
        return int(number) if side == "down" else levels - 1 - int(number)

    name = _BLOCK.sub(lambda m: f".{m[1]}_blocks.{level(m[1], m[2])}.resnets.{m[3]}.", name)
    name = _RESAMPLE.sub(lambda m: f".{m[1]}_blocks.{level(m[1], m[2])}.{m[3]}samplers.0.", name)
    for ldm, diffusers in _PARTS.items():
        name = name.replace(ldm, diffusers)
    return name
