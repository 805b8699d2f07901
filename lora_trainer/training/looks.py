"""What a network draws in a few steps, and what its frozen base sees in latents: no VAE, no other model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_trainer.sampling import scheduler
from lora_trainer.training.step import Network

# Where features tell what a picture is of and like: timestep 261 of 1000 in DIFT (Tang et al. 2023, arXiv:2306.03881).
SEEN_AT = 0.26


@dataclass(frozen=True)
class Drawn:
    """Latents [B, 4, h, w] drawn by DDIM without guidance, and the way there: at each timestep what the network was
    shown and what it answered."""

    latents: Tensor
    way: Sequence[tuple[int, Tensor, Tensor]]


@torch.no_grad()
def answer(network: Network, x: Tensor, t: int, told: Mapping[str, object]) -> Tensor:
    """The UNet's prediction [B, 4, h, w] float32 for noisy latents `x` at timestep `t`, `told` as `sampling.conditions`
    say it."""
    times = torch.full((len(x),), t, device=x.device)
    with network.precision.autocast():
        shown = x.contiguous(memory_format=network.memory_format)
        return network.unet(shown, times, **told, return_dict=False)[0].float()


def drawn(network: Network, x: Tensor, told: Mapping[str, object], steps: int) -> Drawn:
    """From starting noise `x` [B, 4, h, w] and what the UNet is told of B captions."""
    ddim = scheduler(network.noise)
    ddim.set_timesteps(steps)
    way = []
    for t in ddim.timesteps.tolist():
        out = answer(network, x, t, told)
        way.append((t, x, out))
        x = ddim.step(out, t, x, return_dict=False)[0]
    return Drawn(x, way)


@torch.no_grad()
def features(network: Network, latents: Tensor, noise: Tensor, told: Mapping[str, object]) -> Tensor:
    """[B, C] float32: the middle block's answer to each of `latents`, the mean over its places."""
    found: list[Tensor] = []
    hook = network.unet.mid_block.register_forward_hook(lambda module, given, out: found.append(out))
    try:
        t = int(SEEN_AT * network.noise.timesteps)
        times = torch.full((len(latents),), t, device=latents.device)
        answer(network, network.noise.add_noise(latents, noise, times), t, told)
    finally:
        hook.remove()
    return found[0].float().mean(dim=(2, 3))
