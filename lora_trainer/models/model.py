"""What a run borrows from its host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from lora_trainer.models.families import Family
from lora_trainer.models.flow import Flow
from lora_trainer.models.mmdit import MMDiT
from lora_trainer.models.noise import NoiseSchedule
from lora_trainer.models.text import TextEncoder


@dataclass(frozen=True)
class CheckpointHashes:
    """`legacy` is A1111's 8 digits of a window of the file, `sha256` of the whole file; None where not known."""

    legacy: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class ModelFacts:
    """Plain facts. `hashes` may wait for a background thread. `notices`: what the user should know of the model."""

    name: str
    family: Family
    device: torch.device
    dtype: torch.dtype
    hashes: Callable[[], CheckpointHashes]
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """The borrowed model: frozen views that share the host's tensors. `unet`: a UNet, or what Stable Diffusion 3 has in
    its place."""

    unet: UNet2DConditionModel | MMDiT
    text: TextEncoder
    vae: AutoencoderKL
    noise: NoiseSchedule | Flow
    facts: ModelFacts
