"""Stable Diffusion 3's network, a multimodal diffusion transformer (Esser et al. 2024, arXiv:2403.03206, section 4).

Its modules have the names of the checkpoint (github.com/Stability-AI/sd3-ref, mmdit.py), with q, k and v in one matrix
as LoRA files have them; diffusers' SD3Transformer2DModel has other names, three matrices and two halves exchanged. It
is called as diffusers' UNets are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn
from torch.nn import functional as F

from lora_trainer.errors import ModelError

HEAD = 64
FREQUENCIES = 256


class Attention(nn.Module):
    """The projections of one side of a joint attention; the last block reads no answer of its captions' side."""

    def __init__(self, width: int, *, answers: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        if answers:
            self.proj = nn.Linear(width, width)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, N, width] to q, k, v, [B, heads, N, HEAD] each."""
        return self.qkv(x).unflatten(-1, (3, -1, HEAD)).permute(2, 0, 3, 1, 4).unbind(0)


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Side(nn.Module):
    """One side of a block, of the picture's tokens or of the captions'; adaLN-Zero (Peebles & Xie 2022,
    arXiv:2212.09748)."""

    def __init__(self, width: int, *, answers: bool) -> None:
        super().__init__()
        self.attn = Attention(width, answers=answers)
        if answers:
            self.mlp = Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, (6 if answers else 2) * width))

    def modulation(self, told: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of the attention, then of the MLP, [B, 1, width] each; where nothing answers the first
        two."""
        return self.adaLN_modulation(told).unsqueeze(1).unflatten(-1, (-1, told.shape[-1])).unbind(-2)

    def answered(self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """[B, N, width] after the attention and the MLP."""
        _, _, gate, shift, scale, mlp_gate = modulation
        x = x + gate * self.attn.proj(attended)
        return x + mlp_gate * self.mlp(modulated(x, shift, scale))


class JointBlock(nn.Module):
    """Both sides attend to all tokens of both."""

    def __init__(self, width: int, *, last: bool) -> None:
        super().__init__()
        self.context_block = Side(width, answers=not last)
        self.x_block = Side(width, answers=True)

    def forward(self, context: Tensor, x: Tensor, told: Tensor) -> tuple[Tensor | None, Tensor]:
        """Captions [B, M, width] and picture [B, N, width], `told` [B, width]; the last block drops the captions."""
        sides = ((self.context_block, context), (self.x_block, x))
        modulations = [side.modulation(told) for side, _ in sides]
        heads = [
            side.attn.heads(modulated(tokens, *modulation[:2]))
            for (side, tokens), modulation in zip(sides, modulations, strict=True)
        ]
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(*heads, strict=True))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        said, seen = attended.split([context.shape[1], x.shape[1]], dim=1)
        x = self.x_block.answered(x, seen, modulations[1])
        if not hasattr(self.context_block, "mlp"):
            return None, x
        return self.context_block.answered(context, said, modulations[0]), x


class Embedder(nn.Module):
    """Two linear layers from a vector to what the blocks are told."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))


class Patches(nn.Module):
    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)


class Final(nn.Module):
    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        return self.linear(modulated(x, *self.adaLN_modulation(told).unsqueeze(1).chunk(2, dim=-1)))


@dataclass(frozen=True)
class Sizes:
    """Of an MMDiT. `places`: the length of the table of positions, a square of patches; `context`, `pooled`: the widths
    of what it is told of captions."""

    width: int
    depth: int
    channels: int
    patch: int
    places: int
    context: int
    pooled: int


class MMDiT(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, patch = sizes.width, sizes.patch
        self.config = FrozenDict({"in_channels": sizes.channels, "patch_size": patch})
        self.pos_embed = nn.Parameter(torch.empty(1, sizes.places, width))
        self.x_embedder = Patches(sizes.channels, width, patch)
        self.t_embedder = Embedder(FREQUENCIES, width)
        self.y_embedder = Embedder(sizes.pooled, width)
        self.context_embedder = nn.Linear(sizes.context, width)
        self.joint_blocks = nn.ModuleList(JointBlock(width, last=n == sizes.depth - 1) for n in range(sizes.depth))
        self.final_layer = Final(width, patch * patch * sizes.channels)

    @property
    def dtype(self) -> torch.dtype:
        return self.pos_embed.dtype

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: dict[str, Tensor],
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """(The flow [B, C, h, w],) at latents of that shape, whose sides are multiples of the patch. Times: [B] or a
        number, from 0 to 1000. Captions [B, M, width], and `text_embeds` [B, pooled].

        What CLIP says is narrower than the embedder takes: it is filled up with zeros, and as many tokens of zeros
        follow, which stand for T5-XXL's silence.
        """
        height, width = sample.shape[2] // self.config.patch_size, sample.shape[3] // self.config.patch_size
        x = self.x_embedder.proj(sample.to(self.dtype)).flatten(2).transpose(1, 2) + self.positions(height, width)
        times = frequencies(timestep.reshape(-1).expand(len(x))).to(x.dtype)
        told = self.t_embedder.mlp(times) + self.y_embedder.mlp(added_cond_kwargs["text_embeds"].to(x.dtype))
        context = self.context_embedder(self.whole(encoder_hidden_states.to(x.dtype)))
        for block in self.joint_blocks:
            context, x = block(context, x, told)
        x = self.final_layer(x, told)
        patch = self.config.patch_size
        x = x.view(len(x), height, width, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
        return (x.reshape(len(x), -1, height * patch, width * patch),)

    def positions(self, height: int, width: int) -> Tensor:
        """[1, height · width, …]: the middle of the table, for so many patches. Raises ModelError for more than it
        has."""
        side = math.isqrt(self.pos_embed.shape[1])
        if max(height, width) > side:
            raise ModelError(
                f"resolution: a picture of {width}×{height} patches; the base model has places for {side} a side, of "
                "16 pixels each: expected a lower one, or pictures that are less wide or high"
            )
        top, left = (side - height) // 2, (side - width) // 2
        table = self.pos_embed.view(1, side, side, -1)
        return table[:, top : top + height, left : left + width].flatten(1, 2)

    def whole(self, context: Tensor) -> Tensor:
        """[B, M, context] as it is, or of CLIP's alone [B, 2 M, context]."""
        missing = self.context_embedder.in_features - context.shape[-1]
        if not missing:
            return context
        return F.pad(context, (0, missing, 0, context.shape[1]))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights of its own, then by what the block is told."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def frequencies(times: Tensor) -> Tensor:
    """[B] to [B, FREQUENCIES] float32: cosines, then sines."""
    half = FREQUENCIES // 2
    rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=times.device) / half)
    angles = times.float().unsqueeze(1) * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)
