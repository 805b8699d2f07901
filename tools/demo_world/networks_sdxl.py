"""The demo world's networks once more in SDXL's topology, to measure its presets on: no attention in the first level,
deeper transformers in the others, two text encoders of which the second also says one vector a caption, and sizes.
Sizes that families.SDXL tells (64 channels a head, layers, norms, padding) are as there. The VAE is networks.py's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from gpu import DEVICE
from networks import LATENT, WIDTH, Text, text_config
from torch import Tensor, nn
from torch.nn import functional

UNET = {
    "sample_size": LATENT[1],
    "block_out_channels": (64, 128, 128),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "cross_attention_dim": 2 * WIDTH,
    "attention_head_dim": (1, 2, 2),  # diffusers means the number of heads
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": WIDTH + 6 * 256,
}
# Original size, upper left corner of the crop, target size, of every picture.
SIZES = torch.tensor([[128, 128, 0, 0, 128, 128]], device=DEVICE, dtype=torch.float32)


class Said(NamedTuple):
    """Of captions: context [B, 77, 2 × WIDTH] and pooled [B, WIDTH]."""

    context: Tensor
    pooled: Tensor


class Texts(nn.Module):
    """Both text encoders side by side, without their final norm; the second pads with a token that says nothing."""

    def __init__(self, seen: Tensor) -> None:
        super().__init__()
        self.end = seen.tolist().index(text_config()["eos_token_id"])
        self.first, self.second = Text(seen, heads=1), Text(seen, heads=1, activation=functional.gelu)
        self.text_projection = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, rows: Tensor, known: Tensor) -> Said:
        """Of what `Text` takes."""
        ends = (rows == self.end).int().argmax(-1, keepdim=True)
        behind = torch.arange(rows.shape[1], device=rows.device) > ends
        one, other = self.first.layers(rows, known), self.second.layers(rows, known.masked_fill(behind, 0))
        last = other[-1].gather(1, ends.unsqueeze(-1).expand(-1, -1, WIDTH)).squeeze(1)
        pooled = self.text_projection(self.second.final_layer_norm(last))
        return Said(torch.cat([one[-2], other[-2]], dim=-1), pooled)


def make_unet() -> UNet2DConditionModel:
    """12.5 M parameters, 618 tensors."""
    return UNet2DConditionModel(**UNET)


def make_text(seen: Tensor) -> Texts:
    """The text side: two encoders."""
    return Texts(seen)


def told(said: Said) -> dict[str, object]:
    """What the UNet is given of what the text side says."""
    added = {"text_embeds": said.pooled, "time_ids": SIZES.expand(len(said.pooled), -1)}
    return {"encoder_hidden_states": said.context, "added_cond_kwargs": added}
