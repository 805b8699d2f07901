"""The names of a Stable Diffusion UNet: CompVis' LDM form and diffusers' form, for any topology.

LDM numbers its blocks through (`input_blocks.4.1`), diffusers groups them by level
(`down_blocks.1.attentions.0`). With `n` resnets a level, a level takes `n + 1` numbers on either side.
"""

from __future__ import annotations

import re

LDM_PREFIX = "model.diffusion_model."

_OUTER = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_BLOCK = re.compile(r"(input_blocks|output_blocks)\.(\d+)\.(\d+)\.(.+)")


def to_diffusers(name: str, layers_per_block: int) -> str:
    """diffusers' name of the UNet tensor `name` (LDM form, without `model.diffusion_model.`)."""
    outer, inner = _split_outer(name, layers_per_block)
    for ldm, diffusers in _RESNET.items():
        if inner.startswith(ldm + "."):
            return f"{outer}.{diffusers}{inner[len(ldm) :]}"
    return f"{outer}.{inner}"


def _split_outer(name: str, layers_per_block: int) -> tuple[str, str]:
    """(diffusers' name of the block, name inside the block)."""
    for ldm, diffusers in _OUTER.items():
        if name.startswith(ldm + "."):
            return diffusers, name[len(ldm) + 1 :]
    match = _BLOCK.fullmatch(name)
    if match is None:
        raise KeyError(name)
    side, number, _, inner = match.groups()
    down = side == "input_blocks"
    level, position = divmod(int(number) - 1 if down else int(number), layers_per_block + 1)
    block = f"{'down' if down else 'up'}_blocks.{level}"
    if inner.startswith("op."):
        return f"{block}.downsamplers.0", "conv." + inner[3:]
    if inner.startswith("conv."):
        return f"{block}.upsamplers.0", inner
    kind = "resnets" if inner.startswith(tuple(_RESNET)) else "attentions"
    return f"{block}.{kind}.{position}", inner
