"""The loaded model as a Model: views that share its tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from modules import devices, shared
from torch import Tensor

from lora_trainer.config import Config
from lora_trainer.hosts.webui import sd3
from lora_trainer.hosts.webui.prediction import drawn_as
from lora_trainer.hosts.webui.prompts import text_of
from lora_trainer.hosts.webui.tensors import family_of, name_of, state_of
from lora_trainer.models.bridge import mmdit_view, unet_view, vae_view
from lora_trainer.models.families import Family, predicting
from lora_trainer.models.inpainting import TOLD, inpaints, paint_all
from lora_trainer.models.model import CheckpointHashes, Model, ModelFacts
from lora_trainer.models.storage import FP8, STORAGES
from lora_trainer.models.stored import Stored


def view_of(sd_model: Any, config: Config) -> Model:
    """Views of `sd_model` for one segment. Raises ModelError for a model of another family, and ConfigError for a
    `clip_skip` in a family that has none."""
    state = state_of(sd_model)
    family = _scored(family_of(sd_model, state))
    state = {name: _computable(tensor) for name, tensor in state.items()}
    mmdit = family.network == "mmdit"
    unet = mmdit_view(state) if mmdit else unet_view(state, **_heads(sd_model))
    scale = float(getattr(sd_model, "scale_factor", family.scale_factor))
    vae = vae_view(state, scale_factor=scale, shift_factor=family.shift_factor)
    paint_all(unet, vae)
    text = (sd3.text_of if mmdit else text_of)(sd_model, state, family, config)
    noise, told = drawn_as(sd_model)
    if family.max_timestep is not None:
        noise = replace(noise, limit=family.max_timestep)
    told = (*told, *family.notices, *text.told, *((TOLD,) if inpaints(unet) else ()))
    return Model(
        unet=unet,
        text=text,
        vae=vae,
        noise=noise.to(devices.device),
        facts=ModelFacts(
            name=name_of(sd_model),
            family=predicting(family, noise.prediction),
            device=next(unet.parameters()).device,
            dtype=unet.dtype,
            hashes=_hashes(sd_model),
            notices=told,
        ),
    )


def _scored(family: Family) -> Family:
    """With the aesthetic scores that the WebUI draws with, where the family has any."""
    if family.scores is None:
        return family
    opts = shared.opts
    scores = float(opts.sdxl_refiner_high_aesthetic_score), float(opts.sdxl_refiner_low_aesthetic_score)
    return replace(family, scores=scores)


def _heads(sd_model: Any) -> dict[str, int]:
    """Shapes do not tell the number of heads: each attention has as many, or as many channels a head."""
    modules = sd_model.model.diffusion_model.named_modules()
    attentions = [module for name, module in modules if name.endswith("attn1")]
    heads = [attention.heads for attention in attentions]
    if len(set(heads)) == 1:
        return {"num_heads": heads[0]}
    return {"head_channels": attentions[0].to_q.weight.shape[0] // heads[0]}


def _computable(tensor: Tensor) -> Tensor:
    """The WebUI's fp8 as the dtype it computes in: weights decoded where they are used; only biases are copied."""
    if tensor.dtype == FP8 and tensor.dim() > 1:
        return Stored.over(tensor, STORAGES["fp8"], devices.dtype_unet)
    return tensor.to(devices.dtype_unet) if "float8" in str(tensor.dtype) else tensor


def _hashes(sd_model: Any) -> Callable[[], CheckpointHashes]:
    """The WebUI knows both, and keeps the long one in its cache; without --no-hashing it is computed when asked for."""
    info = sd_model.sd_checkpoint_info

    def hashes() -> CheckpointHashes:
        if not info.sha256:
            info.calculate_shorthash()
        return CheckpointHashes(info.hash, info.sha256)

    return hashes
