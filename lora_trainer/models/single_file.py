"""A single-file checkpoint (WebUI/LDM keys) as a Model, without a hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lora_trainer.models.bridge import text_view, unet_view, vae_view
from lora_trainer.models.checkpoint import read_shapes, read_tensors
from lora_trainer.models.families import Family, detect
from lora_trainer.models.ldm_yaml import LdmConfig, read_beside
from lora_trainer.models.model import CheckpointHashes, Model, ModelFacts
from lora_trainer.models.noise import NoiseSchedule, Prediction, scaled_linear
from lora_trainer.models.text import TextEncoder, bundled
from lora_trainer.models.unet_names import LDM_PREFIX as UNET

_PARAMETERIZATIONS: dict[str, Prediction] = {"eps": "epsilon", "v": "v"}


def place(
    path: Path, device: torch.device, dtype: torch.dtype, *, trained: tuple[str, ...] = (UNET,)
) -> tuple[Family, dict[str, Tensor]]:
    """The file's family and its state dict, each tensor copied and converted once.

    What is `trained` takes the compute `dtype`; all else stays fp32, since it runs once an image. On a GPU the UNet's
    k×k kernels lie channels-last, as the fast step reads them: these tensors are ours alone. Raises ModelError.
    """
    family = detect(read_shapes(path), str(path))
    state = read_tensors(path, device, lambda name: dtype if name.startswith(trained) else torch.float32)
    if device.type == "cuda":
        for name in [name for name, tensor in state.items() if name.startswith(UNET) and is_kernel(tensor)]:
            state[name] = state[name].contiguous(memory_format=torch.channels_last)
    return family, state


def is_kernel(tensor: Tensor) -> bool:
    """Whether this is the weight of a convolution wider than 1×1, for which the layout matters."""
    return tensor.dim() == 4 and max(tensor.shape[2:]) > 1


def model_of(
    state: dict[str, Tensor],
    family: Family,
    path: Path,
    *,
    device: torch.device,
    hashes: Callable[[], CheckpointHashes],
    clip_skip: int | None = None,
) -> Model:
    """Views of a placed state dict. What shapes do not tell comes from the YAML beside `path`."""
    config = read_beside(path)
    unet = unet_view(state, num_heads=config.num_heads or family.num_heads)
    return Model(
        unet=unet,
        text=TextEncoder(bundled(), text_view(state, config_folder=config.text_folder), clip_skip or 1),
        vae=vae_view(state, scale_factor=config.scale_factor or family.scale_factor),
        noise=schedule(state, family, config).to(device),
        facts=ModelFacts(
            name=path.name,
            family=family,
            device=device,
            dtype=unet.dtype,
            hashes=hashes,
        ),
    )


def schedule(state: dict[str, Tensor], family: Family, config: LdmConfig) -> NoiseSchedule:
    """The YAML's schedule, else the file's own table, else the family's."""
    prediction = _PARAMETERIZATIONS.get(config.parameterization or "", family.prediction)
    start, end, count = config.linear_start, config.linear_end, config.timesteps
    table = state.get("alphas_cumprod")
    if table is not None and start is None:
        return NoiseSchedule(table.float(), prediction)
    return NoiseSchedule(
        scaled_linear(start or family.linear_start, end or family.linear_end, count or family.timesteps), prediction
    )
