"""What noise a sample gets, and at which timestep: drawn ahead on the host, as pure functions of (seed, visit)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_trainer.config import Config
from lora_trainer.errors import ConfigError
from lora_trainer.models.noise import NoiseSchedule
from lora_trainer.training import randomness

# Of a law on 0 … 1.
Quantile = Callable[[float], float]


def logit_normal(u: float, mean: float, std: float) -> float:
    """The sigmoid of a normal number (Esser et al. 2024, arXiv:2403.03206, eq. 19)."""
    return 1 / (1 + math.exp(-NormalDist(mean, std).inv_cdf(u)))


def cubic(u: float) -> float:
    """Most near 1, where a picture's composition is decided (T2I-Adapter, Mou et al. 2023, arXiv:2302.08453, 3.4)."""
    return 1 - u**3


def offset_noise(seed: int, visits: Sequence[int], latents: Tensor, *, strength: float, adaptive: float) -> Tensor:
    """One number for each channel of a picture, [B, C, 1, 1] (Guttenberg 2023, crosslabs.org "Diffusion with offset
    noise"); by `adaptive` stronger where the channel's mean is far from 0, as in kohya's trainer."""
    means = latents.mean(dim=(2, 3), keepdim=True).abs()
    numbers = randomness.normal(seed, "noise offset", visits, (latents.shape[1], 1, 1))
    return (strength + adaptive * means).clamp(min=0) * numbers


def multires_noise(seed: int, visit: int, eps: Tensor, *, iterations: int, discount: float) -> Tensor:
    """`eps` [C, h, w] and ever coarser noise, back at variance 1 (Whitaker 2023, "Multi-Resolution Noise for Diffusion
    Model Training"). Each size is a random 2 to 4 times coarser a step."""
    (channels, height, width), total = eps.shape, eps
    for i in range(iterations):
        ratio = (2 + 2 * randomness.uniform(seed, f"multires ratio {i}", visit)) ** i
        size = (max(1, int(height / ratio)), max(1, int(width / ratio)))
        coarse = randomness.normal(seed, f"multires noise {i}", [visit], (channels, *size))
        total = total + F.interpolate(coarse, (height, width), mode="bilinear")[0] * discount**i
        if 1 in size:
            break
    return total / total.std()


@dataclass(frozen=True)
class Noising:
    """Timesteps from `low` to below `high`, by the law of `quantile` (None: uniform); the noise's kinds at strength 0
    are switched off."""

    quantile: Quantile | None = None
    low: int = 0
    high: int = 1000
    offset: float = 0.0
    adaptive: float = 0.0
    iterations: int = 0
    discount: float = 0.3
    perturbation: float = 0.0

    @classmethod
    def of(cls, config: Config, schedule: NoiseSchedule) -> Noising:
        """Raises ConfigError where no timestep of the model is left."""
        low, high = timesteps_of(config, schedule)
        laws: dict[str, Quantile | None] = {
            "uniform": None,
            "logit_normal": partial(logit_normal, mean=config.logit_mean, std=config.logit_std),
            "cubic": cubic,
        }
        return cls(
            quantile=laws[config.timestep_sampling],
            low=low,
            high=high,
            offset=config.noise_offset,
            adaptive=config.adaptive_noise_scale,
            iterations=config.multires_noise_iterations,
            discount=config.multires_noise_discount,
            perturbation=config.ip_noise_gamma,
        )

    def timesteps(self, seed: int, visits: Sequence[int], count: int) -> Tensor:
        """[len(visits)] int64, all of them below `count`, the schedule's length."""
        span = min(self.high, count) - self.low
        if self.quantile is None:
            return self.low + randomness.timesteps(seed, visits, span)
        places = [self.quantile(randomness.uniform(seed, "timestep", visit)) for visit in visits]
        return torch.tensor([self.low + min(int(place * span), span - 1) for place in places])

    def noise(self, seed: int, visits: Sequence[int], latents: Tensor) -> Tensor:
        """What the network is asked for, of the shape of `latents` [B, C, h, w], float32."""
        eps = randomness.normal(seed, "noise", visits, tuple(latents.shape[1:]))
        if self.offset:
            eps = eps + offset_noise(seed, visits, latents, strength=self.offset, adaptive=self.adaptive)
        if self.iterations:
            mix = partial(multires_noise, seed, iterations=self.iterations, discount=self.discount)
            eps = torch.stack([mix(visit, row) for visit, row in zip(visits, eps, strict=True)])
        return eps

    def input_noise(self, seed: int, visits: Sequence[int], eps: Tensor) -> Tensor | None:
        """What the network is shown instead of `eps`, if that is something else: input perturbation (Ning et al. 2023,
        arXiv:2301.11706)."""
        if not self.perturbation:
            return None
        return eps + self.perturbation * randomness.normal(seed, "input noise", visits, tuple(eps.shape[1:]))


PLAIN = Noising()


def timesteps_of(config: Config, schedule: NoiseSchedule) -> tuple[int, int]:
    """The first that is trained, and the one before which that ends. Raises ConfigError."""
    low, high = config.min_timestep, config.max_timestep or schedule.trained
    if low >= high:
        raise ConfigError([f"min_timestep: expected less than {high}, the end of what the model knows, found {low}"])
    return low, high
