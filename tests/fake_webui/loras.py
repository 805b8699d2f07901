"""LoRA files for the stand-in."""

from __future__ import annotations

from pathlib import Path

import torch

from lora_trainer.adapters.writer import serialize

MIDDLE = "lora_unet_mid_block_attentions_0_transformer_blocks_0"
# Module: (in, out), in the UNet and in the text encoder.
LAYERS = {
    f"{MIDDLE}_attn1_to_q": (64, 64),
    f"{MIDDLE}_attn2_to_k": (16, 64),
    "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_2": (128, 32),
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (16, 16),
}


def lora_bytes(seed: int = 0, *, layers: dict[str, tuple[int, int]] = LAYERS, **metadata: str) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (into, out) in layers.items():
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, into, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(out, 4, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(4.0)
    return serialize(tensors, metadata)


def add_lora(folder: Path, name: str, **wanted) -> Path:
    path = folder / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lora_bytes(**wanted))
    return path
