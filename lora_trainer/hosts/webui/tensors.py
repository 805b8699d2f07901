"""The tensors of the loaded model, under the names that a checkpoint file gives them, and whether it can be trained."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_trainer.errors import ModelError
from lora_trainer.models.checkpoint import read_header
from lora_trainer.models.detection import detect
from lora_trainer.models.families import Family
from lora_trainer.models.unet_names import LDM_PREFIX as UNET_PREFIX
from lora_trainer.models.vae_names import LDM_PREFIX as VAE_PREFIX


def state_of(sd_model: Any) -> dict[str, Tensor]:
    """The live tensors by their names in a file.

    The WebUI cuts SSD-1B's blocks out of SDXL whatever the file holds. What that lacks of them, as Segmind Vega's does,
    stays zero and does nothing: it is left out.
    """
    held = file_keys(sd_model) if getattr(sd_model, "is_ssd", False) else ()
    parts = {UNET_PREFIX: sd_model.model.diffusion_model, VAE_PREFIX: sd_model.first_stage_model, **texts_of(sd_model)}
    # The WebUI wraps the token embedding to put textual inversions in.
    return {
        prefix + name.replace("token_embedding.wrapped.", "token_embedding."): tensor
        for prefix, module in parts.items()
        for name, tensor in module.state_dict().items()
        if not held or prefix != UNET_PREFIX or prefix + name in held
    }


def embedders_of(sd_model: Any) -> dict[str, Any]:
    """The WebUI's wrappers of the text encoders, by what begins their tensors' names in a file: one, SDXL's two, none
    in a model of another form."""
    conditioner = getattr(sd_model, "conditioner", None)
    if conditioner is not None:
        found = {f"conditioner.embedders.{number}.": one for number, one in enumerate(conditioner.embedders)}
    else:
        found = {"cond_stage_model.": getattr(sd_model, "cond_stage_model", None)}
    return {prefix: embedder for prefix, embedder in found.items() if hasattr(embedder, "wrapped")}


def texts_of(sd_model: Any) -> dict[str, nn.Module]:
    """The text encoders themselves, likewise; Stable Diffusion 3's T5-XXL is none of a run's."""
    both = getattr(sd_model, "text_encoders", None)
    if both is not None:
        return {"text_encoders.clip_l.": both.clip_l, "text_encoders.clip_g.": both.clip_g}
    return {prefix: embedder.wrapped for prefix, embedder in embedders_of(sd_model).items()}


def networks_of(sd_model: Any) -> list[nn.Module]:
    """The UNet and the text encoders: what a run trains on."""
    return [sd_model.model.diffusion_model, *texts_of(sd_model).values()]


def family_of(sd_model: Any, state: dict[str, Tensor]) -> Family:
    """By what is loaded, `state`, and by what else the file holds. Raises ModelError."""
    elsewhere = dict.fromkeys(file_keys(sd_model), ())
    return detect(elsewhere | {name: tuple(tensor.shape) for name, tensor in state.items()}, name_of(sd_model))


def refusal(sd_model: Any) -> str | None:
    """Why a LoRA cannot be trained on `sd_model`, if so."""
    try:
        family_of(sd_model, state_of(sd_model))
    except ModelError as error:
        return str(error)
    return None


def file_keys(sd_model: Any) -> Collection[str]:
    """The names of the tensors in the checkpoint's file; none where it is a pickle, or no longer there."""
    path = Path(sd_model.sd_checkpoint_info.filename)
    try:
        return read_header(path).keys() if path.suffix.lower() == ".safetensors" else ()
    except ModelError:
        return ()


def name_of(sd_model: Any) -> str:
    """The checkpoint's file name without its folder."""
    return Path(sd_model.sd_checkpoint_info.filename).name
