"""Pictures to latents and back, through the VAE view."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor


class Moments(NamedTuple):
    """The posterior of a picture's latents, [B, 4, h, w] float32 each."""

    mean: Tensor
    std: Tensor


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as [1, 3, H, W] float32 in -1 … 1."""
    return scaled(to_bytes(image))


def to_bytes(image: Image.Image) -> Tensor:
    """An RGB picture as [1, 3, H, W] uint8."""
    return torch.from_numpy(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))).unsqueeze(0)


def scaled(pixels: Tensor) -> Tensor:
    """Bytes as float32 in -1 … 1."""
    return pixels.float().div_(127.5).sub_(1)


def to_image(pixels: Tensor) -> Image.Image:
    """[3, H, W] in -1 … 1 as an RGB picture."""
    values = pixels.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).cpu().numpy())


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor, noise: Tensor) -> Tensor:
    """[B, 3, H, W] pixels to scaled latents [B, 4, H/8, W/8] float32, on the VAE's device."""
    return sampled(vae, posterior(vae, pixels), noise)


@torch.no_grad()
def posterior(vae: AutoencoderKL, pixels: Tensor) -> Moments:
    """What the VAE makes of [B, 3, H, W] pixels, in float32.

    Where a half-precision VAE overflows, as SDXL's does, a float32 copy of it is asked; where the GPU has too little
    memory for a batch, it gets one picture after the other, and where one is too much, a float32 copy on the CPU is
    asked.
    """
    try:
        moments = _posterior(vae, pixels)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        if len(pixels) == 1:
            return _posterior(_on_cpu(vae), pixels)
        return joined([posterior(vae, one) for one in pixels.split(1)])
    if not torch.isfinite(moments.mean).all() and next(vae.parameters()).dtype != torch.float32:
        moments = _posterior(deepcopy(vae).float(), pixels)
    return moments


def joined(parts: Sequence[Moments]) -> Moments:
    """One batch; on the CPU where not all are on one device."""
    alike = len({part.mean.device for part in parts}) == 1
    return Moments(*(torch.cat([x if alike else x.cpu() for x in column]) for column in zip(*parts, strict=True)))


def sampled(vae: AutoencoderKL, moments: Moments, noise: Tensor) -> Tensor:
    """Scaled latents; `noise` (of their shape, float32) picks the sample, so that equal seeds give equal latents."""
    drawn = moments.mean + moments.std * noise.to(moments.mean.device)
    return (drawn - shift_of(vae)) * vae.config.scaling_factor


def _on_cpu(vae: AutoencoderKL) -> AutoencoderKL:
    """A float32 copy, made without taking any memory of the GPU."""
    copy = type(vae).from_config(vae.config)
    copy.load_state_dict({name: tensor.cpu().float() for name, tensor in vae.state_dict().items()})
    return copy.eval()


def _posterior(vae: AutoencoderKL, pixels: Tensor) -> Moments:
    parameter = next(vae.parameters())
    latent = vae.encode(pixels.to(parameter.device, parameter.dtype)).latent_dist
    return Moments(latent.mean.float(), latent.std.float())


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Scaled latents [B, 4, h, w] to pixels [B, 3, 8h, 8w] in about -1 … 1, float32; where a half-precision VAE
    overflows, by a float32 copy of it."""
    pixels = _decoded(vae, latents)
    if not torch.isfinite(pixels).all() and next(vae.parameters()).dtype != torch.float32:
        pixels = _decoded(deepcopy(vae).float(), latents)
    return pixels


def _decoded(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    parameter = next(vae.parameters())
    scaled = (latents / vae.config.scaling_factor + shift_of(vae)).to(parameter.device, parameter.dtype)
    return vae.decode(scaled).sample.float()


def shift_of(vae: AutoencoderKL) -> float:
    """What is subtracted from latents before they are scaled: SD3's are off the centre."""
    return vae.config.get("shift_factor") or 0.0


def latent_shape(vae: AutoencoderKL, width: int, height: int) -> tuple[int, int, int]:
    """(channels, height, width) of the latents of a picture."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return vae.config.latent_channels, height // factor, width // factor
