"""Pictures from a model view: previews, the contact sheet, and `lora-trainer sample`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor

from lora_trainer.adapters.inject import Adapter, inject_factors, strengthened
from lora_trainer.adapters.load import match, read_adapter
from lora_trainer.adapters.parts import layer_name, parts_of
from lora_trainer.errors import ModelError
from lora_trainer.models.flow import Euler, Flow
from lora_trainer.models.latents import decode, latent_shape, to_image
from lora_trainer.models.model import Model
from lora_trainer.models.noise import NoiseSchedule
from lora_trainer.training import randomness
from lora_trainer.training.precision import Precision


@dataclass(frozen=True)
class Recipe:
    """How a picture is drawn: DDIM (Song et al. 2021, arXiv:2010.02502) with classifier-free guidance; in models of a
    flow Euler's method.

    `size`: (width, height) in pixels.
    """

    size: tuple[int, int]
    steps: int = 25
    guidance: float = 5.0
    negative: str = ""
    seed: int = 42


def scheduler(noise: NoiseSchedule | Flow) -> DDIMScheduler | Euler:
    """diffusers' DDIM with this model's schedule, as Stable Diffusion 1.x is published with it. A schedule that ends
    without signal starts at its very end (arXiv:2305.08891, section 3.3)."""
    if isinstance(noise, Flow):
        return Euler(noise)
    ends_in_noise = noise.alphas_cumprod[-1] == 0
    return DDIMScheduler(
        trained_betas=_betas(noise.alphas_cumprod.cpu().double()),
        prediction_type="epsilon" if noise.prediction == "epsilon" else "v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=0 if ends_in_noise else 1,
        timestep_spacing="trailing" if ends_in_noise else "leading",
    )


def generate(model: Model, prompts: Sequence[str], recipe: Recipe, precision: Precision) -> list[Image.Image]:
    """One picture a prompt. The same seed gives every prompt the same starting noise."""
    return [to_image(decode(model.vae, denoise(model, prompt, recipe, precision))[0]) for prompt in prompts]


def start(recipe: Recipe, shape: tuple[int, int, int]) -> Tensor:
    """The starting noise, [1, *shape] float32 on the CPU."""
    return randomness.normal(recipe.seed, "sample", [0], shape)


@torch.no_grad()
def denoise(model: Model, prompt: str, recipe: Recipe, precision: Precision) -> Tensor:
    """The finished latents of one prompt, [1, C, h, w] float32."""
    device = model.facts.device
    told = conditions(model, [recipe.negative, prompt], recipe.size, negatives=1)
    solver = scheduler(model.noise)
    solver.set_timesteps(recipe.steps)
    x = start(recipe, latent_shape(model.vae, *recipe.size)).to(device)
    for t in solver.timesteps:
        with precision.autocast():
            out = model.unet(x.expand(2, -1, -1, -1), t.to(device), **told, return_dict=False)[0].float()
        away, towards = out.chunk(2)
        x = solver.step(away + recipe.guidance * (towards - away), t, x, return_dict=False)[0]
    return x


@torch.no_grad()
def conditions(model: Model, prompts: Sequence[str], size: tuple[int, int], *, negatives: int = 0) -> dict[str, object]:
    """What the UNet is told of them, frozen: shorter ones are filled up with the empty prompt's chunks. SDXL is told of
    a whole picture of `size`. The first `negatives` of them are negative prompts."""
    device = model.facts.device
    ids = {prompt: model.text.tokenize(prompt) for prompt in prompts}
    chunks = max(part.shape[0] for part in ids.values())
    empty = model.text.tokenize("")
    full = {prompt: torch.cat([part] + [empty] * (chunks - part.shape[0])) for prompt, part in ids.items()}
    each = {prompt: model.text.conditions(part.to(device)) for prompt, part in full.items()}
    said = [each[prompt] for prompt in prompts]
    told: dict[str, object] = {"encoder_hidden_states": torch.cat([one.context for one in said])}
    if said[0].pooled is not None:
        width, height = size
        sizes = torch.tensor([[height, width, 0, 0, height, width]], device=device)
        pooled = torch.cat([one.pooled for one in said])
        rows = [model.facts.family.told(sizes, negative=number < negatives) for number in range(len(said))]
        told["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.cat(rows)}
    return told


def _betas(alphas_cumprod: Tensor) -> list[float]:
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    return (1 - alphas_cumprod / before).tolist()


@dataclass(frozen=True)
class Applied:
    """What a file put on a model."""

    adapters: tuple[Adapter, ...]

    def weight(self, value: float) -> AbstractContextManager[None]:
        """All of it at `value` times its strength; at 0 the model is exactly the base."""
        return strengthened(self.adapters, value)


def apply_lora(model: Model, path: Path) -> Applied:
    """Put the LoRA of `path` on `model`'s UNet and text encoders. Raises ModelError when it does not fit."""
    lora = read_adapter(path)
    adapters: list[Adapter] = []
    parts = parts_of(model)
    strange = [name for name in lora.factors if not name.startswith(tuple(f"{p.prefix}_" for p in parts.values()))]
    if strange:
        raise ModelError(
            f"{path}: made for another base model: {model.facts.name} has no place for {len(strange)} of its "
            f"{len(lora.factors)} modules, for example {strange[0]}"
        )
    for name, part in parts.items():
        matched, unmatched = match(lora, part.module, part.prefix, named=part.ldm)
        if unmatched:
            raise ModelError(
                f"{path}: {len(unmatched)} of its {len(matched) + len(unmatched)} modules have no place in the "
                f"{name.replace('_', ' ').replace('unet', 'UNet')} of {model.facts.name}, for example {unmatched[0]}"
            )
        if matched:
            adapters += [one.called(partial(layer_name, name)) for one in inject_factors(part.module, matched)]
    if not adapters:
        raise ModelError(f"{path}: made for another base model: none of its modules has a place in {model.facts.name}")
    return Applied(tuple(adapters))
