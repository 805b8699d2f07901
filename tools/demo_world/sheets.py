"""Sheets of sampled pictures, to judge a base by looking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from captions import EMPTY, PLAIN, STRANGE, STRANGE_1, STYLED
from gpu import DEVICE
from icons import BASE_STYLES
from networks import LATENT, SCALE
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_map


@torch.no_grad()
def sample(
    unet: nn.Module, alphas: Tensor, told: dict[str, Any], count: int, guidance: float, steps: int = 30
) -> Tensor:
    """DDIM latents [count, 4, 16, 16]; the UNet is told of so many empty captions and of as many that are wanted."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    x = torch.randn(1, *LATENT, device=DEVICE, generator=generator).repeat(count, 1, 1, 1)
    times = torch.linspace(981, 1, steps, device=DEVICE).round().long()
    ends = torch.cat([alphas[times[1:]], alphas[:1]])
    for now, b in zip(times, ends, strict=True):
        a = alphas[now]
        away, to = unet(torch.cat([x, x]), now, **told, return_dict=False)[0].chunk(2)
        eps = away + guidance * (to - away)
        x = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
    return x


@torch.no_grad()
def draw_sheet(world: Any, vae: nn.Module, pictures: Tensor, path: Path, columns: int = 14) -> None:
    """A real and a drawn row for each style, then the subjects without a style and with unknown ones."""
    unet, text = world.averaged()
    places = {style: world.captions.of_style(style) for style in BASE_STYLES.values()}
    common = sorted(set.intersection(*({*found} for found in places.values())))[:: max(1, 150 // columns)][:columns]

    def draw(index: list[int], kind: int) -> Tensor:
        empty, wanted = (world.said(text, index, one) for one in (EMPTY, kind))
        told = world.form.told(tree_map(lambda *pair: torch.cat(pair), empty, wanted))
        return vae.decode(sample(unet, world.alphas, told, len(index), 4.0) / SCALE).sample

    rows = []
    for style in BASE_STYLES.values():
        index = [places[style][name] for name in common]
        rows += [pictures[index].float().div(127.5).sub(1), draw(index, STYLED)]
    rows += [draw(index, kind) for kind in (PLAIN, STRANGE_1, STRANGE)]
    whole = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    Image.fromarray(whole.clamp(-1, 1).add(1).mul(127.5).byte().permute(1, 2, 0).cpu().numpy()).save(path)
