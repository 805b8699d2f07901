"""The latents that the base learns from: every picture several times, a little moved each time.

A model that sees a picture always in the same place learns it by heart, and then restores *that* picture from any
slightly noisy one, which no small LoRA can talk it out of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from gpu import CUDA, DEVICE
from networks import SCALE
from pretrain_vae import pixels
from torch import Tensor, nn
from torch.nn import functional

VARIANTS = 16 if CUDA else 2
DEGREES, SCALES, SHIFT, MIRRORED = 5.0, (0.98, 1.18), 0.09, 0.5


@dataclass(frozen=True)
class Bank:
    """Means and standard deviations [N, variants, 4, 16, 16] of scaled latents; variant 0 is the picture itself."""

    mean: Tensor
    std: Tensor

    @classmethod
    def empty(cls, count: int, latent: tuple[int, int, int], variants: int = VARIANTS) -> Bank:
        shape = (count, variants, *latent)
        # Noise, since the step's warm-up and capture run on it.
        return cls(torch.randn(shape, device=DEVICE), torch.zeros(shape, device=DEVICE))

    def draw(self, index: Tensor) -> Tensor:
        """[B, 4, 16, 16]: a variant of each picture, drawn from its posterior."""
        variant = torch.randint(self.mean.shape[1], index.shape, device=DEVICE)
        mean = self.mean[index, variant]
        return mean + self.std[index, variant] * torch.randn_like(mean)


def moved(pictures: Tensor) -> Tensor:
    """Each picture [B, 3, S, S] (-1 … 1, on white) mirrored or not, turned, scaled and shifted at random."""
    count = len(pictures)
    uniform = lambda low, high: low + (high - low) * torch.rand(count, device=DEVICE)  # noqa: E731
    angle = uniform(-DEGREES, DEGREES) * (math.pi / 180)
    scale = uniform(*SCALES)
    mirror = 1 - 2 * (torch.rand(count, device=DEVICE) < MIRRORED).float()
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()], 1), torch.stack([angle.sin(), angle.cos()], 1)], 1)
    matrix = torch.zeros(count, 2, 3, device=DEVICE)
    matrix[:, :, :2] = turn * scale.view(-1, 1, 1)
    matrix[:, :, 0] *= mirror.view(-1, 1)
    matrix[:, 0, 2], matrix[:, 1, 2] = uniform(-SHIFT, SHIFT), uniform(-SHIFT, SHIFT)
    grid = functional.affine_grid(matrix, list(pictures.shape), align_corners=False)
    # Zeros beyond the edge are white when the picture is inverted.
    return 1 - functional.grid_sample(1 - pictures, grid, align_corners=False)


@torch.no_grad()
def encode_bank(bank: Bank, vae: nn.Module, pictures: Tensor) -> None:
    """Fill `bank` from `pictures` [N, 3, 128, 128] uint8."""
    for start in range(0, len(pictures), 128):
        x = pixels(pictures[start : start + 128])
        for variant in range(bank.mean.shape[1]):
            found = vae.encode(moved(x) if variant else x).latent_dist
            bank.mean[start : start + 128, variant] = found.mean * SCALE
            bank.std[start : start + 128, variant] = found.std * SCALE
