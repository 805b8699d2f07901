"""What is minimised: the simple loss of DDPM (Ho et al. 2020, arXiv:2006.11239, eq. 14)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from lora_trainer.models.noise import NoiseSchedule

Objective = Callable[..., Tensor]


def mse(
    unet: UNet2DConditionModel, noise: NoiseSchedule, *, latents: Tensor, eps: Tensor, t: Tensor, condition: Mapping
) -> Tensor:
    """Each sample's mean squared error, [B] float32.

    `latents` and `eps` [B, 4, h, w] float32, `t` [B] int64, `condition` the UNet's other arguments.
    """
    noisy = noise.add_noise(latents, eps, t)
    predicted = unet(noisy, t, **condition, return_dict=False)[0]
    target = noise.target(latents, eps, t)
    return torch.nn.functional.mse_loss(predicted.float(), target, reduction="none").mean(dim=(1, 2, 3))
