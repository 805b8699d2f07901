"""LDM state dicts for tests: the names and shapes of a diffusers model in the WebUI's form."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

SD15_UNET = {
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD15_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_state(config: dict, dtype: torch.dtype = torch.float32, fill=torch.empty) -> dict[str, Tensor]:
    """`model.diffusion_model.*` of a UNet with `config`; memory is allocated but not touched by default."""
    with torch.device("meta"):
        shapes = UNet2DConditionModel(**config).state_dict()
    layers = config["layers_per_block"]
    return {
        "model.diffusion_model." + _ldm_unet(name, layers): fill(tuple(tensor.shape), dtype=dtype)
        for name, tensor in shapes.items()
    }


def vae_state(config: dict, dtype: torch.dtype = torch.float32, fill=torch.empty) -> dict[str, Tensor]:
    """`first_stage_model.*` of a VAE with `config`, its attention as 1×1 convolutions."""
    with torch.device("meta"):
        shapes = AutoencoderKL(**config).state_dict()
    levels = len(config["block_out_channels"])
    state = {}
    for name, tensor in shapes.items():
        shape = tuple(tensor.shape)
        conv = "attentions" in name and len(shape) == 2
        state["first_stage_model." + _ldm_vae(name, levels)] = fill((*shape, 1, 1) if conv else shape, dtype=dtype)
    return state


def _ldm_unet(name: str, layers: int) -> str:
    outer = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    for mine, theirs in outer.items():
        if name.startswith(mine + "."):
            return theirs + "." + _inner(name[len(mine) + 1 :])
    side, level, kind, place, *rest = name.split(".")
    level, place, inner = int(level), int(place), ".".join(rest)
    down = side == "down_blocks"
    if kind in ("downsamplers", "upsamplers"):
        place = layers
    number = level * (layers + 1) + place + (1 if down else 0)
    if kind == "downsamplers":
        return f"input_blocks.{number}.0.op.{rest[-1]}"
    if kind == "upsamplers":
        # The first up level of SD1 has no attention, so its upsampler comes second.
        return f"output_blocks.{number}.{1 if level == 0 else 2}.{inner}"
    return f"{'input' if down else 'output'}_blocks.{number}.{int(kind == 'attentions')}.{_inner(inner)}"


def _inner(inner: str) -> str:
    head, _, tail = inner.rpartition(".")
    return ".".join(part for part in (RESNET.get(head, head), tail) if part)


def _ldm_vae(name: str, levels: int) -> str:
    parts = {
        "mid_block.resnets.0": "mid.block_1",
        "mid_block.resnets.1": "mid.block_2",
        "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
        "mid_block.attentions.0.to_q": "mid.attn_1.q",
        "mid_block.attentions.0.to_k": "mid.attn_1.k",
        "mid_block.attentions.0.to_v": "mid.attn_1.v",
        "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
        "conv_norm_out": "norm_out",
        "conv_shortcut": "nin_shortcut",
    }
    for mine, theirs in parts.items():
        name = name.replace(mine, theirs)
    for way in ("down", "up"):
        for level in range(levels):
            number = level if way == "down" else levels - 1 - level
            name = name.replace(f"{way}_blocks.{level}.resnets.", f"{way}.{number}.block.")
            name = name.replace(f"{way}_blocks.{level}.{way}samplers.0.", f"{way}.{number}.{way}sample.")
    return name
