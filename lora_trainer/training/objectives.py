"""What is minimised: how an error counts, and how much its timestep does.

A network predicts the noise (DDPM, Ho et al. 2020, arXiv:2006.11239, eq. 14), v (Salimans & Ho 2022,
arXiv:2202.00512) or a flow (Esser et al. 2024, arXiv:2403.03206), whose errors all count alike. Weights are those of
the noise's squared error; a v loss is brought to the same by `of_v`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_trainer.config import Config
from lora_trainer.errors import ConfigError
from lora_trainer.models.flow import Flow
from lora_trainer.models.noise import NoiseSchedule

# (predicted, target, c), each [B, C, h, w] or broadcast to it, to the losses of the elements.
Loss = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def l2(predicted: Tensor, target: Tensor, c: Tensor | None) -> Tensor:
    return F.mse_loss(predicted, target, reduction="none")


def l1(predicted: Tensor, target: Tensor, c: Tensor | None) -> Tensor:
    return F.l1_loss(predicted, target, reduction="none")


def huber(predicted: Tensor, target: Tensor, c: Tensor) -> Tensor:
    """Pseudo-Huber (Khrapov et al. 2024, arXiv:2403.16728): squared errors below c, 2 c |error| far above."""
    return c * smooth_l1(predicted, target, c)


def smooth_l1(predicted: Tensor, target: Tensor, c: Tensor) -> Tensor:
    """`huber` over c, as kohya has it: errors far above c count alike at every c."""
    return 2 * (((predicted - target).square() + c.square()).sqrt() - c)


LOSSES: dict[str, Loss] = {"l2": l2, "l1": l1, "huber": huber, "smooth_l1": smooth_l1}


def huber_c(schedule: str, c: float, snr: Tensor) -> Tensor:
    """c of each timestep, by the schedules of Khrapov et al.; shaped as `snr`."""
    if schedule == "exponential":
        t = torch.arange(len(snr), dtype=snr.dtype, device=snr.device)
        return (math.log(c) * t / len(snr)).exp()
    if schedule == "snr":
        sigma = snr.rsqrt()
        return (1 - c) / (1 + sigma).square() + c
    return torch.full_like(snr, c)


def min_snr(snr: Tensor, gamma: float) -> Tensor:
    """min(SNR, gamma) / SNR (Hang et al. 2023, arXiv:2303.09556)."""
    return (gamma / snr).clamp(max=1)


def soft_min_snr(snr: Tensor, gamma: float) -> Tensor:
    """Min-SNR without its edge (Crowson et al. 2024, arXiv:2401.11605)."""
    return gamma / (snr + gamma)


def debiased(snr: Tensor) -> Tensor:
    """1 / sqrt(SNR) (Yu et al. 2023, arXiv:2310.08442)."""
    return snr.rsqrt()


def of_v(weight: Tensor, snr: Tensor) -> Tensor:
    """`weight` for the squared error of v, of which the noise's is the SNR / (SNR + 1)-th part."""
    return weight * snr / (snr + 1)


@dataclass(frozen=True)
class Objective:
    """`c` and `weights`: [T] float32 on the device, or None where the loss knows none and all weigh 1."""

    loss: Loss
    c: Tensor | None = None
    weights: Tensor | None = None

    def __call__(self, predicted: Tensor, target: Tensor, t: Tensor, mask: Tensor | None = None) -> Tensor:
        """Each sample's loss, [B] float32, of what was predicted and asked for [B, C, h, w] at `t` [B] int64; with
        `mask` [B, 1, h, w] each element's counts so much.

        The mean is over all elements, whatever their weights, as in kohya's trainer and by default in OneTrainer: what
        counts has the gradient that it has without a mask, where a mean by weights would pull as hard at a few latents
        as at a whole picture.
        """
        c = None if self.c is None else self.c[t].view(-1, 1, 1, 1)
        losses = self.loss(predicted.float(), target, c)
        losses = (losses if mask is None else losses * mask).mean(dim=(1, 2, 3))
        return losses if self.weights is None else losses * self.weights[t]


mse = Objective(l2)


def objective_of(config: Config, noise: NoiseSchedule | Flow) -> Objective:
    """What `config` asks for, with its tables beside `noise`'s. Raises ConfigError."""
    # At a terminal SNR of zero v's weights are 0, and need not be 0 times infinity.
    snr = noise.snr.clamp(min=1e-9)
    weights = _weights(config, noise, snr)
    c = None
    if config.loss_type in ("huber", "smooth_l1"):
        c = huber_c(config.huber_schedule, config.huber_c, snr).float()
    return Objective(LOSSES[config.loss_type], c, None if weights is None else weights.float())


def _weights(config: Config, noise: NoiseSchedule | Flow, snr: Tensor) -> Tensor | None:
    if config.min_snr_gamma:
        weights = min_snr(snr, config.min_snr_gamma)
    elif config.soft_min_snr_gamma:
        weights = soft_min_snr(snr, config.soft_min_snr_gamma)
    elif config.debiased_estimation_loss:
        weights = debiased(snr)
    elif config.scale_v_pred_loss_like_noise_pred:
        require_v("scale_v_pred_loss_like_noise_pred", noise)
        weights = torch.ones_like(snr)
    else:
        return None
    return of_v(weights, snr) if noise.prediction == "v" else weights


def training_noise(config: Config, noise: NoiseSchedule | Flow) -> NoiseSchedule | Flow:
    """The schedule that `config` trains on a model of `noise`. Raises ConfigError."""
    if not config.zero_terminal_snr:
        return noise
    # Nothing but noise tells an epsilon model nothing: it would be asked for its own input.
    require_v("zero_terminal_snr", noise)
    return noise.zero_terminal()


def require_v(key: str, noise: NoiseSchedule | Flow) -> None:
    if noise.prediction != "v":
        raise ConfigError([f"{key}: expected a v-prediction model, found one that predicts {noise.prediction}"])
