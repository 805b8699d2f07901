"""Checkpoints for the stand-in: SD1.5's form, since the Lora extension's loader counts its places, but narrow."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.ldm import open_clip_state
from tests.ldm import SD15_UNET, unet_state
from tests.tiny import WIDTH, tiny_state
from tests.tiny_sdxl import tiny_relative_state, tiny_sdxl_state

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


def write_families(folder: Path) -> Path:
    """`folder` with tiny.safetensors, xl.safetensors of SDXL's form, ssd.safetensors and refiner.safetensors of its
    relatives', and two.safetensors of Stable Diffusion 2's."""
    write_checkpoints(folder)
    (folder / "other.safetensors").unlink()
    save_file(tiny_sdxl_state(), folder / "xl.safetensors")
    for name in ("ssd", "refiner"):
        save_file(tiny_relative_state(name), folder / f"{name}.safetensors")
    generator = torch.Generator().manual_seed(0)

    def fill(shape, dtype=torch.float32):
        fan = max(1, torch.Size(shape[1:]).numel()) if len(shape) > 1 else 100
        return (torch.randn(shape, generator=generator) / fan**0.5).to(dtype)

    vae = {key: tensor for key, tensor in tiny_state().items() if key.startswith("first_stage_model.")}
    text = open_clip_state("cond_stage_model.model.", width=WIDTH, layers=3)
    unet = unet_state({**UNET, "use_linear_projection": True}, torch.float32, fill)
    save_file(vae | unet | {name: fill(shape) for name, shape in text.items()}, folder / "two.safetensors")
    return folder
