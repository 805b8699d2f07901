"""What a network draws in a few steps, and what its frozen base sees in latents: no VAE, no other model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
    """[B, C] float32: mean and deviation over the places of each channel that the levels on the way down and the middle
    block answer to each of `latents`: what a picture is of, and in which style (as in AdaIN, Huang & Belongie 2017,
    arXiv:1703.06868)."""
    found: list[Tensor] = []

    def keep(module: nn.Module, given: object, out: Tensor | tuple[Tensor, ...]) -> None:
        answered = (out if isinstance(out, Tensor) else out[0]).float()
        found.extend((answered.mean(dim=(2, 3)), answered.std(dim=(2, 3))))

    hooks = [block.register_forward_hook(keep) for block in (*network.unet.down_blocks, network.unet.mid_block)]
    try:
        t = int(SEEN_AT * network.noise.trained)
        times = torch.full((len(latents),), t, device=latents.device)
        answer(network, network.noise.add_noise(latents, noise, times), t, told)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(found, dim=1)
