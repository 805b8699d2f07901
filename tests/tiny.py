"""A random checkpoint of the family's form, small enough for a unit test (64 px, a step in milliseconds)."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.ldm import unet_state, vae_state

WIDTH = 16
UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 8,
}
VAE = {
    "block_out_channels": (32, 32, 32, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
}


def tiny_state(dtype: torch.dtype = torch.float32, text_layers: int = 1) -> dict[str, Tensor]:
    """The whole checkpoint; the same numbers at every call."""
    generator = torch.Generator().manual_seed(0)

    def fill(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        fan = max(1, torch.Size(shape[1:]).numel()) if len(shape) > 1 else 100
        return (torch.randn(shape, generator=generator) / fan**0.5).to(dtype)

    state = unet_state(UNET, dtype, fill) | vae_state(VAE, dtype, fill)
    return state | {name: fill(shape, dtype) for name, shape in _text_shapes(text_layers).items()}


def tiny_checkpoint(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """`folder`/tiny.safetensors."""
    path = folder / "tiny.safetensors"
    save_file(tiny_state(dtype), path)
    return path


def _text_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    layer = {
        "layer_norm1.weight": (WIDTH,),
        "layer_norm1.bias": (WIDTH,),
        "layer_norm2.weight": (WIDTH,),
        "layer_norm2.bias": (WIDTH,),
        "mlp.fc1.weight": (4 * WIDTH, WIDTH),
        "mlp.fc1.bias": (4 * WIDTH,),
        "mlp.fc2.weight": (WIDTH, 4 * WIDTH),
        "mlp.fc2.bias": (WIDTH,),
    }
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer |= {f"self_attn.{part}.weight": (WIDTH, WIDTH), f"self_attn.{part}.bias": (WIDTH,)}
    shapes = {
        "embeddings.token_embedding.weight": (49408, WIDTH),
        "embeddings.position_embedding.weight": (77, WIDTH),
        "final_layer_norm.weight": (WIDTH,),
        "final_layer_norm.bias": (WIDTH,),
    }
    for number in range(layers):
        shapes |= {f"encoder.layers.{number}.{name}": shape for name, shape in layer.items()}
    return {f"cond_stage_model.transformer.text_model.{name}": shape for name, shape in shapes.items()}
