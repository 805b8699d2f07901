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
    """Latents [B, 4, h, w] drawn by DDIM without guidance, and the way there: what the network was shown at each
    timestep, and what it answered."""

    latents: Tensor
    shown: Sequence[Tensor]
    answered: Sequence[Tensor]


@torch.no_grad()
def answer(network: Network, x: Tensor, t: int, told: Mapping[str, object]) -> Tensor:
    """The UNet's prediction [B, 4, h, w] float32 for noisy latents `x` at timestep `t`, `told` as `sampling.conditions`
    say it."""
    times = torch.full((len(x),), t, device=x.device)
    with network.precision.autocast():
        shown = x.contiguous(memory_format=network.memory_format)
        return network.unet(shown, times, **told, return_dict=False)[0].float()


def drawn(
    network: Network, x: Tensor, told: Mapping[str, object], steps: int, beside: Sequence[Tensor] | None = None
) -> Drawn:
    """From starting noise `x` [B, 4, h, w] and what the UNet is told of B captions.

    `beside`: noisy latents [A, 4, h, w] for each timestep that are shown along with it, in front; `told` is of A + B
    captions then. They cost no pass of their own: on a fast GPU a pass over few latents takes as long as over many.
    """
    ddim = scheduler(network.noise)
    ddim.set_timesteps(steps)
    shown, answered = [], []
    for number, t in enumerate(ddim.timesteps.tolist()):
        shown.append(x if beside is None else torch.cat([beside[number], x]))
        answered.append(answer(network, shown[-1], t, told))
        x = ddim.step(answered[-1][-len(x) :], t, x, return_dict=False)[0]
    return Drawn(x, shown, answered)


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
