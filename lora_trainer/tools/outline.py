"""A checkpoint file by its header alone: its family, and which of its tensors are which modules' weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_trainer.adapters.naming import kohya_name, text_name
from lora_trainer.adapters.parts import Part, parts
from lora_trainer.errors import ModelError
from lora_trainer.models import open_clip
from lora_trainer.models.bridge import open_clip_view, text_view, unet_view
from lora_trainer.models.checkpoint import PICKLE_SUFFIXES, Shapes, read_shapes
from lora_trainer.models.detection import detect
from lora_trainer.models.families import Family
from lora_trainer.models.unet_names import LDM_PREFIX, to_diffusers

_WEIGHT = ".weight"


@dataclass(frozen=True)
class Outline:
    """`parts`: the networks without numbers, by diffusers' names of them."""

    path: Path
    family: Family
    shapes: Shapes
    parts: Mapping[str, Part]

    def weights(self, key: str, tensor: Tensor) -> Iterator[tuple[str, str, Tensor]]:
        """(network, module, view of `tensor`) of each module whose weight is in the tensor called `key`. OpenCLIP packs
        three projections into one."""
        if key.startswith(LDM_PREFIX):
            if key.endswith(_WEIGHT):
                layers = self.parts["unet"].module.config.layers_per_block
                yield "unet", to_diffusers(key[len(LDM_PREFIX) :], layers).removesuffix(_WEIGHT), tensor
            return
        for text in self.family.text:
            if key.startswith(text.prefix):
                part = {key[len(text.prefix) :]: tensor}
                views = part if text.form == "clip" else open_clip.to_transformers(part, projection=False)
                for name, view in views.items():
                    if name.endswith(_WEIGHT):
                        yield text.network, text_name(name.removesuffix(_WEIGHT)), view

    def names(self, network: str, module: str) -> set[str]:
        """What LoRA files may call a module."""
        part = self.parts[network]
        return {kohya_name(part.prefix, way(module)) for way in (str, part.ldm)}


def outline(path: Path) -> Outline:
    """Raises ModelError for what is no checkpoint of a known family in a .safetensors file."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise ModelError(f"{path}: expected a .safetensors file; convert it first")
    shapes = read_shapes(path)
    family = detect(shapes, str(path))
    if family.network != "unet":
        raise ModelError(f"{path}: a {family.name} checkpoint; expected Stable Diffusion 1.x, 2.x or SDXL")
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        return Outline(path, family, shapes, _parts(family, state))
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    except (LookupError, ValueError, RuntimeError) as error:
        raise ModelError(f"{path}: not a whole checkpoint of {family.name} ({error!r})") from error


def _parts(family: Family, state: Mapping[str, Tensor]) -> dict[str, Part]:
    """Views of tensors without numbers. Raises ModelError, and others for what is no whole model."""
    encoders = {
        text.network: text_view(state, prefix=text.prefix)
        if text.form == "clip"
        else open_clip_view(state, prefix=text.prefix, projection=text.pooled)
        for text in family.text
    }
    unet = unet_view(state, num_heads=family.num_heads, head_channels=family.head_channels)
    return parts(family, unet, encoders)
