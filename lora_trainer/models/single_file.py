"""A single-file checkpoint (WebUI/LDM keys) as a Model, without a hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig

from lora_trainer.errors import ConfigError
from lora_trainer.models.bridge import mmdit_view, open_clip_view, text_view, unet_view, vae_view
from lora_trainer.models.checkpoint import V_PREDICTION, ZERO_TERMINAL, read_shapes, read_tensors
from lora_trainer.models.detection import detect
from lora_trainer.models.families import Family, predicting
from lora_trainer.models.flow import Flow, shifted
from lora_trainer.models.inpainting import TOLD, inpaints, paint_all
from lora_trainer.models.ldm_yaml import LdmConfig, read_beside
from lora_trainer.models.model import CheckpointHashes, Model, ModelFacts
from lora_trainer.models.noise import NoiseSchedule, Prediction, scaled_linear
from lora_trainer.models.storage import Storage
from lora_trainer.models.stored import Stored
from lora_trainer.models.text import ClipEncoder, TextEncoder, bundled
from lora_trainer.models.unet_names import LDM_PREFIX as UNET

# By LDM's names and by diffusers'.
_MATRIX = re.compile(r"\.(transformer_blocks\.\d+\..+|proj_in|proj_out)\.weight$")
NO_T5 = "base model: captions are heard by its two CLIP text encoders; T5-XXL stays silent, as by default in the WebUI"
PARAMETERIZATIONS: dict[str, Prediction] = {"eps": "epsilon", "v": "v"}


def place(
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    train_text: bool = False,
    storage: Storage | None = None,
) -> tuple[Family, dict[str, Tensor]]:
    """The file's family and its state dict, each tensor copied and converted once.

    What is trained takes the compute `dtype`, and so do text encoders that are heavy; all else stays fp32, since it
    runs once an image. The matrices of the UNet's transformers are kept in `storage`, where one is given. On a GPU the
    UNet's k×k kernels lie channels-last, as the fast step reads them: these tensors are ours alone. Raises ModelError.
    """
    family = detect(read_shapes(path), str(path))
    light = (UNET, *(part.prefix for part in family.text if train_text or family.heavy_text))

    def stored(name: str, tensor: Tensor) -> Tensor:
        return Stored.encode(tensor, storage) if storage is not None and is_matrix(name, tensor) else tensor

    state = read_tensors(path, device, lambda name: dtype if name.startswith(light) else torch.float32, stored)
    if device.type == "cuda":
        for name in [name for name, tensor in state.items() if name.startswith(UNET) and is_kernel(tensor)]:
            state[name] = state[name].contiguous(memory_format=torch.channels_last)
    return family, state


def is_matrix(name: str, tensor: Tensor) -> bool:
    """Whether this, by its name in the file, is a matrix of one of the UNet's transformers: what QLoRA quantises. Its
    convolutions, norms, biases, the embeddings of time and size and the first and last layer are none."""
    return name.startswith(UNET) and _MATRIX.search(name) is not None and tensor.dim() > 1 and not is_kernel(tensor)


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
    """Views of a placed state dict. What shapes do not tell comes from the YAML beside `path`.

    Raises ConfigError for a `clip_skip` in a family that has none.
    """
    config = read_beside(path)
    unet = mmdit_view(state) if family.network == "mmdit" else unet_view(state, **heads_of(family, config))
    told = list(notices(state, config))
    vae = vae_view(state, scale_factor=config.scale_factor or family.scale_factor, shift_factor=family.shift_factor)
    paint_all(unet, vae)
    if family.network == "mmdit":
        told.append(NO_T5)
    if inpaints(unet):
        told.append(TOLD)
    elif family.probed and config.parameterization is None and V_PREDICTION not in state:
        config = replace(config, parameterization=probe(unet))
        told.append(
            "base model: neither a YAML beside it nor the file says what it predicts; by a test of its UNet, as the "
            f"WebUI does it, that is {'v' if config.parameterization == 'v' else 'noise'}"
        )
    noise = schedule(state, family, config)
    if family.max_timestep is not None:
        noise = replace(noise, limit=family.max_timestep)
    told += family.notices
    return Model(
        unet=unet,
        text=TextEncoder(bundled(), encoders_of(state, family, clip_skip, folder=config.text_folder)),
        vae=vae,
        noise=noise.to(device),
        facts=ModelFacts(
            name=path.name,
            family=predicting(family, noise.prediction),
            device=device,
            dtype=unet.dtype,
            hashes=hashes,
            notices=tuple(told),
        ),
    )


@torch.no_grad()
def probe(unet: UNet2DConditionModel) -> str:
    """`eps` or `v`: what a UNet of Stable Diffusion 2.x predicts, by the WebUI's test (`sd_models_config.py` there): at
    the last timestep one for noise nearly returns its input."""
    like = next(unet.parameters())
    x = torch.full((1, unet.config.in_channels, 8, 8), 0.5, device=like.device, dtype=like.dtype)
    context = torch.full((1, 2, unet.config.cross_attention_dim), 0.5, device=like.device, dtype=like.dtype)
    out = unet(x, torch.tensor([999], device=like.device), encoder_hidden_states=context, return_dict=False)[0]
    return "v" if (out - x).float().mean().item() < -1 else "eps"


def heads_of(family: Family, config: LdmConfig) -> dict[str, int | None]:
    """`unet_view`'s, of the YAML where it says them."""
    if config.num_heads or config.head_channels:
        return {"num_heads": config.num_heads, "head_channels": config.head_channels}
    return {"num_heads": family.num_heads, "head_channels": family.head_channels}


