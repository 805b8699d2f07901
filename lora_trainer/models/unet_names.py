"""The names of a Stable Diffusion UNet: CompVis' LDM form and diffusers' form, for any topology.

LDM numbers its blocks through (`input_blocks.4.1`), diffusers groups them by level
(`down_blocks.1.attentions.0`). With `n` resnets a level, a level takes `n + 1` numbers on either side.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

LDM_PREFIX = "model.diffusion_model."

OUTER = {
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
RESNET = {
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
    for ldm, diffusers in RESNET.items():
        if inner.startswith(ldm + "."):
            return f"{outer}.{diffusers}{inner[len(ldm) :]}"
    return f"{outer}.{inner}"


def _split_outer(name: str, layers_per_block: int) -> tuple[str, str]:
    """(diffusers' name of the block, name inside the block)."""
    for ldm, diffusers in OUTER.items():
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
    kind = "resnets" if inner.startswith(tuple(RESNET)) else "attentions"
    return f"{block}.{kind}.{position}", inner


def to_ldm(name: str, layers_per_block: int, attends: Sequence[bool]) -> str:
    """LDM's name of the UNet module that diffusers calls `name`; `attends`: which levels of the up side do."""
    for ldm, diffusers in OUTER.items():
        if name == diffusers or name.startswith(diffusers + "."):
            return _joined(ldm, name[len(diffusers) + 1 :])
    side, level, kind, position, *inner = name.split(".")
    first = int(level) * (layers_per_block + 1) + (1 if side == "down_blocks" else 0)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers_per_block}.0.op"
    if kind == "upsamplers":
        # Behind the resnet and, where the level has one, the attention.
        return f"output_blocks.{first + layers_per_block}.{2 if attends[int(level)] else 1}.conv"
    block = f"{'input' if side == 'down_blocks' else 'output'}_blocks.{first + int(position)}"
    return _joined(f"{block}.{int(kind == 'attentions')}", ".".join(inner))


def _joined(outer: str, inner: str) -> str:
    theirs = {diffusers: ldm for ldm, diffusers in RESNET.items()}
    return ".".join(part for part in (outer, theirs.get(inner, inner)) if part)
