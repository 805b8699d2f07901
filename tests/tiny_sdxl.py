"""Random checkpoints of SDXL's form and of its relatives', small enough for a unit test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.ldm import clip_state, open_clip_state, unet_state
from tests.ldm import vae_state
from tests.tiny import VAE, WIDTH

PROJECTION = WIDTH
UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "cross_attention_dim": 2 * WIDTH,
    "attention_head_dim": (1, 1),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": PROJECTION + 6 * 256,
}
CLIP = {
    "vocab_size": 49408,
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": 3,
    "max_position_embeddings": 77,
}
FIRST, SECOND = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
# The published topologies of SSD-1B, Segmind Vega and SDXL's refiner, narrow.
SSD = UNET | {
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
    "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 4),
    "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
    "mid_block_type": "UNetMidBlock2D",
    "attention_head_dim": (1, 1, 1),
}
VEGA = {name: value for name, value in SSD.items() if not name.startswith("reverse")} | {
    "transformer_layers_per_block": (1, 1, 2)
}
REFINER = UNET | {
    "block_out_channels": (32, 64, 64, 64),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
    "transformer_layers_per_block": (1, 4, 4, 4),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": (1, 1, 1, 1),
    "projection_class_embeddings_input_dim": PROJECTION + 5 * 256,
}
REFINERS = "conditioner.embedders.0.model."
RELATIVES = {"ssd": SSD, "vega": VEGA, "refiner": REFINER}


def tiny_sdxl_state(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The whole checkpoint; the same numbers at every call, none of them zero."""
    texts = clip_state(FIRST, CLIP) | open_clip_state(SECOND, width=WIDTH, layers=3)
    return _state(UNET, texts, dtype)


def tiny_relative_state(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The same of one of RELATIVES."""
    if name == "refiner":
        return _state(REFINER, open_clip_state(REFINERS, width=WIDTH, layers=3), dtype)
    texts = clip_state(FIRST, CLIP) | open_clip_state(SECOND, width=WIDTH, layers=3)
    return _state(RELATIVES[name], texts, dtype)


def _state(unet: Mapping[str, Any], texts: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def fill(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        fan = max(1, torch.Size(shape[1:]).numel()) if len(shape) > 1 else 100
        return (torch.randn(shape, generator=generator) / fan**0.5).to(dtype)

    shapes = unet_state(unet) | texts
    return vae_state(VAE, dtype, fill) | {name: fill(shape, dtype) for name, shape in shapes.items()}


def tiny_sdxl_checkpoint(folder: Path) -> Path:
    """`folder`/tiny-xl.safetensors."""
    path = folder / "tiny-xl.safetensors"
    save_file(tiny_sdxl_state(), path)
    return path