def encoders_of(
    state: dict[str, Tensor],
    family: Family,
    clip_skip: int | None,
    *,
    folder: Path | None = None,
    config: CLIPTextConfig | None = None,
) -> tuple[ClipEncoder, ...]:
    """Views of the family's text encoders; what the shapes of a CLIP do not tell is in `config`, or in `folder`.

    Raises ConfigError for a `clip_skip` in a family that has none.
    """
    if not family.clip_skip and clip_skip not in (None, family.text[0].layer):
        layer = f"always takes layer {family.text[0].layer} from the end"
        raise ConfigError([f"clip_skip: {family.name} {layer}; expected nothing, found {clip_skip}"])
    encoders = []
    for part in family.text:
        if part.form == "clip":
            view = text_view(
                state,
                prefix=part.prefix,
                config_folder=folder,
                config=config,
                activation=part.activation,
                projection=part.projected,
            )
        else:
            view = open_clip_view(state, prefix=part.prefix, projection=part.pooled)
        heard = clip_skip or part.layer
        encoders.append(ClipEncoder(view, heard, part.normed, part.pad, part.pooled, part.network))
    return tuple(encoders)


def schedule(state: dict[str, Tensor], family: Family, config: LdmConfig) -> NoiseSchedule | Flow:
    """The YAML's schedule, else the file's own table, else the family's; what is predicted likewise."""
    if family.prediction == "flow":
        return Flow(shifted(family.flow_shift))
    own: Prediction = "v" if V_PREDICTION in state else family.prediction
    prediction = PARAMETERIZATIONS.get(config.parameterization or "", own)
    noise = _signal(state, family, config, prediction)
    return noise.zero_terminal() if ZERO_TERMINAL in state else noise


def notices(state: dict[str, Tensor], config: LdmConfig) -> Iterator[str]:
    """What the file says of how it is to be sampled, which not every host reads."""
    if V_PREDICTION in state and config.parameterization is None:
        yield (
            "base model: its key v_pred says that it predicts v, and so it is trained; WebUI 1.10 draws it as epsilon "
            "unless a YAML beside it says otherwise, Forge and reForge read the key"
        )
    if ZERO_TERMINAL in state:
        yield (
            "base model: its key ztsnr says that its noise schedule ends without signal, and so it is trained; WebUI "
            "1.10 needs the setting Noise schedule for sampling: Zero Terminal SNR"
        )


def _signal(state: dict[str, Tensor], family: Family, config: LdmConfig, prediction: Prediction) -> NoiseSchedule:
    start, end, count = config.linear_start, config.linear_end, config.timesteps
    table = state.get("alphas_cumprod")
    if table is not None and start is None:
        return NoiseSchedule(table.float(), prediction)
    return NoiseSchedule(
        scaled_linear(start or family.linear_start, end or family.linear_end, count or family.timesteps), prediction
    )
