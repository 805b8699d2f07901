"""UNets of inpainting checkpoints: beside the noisy latents they are shown a mask and the latents of the picture with
what is masked left gray (Rombach et al. 2022, arXiv:2112.10752, section 4.5)."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from lora_trainer.models.latents import posterior
from lora_trainer.models.mmdit import MMDiT

CHANNELS = 9
TOLD = (
    "base model: an inpainting checkpoint: each picture is seen with random holes, and a quarter of the time not at all"
)


def inpaints(unet: UNet2DConditionModel | MMDiT) -> bool:
    return unet.config.in_channels == CHANNELS


def paint_all(unet: UNet2DConditionModel | MMDiT, vae: AutoencoderKL) -> None:
    """Let an inpainting `unet` that is shown noisy latents alone draw a whole picture, as the WebUI's txt2img does."""
    blanks: dict[tuple[int, int], Tensor] = {}

    def fill(module: UNet2DConditionModel, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        latents, *rest = args
        if latents.shape[1] == CHANNELS:
            return None
        size = (latents.shape[2], latents.shape[3])
        if size not in blanks:
            blanks[size] = blank(vae, *size)
        shown = blanks[size].to(latents).expand(len(latents), -1, -1, -1)
        return (torch.cat([latents, shown], dim=1), *rest), kwargs

    if inpaints(unet):
        unet.register_forward_pre_hook(fill, with_kwargs=True)


def blank(vae: AutoencoderKL, height: int, width: int) -> Tensor:
    """[1, 5, height, width] float32: all is masked, and nothing to be seen."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    gray = torch.zeros(1, 3, height * factor, width * factor)
    latents = posterior(vae, gray).mean * vae.config.scaling_factor
    return torch.cat([torch.ones_like(latents[:, :1]), latents], dim=1)
