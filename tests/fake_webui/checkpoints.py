"""Checkpoints for the stand-in: SD1.5's form, since the Lora extension's loader counts its places, but narrow."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.ldm import SD15_UNET, unet_state
from tests.tiny import WIDTH, tiny_state

UNET = {**SD15_UNET, "block_out_channels": (32, 32, 64, 64), "cross_attention_dim": WIDTH}


def write_checkpoints(folder: Path) -> Path:
    """`folder` with tiny.safetensors, and other.safetensors, whose form is the same and whose numbers are not."""
    folder.mkdir(parents=True)
    for seed, name in enumerate(("tiny", "other")):
        generator = torch.Generator().manual_seed(seed)

        def fill(shape, dtype, generator=generator):
            fan = max(1, torch.Size(shape[1:]).numel()) if len(shape) > 1 else 100
            return (torch.randn(shape, generator=generator) / fan**0.5).to(dtype)

        state = {key: tensor for key, tensor in tiny_state().items() if not key.startswith("model.diffusion_model.")}
        state = {key: tensor * (1 + seed / 10) for key, tensor in state.items()}
        save_file(unet_state(UNET, torch.float32, fill) | state, folder / f"{name}.safetensors")
    return folder
