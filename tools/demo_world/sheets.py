"""Sheets of sampled pictures, to judge a base by looking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gpu import DEVICE
from networks import LATENT, SCALE
from PIL import Image
from torch import Tensor, nn

STYLED, PLAIN, STRANGE, EMPTY = range(4)


@torch.no_grad()
def sample(
    unet: nn.Module, alphas: Tensor, contexts: tuple[Tensor, Tensor], guidance: float, steps: int = 30
) -> Tensor:
    """DDIM latents [N, 4, 16, 16] for (empty, wanted) contexts [N, 77, width]."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    x = torch.randn(1, *LATENT, device=DEVICE, generator=generator).repeat(len(contexts[1]), 1, 1, 1)
    both = torch.cat(contexts)
    times = torch.linspace(981, 1, steps, device=DEVICE).round().long()
    ends = torch.cat([alphas[times[1:]], alphas[:1]])
    for now, b in zip(times, ends, strict=True):
        a = alphas[now]
        away, to = unet(torch.cat([x, x]), now, encoder_hidden_states=both, return_dict=False)[0].chunk(2)
        eps = away + guidance * (to - away)
        x = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
    return x


@torch.no_grad()
def draw_sheet(world: Any, vae: nn.Module, pictures: Tensor, path: Path, columns: int = 12) -> None:
    """Two rows a style, real and drawn, then subjects without a style and with an unknown one."""
    unet, text = world.averaged()
    count = len(pictures) // 3
    subjects = torch.randperm(count, generator=torch.Generator().manual_seed(5))[:columns].to(DEVICE)

    def draw(index: Tensor, kind: int, guidance: float) -> Tensor:
        chosen = [text(world.rows[index, k], world.known[index, k].float()) for k in (EMPTY, kind)]
        return vae.decode(sample(unet, world.alphas, (chosen[0], chosen[1]), guidance) / SCALE).sample

    rows = []
    for style in range(3):
        index = subjects + style * count
        rows += [
            pictures[index].float().div(127.5).sub(1),
            draw(index, STYLED, 3.0),
            draw(index, STYLED, 5.0),
        ]
    rows += [draw(subjects, PLAIN, 4.0), draw(subjects, STRANGE, 4.0)]
    whole = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    Image.fromarray(whole.clamp(-1, 1).add(1).mul(127.5).byte().permute(1, 2, 0).cpu().numpy()).save(path)
