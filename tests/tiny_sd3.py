"""A random checkpoint of Stable Diffusion 3's form, small enough for a unit test."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.ldm import clip_state, mmdit_state
from lora_trainer.models.mmdit import Sizes
from tests.ldm import vae_state

# The WebUI takes the depth for a 64th of the width.
DEPTH = 2
VAE = {
    "block_out_channels": (32, 32, 32, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CLIP = {"vocab_size": 49408, "num_hidden_layers": 3, "max_position_embeddings": 77}
FIRST, SECOND = "text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer."
WIDTHS = {FIRST: 64, SECOND: 128}
NETWORK = Sizes(64 * DEPTH, DEPTH, channels=16, patch=2, places=16 * 16, context=4096, pooled=sum(WIDTHS.values()))


def tiny_sd3_state(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The whole checkpoint; the same numbers at every call, none of them zero."""
    generator = torch.Generator().manual_seed(0)

    def fill(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        fan = max(1, torch.Size(shape[1:]).numel()) if len(shape) > 1 else 100
        return (torch.randn(shape, generator=generator) / fan**0.5).to(dtype)

    shapes = mmdit_state(NETWORK)
    for prefix, width in WIDTHS.items():
        shapes |= clip_state(prefix, CLIP | {"hidden_size": width, "intermediate_size": 4 * width})
        shapes[f"{prefix}text_projection.weight"] = (width, width)
    return vae_state(VAE, dtype, fill) | {name: fill(shape, dtype) for name, shape in shapes.items()}


def tiny_sd3_checkpoint(folder: Path) -> Path:
    """`folder`/tiny-sd3.safetensors."""
    path = folder / "tiny-sd3.safetensors"
    save_file(tiny_sd3_state(), path)
    return path
