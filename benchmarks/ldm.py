"""Names and shapes of single-file checkpoints: UNets of any topology in LDM's form, CLIP in both of its forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from lora_trainer.models.mmdit import MMDiT, Sizes

Shapes = dict[str, tuple[int, ...]]

OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_state(config: Mapping[str, Any]) -> Shapes:
    """`model.diffusion_model.*` of a diffusers UNet with `config`."""
    with torch.device("meta"):
        tensors = UNet2DConditionModel(**config).state_dict()
    return {"model.diffusion_model." + unet_name(name, config): tuple(t.shape) for name, t in tensors.items()}


def mmdit_state(sizes: Sizes) -> Shapes:
    """`model.diffusion_model.*` of Stable Diffusion 3's network, whose names are those of the checkpoint."""
    with torch.device("meta"):
        tensors = MMDiT(sizes).state_dict()
    return {f"model.diffusion_model.{name}": tuple(t.shape) for name, t in tensors.items()}


def unet_name(name: str, config: Mapping[str, Any]) -> str:
    """LDM's name of the tensor that diffusers calls `name`: LDM numbers blocks through, diffusers by level."""
    for ours, theirs in OUTER.items():
        if name.startswith(ours + "."):
            return f"{theirs}.{_inner(name[len(ours) + 1 :])}"
    side, level, kind, place, inner = name.split(".", 4)
    layers, down = config["layers_per_block"], side == "down_blocks"
    first = int(level) * (layers + 1) + (1 if down else 0)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers}.0.{inner.replace('conv.', 'op.')}"
    if kind == "upsamplers":
        # It comes after the resnet and, where the level has one, the attention.
        behind = 2 if "CrossAttn" in config["up_block_types"][int(level)] else 1
        return f"output_blocks.{first + layers}.{behind}.{inner}"
    number = first + int(place)
    return f"{'input' if down else 'output'}_blocks.{number}.{int(kind == 'attentions')}.{_inner(inner)}"


def clip_state(prefix: str, config: Mapping[str, Any]) -> Shapes:
    """A CLIP text encoder as transformers before version 5 named it."""
    width, wide = config["hidden_size"], config["intermediate_size"]
    layer = {
        **_norm("layer_norm1", width),
        **_norm("layer_norm2", width),
        **_linear("mlp.fc1", wide, width),
        **_linear("mlp.fc2", width, wide),
    }
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer |= _linear(f"self_attn.{part}", width, width)
    shapes = {
        "embeddings.token_embedding.weight": (config["vocab_size"], width),
        "embeddings.position_embedding.weight": (config["max_position_embeddings"], width),
        **_norm("final_layer_norm", width),
    }
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"encoder.layers.{number}.{name}": shape for name, shape in layer.items()}
    return {f"{prefix}text_model.{name}": shape for name, shape in shapes.items()}


def open_clip_state(prefix: str, *, width: int, layers: int) -> Shapes:
    """A text encoder as OpenCLIP names it (SDXL's larger one: width 1280, 32 layers)."""
    layer = {
        **_norm("ln_1", width),
        **_norm("ln_2", width),
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        **_linear("attn.out_proj", width, width),
        **_linear("mlp.c_fc", 4 * width, width),
        **_linear("mlp.c_proj", width, 4 * width),
    }
    shapes = {
        "token_embedding.weight": (49408, width),
        "positional_embedding": (77, width),
        "text_projection": (width, width),
        "logit_scale": (),
        **_norm("ln_final", width),
    }
    for number in range(layers):
        shapes |= {f"transformer.resblocks.{number}.{name}": shape for name, shape in layer.items()}
    return {prefix + name: shape for name, shape in shapes.items()}


def _inner(inner: str) -> str:
    head, _, tail = inner.rpartition(".")
    return ".".join(part for part in (RESNET.get(head, head), tail) if part)


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}
