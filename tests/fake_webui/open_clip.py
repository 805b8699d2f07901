"""OpenCLIP's text encoder with torch's packed attention, and SDXL's and Stable Diffusion 2.x's wrappers of it."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = {
            "c_fc": nn.Linear(width, 4 * width),
            "gelu": nn.GELU(),
            "c_proj": nn.Linear(4 * width, width),
        }
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Text(nn.Module):
    """Empty, of the form of `state`."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        vocabulary, width = state["token_embedding.weight"].shape
        layers = sum(name.endswith("ln_1.weight") for name in state)
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(77, width))
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(Block(width, max(1, width // 64)) for _ in range(layers))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, width))
        self.logit_scale = nn.Parameter(torch.ones([]))

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """The output of each layer."""
        x = self.token_embedding(tokens) + self.positional_embedding
        mask = torch.full((77, 77), float("-inf")).triu(1)
        outputs = []
        for block in self.transformer.resblocks:
            x = block(x, mask)
            outputs.append(x)
        return outputs


class FrozenOpenCLIPEmbedder(nn.Module):
    """Says the layer before the last, normed."""

    return_pooled = False

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.model = Text(state)

    def encode_with_transformer(self, tokens: Tensor) -> Tensor:
        return self.model.ln_final(self.model(tokens)[-2])


class FrozenOpenCLIPEmbedder2(FrozenOpenCLIPEmbedder):
    """Says the layer before the last as it is, and the last one's vector at the end of the text."""

    return_pooled, layer = True, "penultimate"

    def encode_with_transformer(self, tokens: Tensor) -> dict[str, Tensor]:
        *_, layer, last = self.model(tokens)
        ends = self.model.ln_final(last)[torch.arange(len(tokens)), tokens.argmax(-1)]
        return {self.layer: layer, "pooled": ends @ self.model.text_projection}
