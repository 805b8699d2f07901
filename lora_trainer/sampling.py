"""Pictures from a model view: previews, the contact sheet, and `lora-trainer sample`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from peft.tuners.lora import LoraLayer
from PIL import Image
from torch import Tensor

from lora_trainer.adapters.inject import Adapter, inject_factors
from lora_trainer.adapters.load import match, read_lora
from lora_trainer.adapters.naming import PREFIXES
from lora_trainer.errors import ModelError
from lora_trainer.models.latents import decode, latent_shape, to_image
from lora_trainer.models.model import Model
from lora_trainer.models.noise import NoiseSchedule
from lora_trainer.training import randomness
from lora_trainer.training.precision import Precision


@dataclass(frozen=True)
class Recipe:
    """How a picture is drawn: DDIM (Song et al. 2021, arXiv:2010.02502) with classifier-free guidance.

    `size`: (width, height) in pixels.
    """

    size: tuple[int, int]
    steps: int = 25
    guidance: float = 5.0
    negative: str = ""
    seed: int = 42


def scheduler(noise: NoiseSchedule) -> DDIMScheduler:
    """diffusers' DDIM with this model's schedule, as Stable Diffusion 1.x is published with it."""
    return DDIMScheduler(
        trained_betas=_betas(noise.alphas_cumprod.cpu().double()),
        prediction_type="epsilon" if noise.prediction == "epsilon" else "v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def generate(model: Model, prompts: Sequence[str], recipe: Recipe, precision: Precision) -> list[Image.Image]:
    """One picture a prompt. The same seed gives every prompt the same starting noise."""
    return [to_image(decode(model.vae, denoise(model, prompt, recipe, precision))[0]) for prompt in prompts]


def start(recipe: Recipe, shape: tuple[int, int, int]) -> Tensor:
    """The starting noise, [1, *shape] float32 on the CPU."""
    return randomness.normal(recipe.seed, "sample", [0], shape)


@torch.no_grad()
def denoise(model: Model, prompt: str, recipe: Recipe, precision: Precision) -> Tensor:
    """The finished latents of one prompt, [1, 4, h, w] float32."""
    device = model.facts.device
    context = contexts(model, [recipe.negative, prompt])
    ddim = scheduler(model.noise)
    ddim.set_timesteps(recipe.steps)
    x = start(recipe, latent_shape(model.vae, *recipe.size)).to(device)
    for t in ddim.timesteps:
        with precision.autocast():
            out = model.unet(x.expand(2, -1, -1, -1), t.to(device), encoder_hidden_states=context, return_dict=False)[
                0
            ].float()
        away, towards = out.chunk(2)
        x = ddim.step(away + recipe.guidance * (towards - away), t, x, return_dict=False)[0]
    return x


@torch.no_grad()
def contexts(model: Model, prompts: Sequence[str]) -> Tensor:
    """Embeddings [len(prompts), 77 n, width]: shorter ones are filled up with the empty prompt's chunks."""
    device = model.facts.device
    ids = [model.text.tokenize(prompt) for prompt in prompts]
    chunks = max(part.shape[0] for part in ids)
    empty = model.text.tokenize("")
    full = [torch.cat([part] + [empty] * (chunks - part.shape[0])) for part in ids]
    return torch.cat([model.text.encode(part.to(device)) for part in full])


def _betas(alphas_cumprod: Tensor) -> list[float]:
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    return (1 - alphas_cumprod / before).tolist()


def apply_lora(model: Model, path: Path) -> Adapter:
    """Put the LoRA of `path` on `model`'s UNet and text encoder. Raises ModelError when it does not fit."""
    lora = read_lora(path)
    layers: dict[str, LoraLayer] = {}
    for part, network in (("unet", model.unet), ("text_encoder", model.text.module)):
        matched, unmatched = match(lora, network, PREFIXES[part])
        if unmatched:
            raise ModelError(
                f"{path}: {len(unmatched)} of its {len(matched) + len(unmatched)} modules have no place in the "
                f"{part.replace('_', ' ').replace('unet', 'UNet')} of {model.facts.name}, for example {unmatched[0]}"
            )
        if matched:
            layers |= inject_factors(network, matched).layers
    if not layers:
        raise ModelError(f"{path}: made for another base model: none of its modules has a place in {model.facts.name}")
    factors = lora.factors.values()
    return Adapter(layers, max(f.rank for f in factors), max(f.alpha for f in factors))
