"""The diffusion schedule (DDPM, Ho et al. 2020, arXiv:2006.11239)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v", "flow"]


@dataclass(frozen=True)
class NoiseSchedule:
    """`alphas_cumprod`: [T] float32, the share of signal power left at each timestep. The model was trained on those
    below `limit`, where it is not on all."""

    alphas_cumprod: Tensor
    prediction: Prediction
    limit: int | None = None

    @property
    def timesteps(self) -> int:
        return self.alphas_cumprod.numel()

    @property
    def trained(self) -> int:
        """How many of them, from the least noisy on, the model was trained on."""
        return self.timesteps if self.limit is None else min(self.limit, self.timesteps)

    @property
    def snr(self) -> Tensor:
        """Signal power over noise power at each timestep, [T] float64."""
        a = self.alphas_cumprod.double()
        return a / (1 - a)

    def zero_terminal(self) -> NoiseSchedule:
        """The same start, and nothing of the signal left at the end (Lin et al. 2023, arXiv:2305.08891, alg. 1)."""
        signal = self.alphas_cumprod.double().sqrt()
        first, last = signal[0], signal[-1]
        rescaled = (signal - last) * first / (first - last)
        return replace(self, alphas_cumprod=rescaled.square().to(self.alphas_cumprod.dtype))

    @property
    def device(self) -> torch.device:
        return self.alphas_cumprod.device

    def to(self, device: torch.device) -> NoiseSchedule:
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def times(self, t: Tensor) -> Tensor:
        """What the network is told of the timesteps `t`: their numbers."""
        return t

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, for latents [B, C, H, W] and timesteps [B]."""
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1).to(x0.dtype)
        return a.sqrt() * x0 + (1 - a).sqrt() * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the UNet is asked for: the noise, or v (Salimans & Ho 2022, arXiv:2202.00512)."""
        if self.prediction == "epsilon":
            return noise
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1).to(x0.dtype)
        return a.sqrt() * noise - (1 - a).sqrt() * x0


def scaled_linear(start: float, end: float, timesteps: int) -> Tensor:
    """Stable Diffusion's schedule: betas linear in their square root; [timesteps] float32."""
    betas = torch.linspace(start**0.5, end**0.5, timesteps, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()
