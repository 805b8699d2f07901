"""Rectified flow (Liu et al. 2022, arXiv:2209.03003), as Stable Diffusion 3 has it (Esser et al. 2024,
arXiv:2403.03206): straight lines from pictures to noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_trainer.models.noise import Prediction

# What a network is told of time goes from 0 to this.
SCALE = 1000


@dataclass(frozen=True)
class Flow:
    """A schedule like `NoiseSchedule`. `sigmas`: [T] float32, rising to 1, the share of noise at each timestep."""

    sigmas: Tensor
    prediction: Prediction = "flow"

    @property
    def timesteps(self) -> int:
        return self.sigmas.numel()

    @property
    def trained(self) -> int:
        """How many of them the model was trained on: all."""
        return self.timesteps

    @property
    def device(self) -> torch.device:
        return self.sigmas.device

    @property
    def snr(self) -> Tensor:
        """Signal power over noise power at each timestep, [T] float64."""
        sigma = self.sigmas.double()
        return ((1 - sigma) / sigma).square()

    def to(self, device: torch.device) -> Flow:
        return Flow(self.sigmas.to(device))

    def times(self, t: Tensor) -> Tensor:
        """What the network is told of the timesteps `t` [B], float32."""
        return SCALE * self.sigmas[t]

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = (1 - σ) x_0 + σ noise (eq. 1 and 13), for latents [B, C, H, W] and timesteps [B]."""
        sigma = self.sigmas[t].view(-1, 1, 1, 1).to(x0.dtype)
        return (1 - sigma) * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """dx / dσ, the same all along: noise - x_0 (eq. 2)."""
        return noise - x0


def shifted(shift: float, timesteps: int = SCALE) -> Tensor:
    """σ at evenly spaced times, moved towards noise for large pictures (arXiv:2403.03206, eq. 23), [timesteps] float32;
    with a `shift` of 3 the WebUI's table for Stable Diffusion 3."""
    time = torch.arange(1, timesteps + 1) / timesteps
    return shift * time / (1 + (shift - 1) * time)


class Euler:
    """Euler's method from noise to picture, with those of diffusers' schedulers' methods that are used here. The steps
    lie as k-diffusion (external.py, DiscreteSchedule.get_sigmas) and with it the WebUI puts them by default."""

    def __init__(self, flow: Flow) -> None:
        self.table = flow.sigmas.cpu()

    def set_timesteps(self, steps: int) -> None:
        at = torch.linspace(len(self.table) - 1, 0, steps)
        low, high, part = at.floor().long(), at.ceil().long(), at.frac()
        logs = self.table.log()
        sigmas = ((1 - part) * logs[low] + part * logs[high]).exp()
        self.timesteps = SCALE * sigmas
        self._strides = torch.cat([sigmas[1:], sigmas.new_zeros(1)]) - sigmas

    def step(self, out: Tensor, t: Tensor, x: Tensor, *, return_dict: bool = False) -> tuple[Tensor]:
        """(x at the next of `timesteps`, or the picture after the last,) by what the network said at `t`."""
        (place,) = (self.timesteps == t).nonzero()[0].tolist()
        return (x + out * self._strides[place].item(),)
