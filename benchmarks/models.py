"""Networks of the real size with random weights: speed and memory do not depend on what a model has learned.

The weights are drawn so that activations and gradients stay finite in fp16, and are not zero: a GPU computes zeros
faster than numbers.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.ldm import Shapes, clip_state, mmdit_state, open_clip_state, unet_state
from lora_trainer.models.mmdit import MMDiT, Sizes
from tests.ldm import SD15_UNET, SD15_VAE, vae_state

# What is measured.
Family = Literal["sd15", "sdxl", "sd3"]
# What `write_checkpoint` writes.
Form = Literal["sd15", "sdxl", "ssd", "vega", "refiner", "sd3"]

SDXL_UNET = {
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UNETS = {
    "sd15": SD15_UNET,
    "sdxl": SDXL_UNET,
    "ssd": SDXL_UNET
    | {
        "transformer_layers_per_block": (1, 2, 4),
        "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
        "mid_block_type": "UNetMidBlock2D",
    },
    "vega": SDXL_UNET | {"transformer_layers_per_block": (1, 1, 2), "mid_block_type": "UNetMidBlock2D"},
    "refiner": SDXL_UNET
    | {
        "block_out_channels": (384, 768, 1536, 1536),
        "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
        "transformer_layers_per_block": (1, 4, 4, 4),
        "cross_attention_dim": 1280,
        "attention_head_dim": (6, 12, 24, 24),
        "projection_class_embeddings_input_dim": 2560,
    },
}
# Stable Diffusion 3 medium's network, its VAE and its larger CLIP.
MEDIUM = Sizes(width=1536, depth=24, channels=16, patch=2, places=192 * 192, context=4096, pooled=2048)
SD3_VAE = SD15_VAE | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
# CLIP ViT-L/14's text half: all of SD1's text encoder, and the smaller one of SDXL's two.
CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
SEED = 0


def unet(family: Family, device: torch.device | str, dtype: torch.dtype) -> UNet2DConditionModel | MMDiT:
    """The whole UNet, or what SD3 has instead, on `device`, frozen, with the same random weights at every call on the
    same kind of device."""
    with torch.device("meta"):
        network = MMDiT(MEDIUM) if family == "sd3" else UNet2DConditionModel(**UNETS[family])
    return _materialise(network, torch.device(device), dtype)


def text_encoder(device: torch.device | str, dtype: torch.dtype) -> CLIPTextModel:
    """SD1's text encoder on `device`, frozen, random."""
    with torch.device("meta"):
        network = CLIPTextModel(CLIPTextConfig(**CLIP_L))
    _materialise(network, torch.device(device), dtype)
    for name, buffer in network.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return network


def write_checkpoint(path: Path, family: Form, device: torch.device | str = "cpu") -> Path:
    """A random single-file checkpoint in fp16: UNet, VAE and text encoders under the names of the original releases.

    The numbers are drawn on `device` and written as they are drawn; the file takes 2.1 GB (sd15), 6.9 GB (sdxl),
    4.5 GB (ssd), 3.3 GB (vega), 6.1 GB (refiner) or 6.0 GB (sd3).
    """
    vae = SD3_VAE if family == "sd3" else SD15_VAE
    shapes = {name: tuple(tensor.shape) for name, tensor in vae_state(vae, fill=_meta).items()}
    shapes |= mmdit_state(MEDIUM) if family == "sd3" else unet_state(UNETS[family])
    if family == "sd3":
        shapes |= clip_state("text_encoders.clip_l.transformer.", CLIP_L)
        shapes |= clip_state("text_encoders.clip_g.transformer.", CLIP_L | CLIP_G)
        shapes["text_encoders.clip_g.transformer.text_projection.weight"] = (1280, 1280)
    elif family == "sd15":
        shapes |= clip_state("cond_stage_model.transformer.", CLIP_L)
    elif family == "refiner":
        shapes |= open_clip_state("conditioner.embedders.0.model.", width=1280, layers=32)
    else:
        shapes |= clip_state("conditioner.embedders.0.transformer.", CLIP_L)
        shapes |= open_clip_state("conditioner.embedders.1.model.", width=1280, layers=32)
    _write_safetensors(path, shapes, torch.Generator(device).manual_seed(SEED))
    return path


def random_tensor(name: str, shape: tuple[int, ...], *, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Matrices and kernels: normal with variance 1 / fan-in. Vectors: 1 for the weight of a norm, 0 for a bias."""
    if len(shape) < 2:
        return torch.full(shape, float(name.endswith("weight")), dtype=dtype, device=generator.device)
    fan_in = math.prod(shape[1:])
    return torch.randn(shape, dtype=dtype, device=generator.device, generator=generator).div_(math.sqrt(fan_in))


def _materialise(network: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Give a network on the meta device memory and random weights."""
    generator = torch.Generator(device).manual_seed(SEED)
    # diffusers' own `to` warns of layers it would keep in fp32, and names none.
    nn.Module.to(network, dtype).to_empty(device=device).requires_grad_(False)
    for name, parameter in network.named_parameters():
        parameter.copy_(random_tensor(name, tuple(parameter.shape), dtype=dtype, generator=generator))
    return network.eval()


def _write_safetensors(path: Path, shapes: Shapes, generator: torch.Generator) -> None:
    """Random fp16 tensors under these names, one in memory at a time."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    # The data begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            tensor = random_tensor(name, shape, dtype=torch.float16, generator=generator)
            file.write(tensor.cpu().numpy().tobytes())


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
