"""Model families: what each needs. One declaration a family."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lora_trainer.models.noise import Prediction

# A text encoder's first tensor: transformers' name and OpenCLIP's.
_EMBEDDING = {"clip": "text_model.embeddings.token_embedding.weight", "open_clip": "token_embedding.weight"}


@dataclass(frozen=True)
class TextPart:
    """One text encoder of a family.

    `prefix` begins its tensors' names in a checkpoint, whose `form` is transformers' or OpenCLIP's; `lora` its modules'
    names in a LoRA. What it says is the output of `layer`, counted from the last, after the final norm if `normed`. The
    token `pad` fills a chunk up (None: end-of-text). `pooled`: it also says one vector for the whole caption, which
    passes a projection in OpenCLIP's form, and in transformers' if `projected`. `activation`: of transformers' form.
    `network` is diffusers' name of it; `native`: LoRA files call its modules by the WebUI's own names, the only ones
    that it finds.
    """

    prefix: str
    lora: str
    form: Literal["clip", "open_clip"] = "clip"
    layer: int = 1
    normed: bool = True
    pad: int | None = None
    pooled: bool = False
    network: str = "text_encoder"
    native: bool = False
    projected: bool = False
    activation: str = "quick_gelu"

    @property
    def embedding(self) -> str:
        """The name of its token embedding in a checkpoint."""
        return self.prefix + _EMBEDDING[self.form]


@dataclass(frozen=True)
class Family:
    """`base_version` is what `ss_base_model_version` says; `scale_factor` turns VAE latents into UNet latents, after
    `shift_factor` was subtracted. `network`: what is asked for the noise; where that is no UNet, `flow_shift` is that
    of its schedule, which is a rectified flow.

    A UNet has `num_heads` in each attention, or as many as have `head_channels` each. `ldm_names`: LoRA files call its
    modules by CompVis' names instead of diffusers'; `attends`: which levels of its UNet's up side have attention.
    `clip_skip`: the user may choose the layer of the text encoder.
    `alphas`: hosts read them in a LoRA; where they do not, alpha / rank is folded into the weights.
    `probed`: its files do not say what the UNet predicts, which is tested. `heavy_text`: too large to be kept in fp32
    for a few captions. `max_timestep`: it was trained below that timestep alone. `scores`: the UNet is told how
    beautiful a picture is, with a prompt and with a negative one, in place of the target size.
    """

    name: str
    base_version: str
    architecture: str
    resolution: int
    scale_factor: float
    prediction: Prediction
    text: tuple[TextPart, ...]
    network: Literal["unet", "mmdit"] = "unet"
    shift_factor: float = 0.0
    flow_shift: float = 1.0
    num_heads: int | None = None
    head_channels: int | None = None
    ldm_names: bool = False
    attends: tuple[bool, ...] = (False, True, True, True)
    clip_skip: bool = False
    alphas: bool = True
    probed: bool = False
    heavy_text: bool = False
    linear_start: float = 0.00085
    linear_end: float = 0.012
    timesteps: int = 1000
    max_timestep: int | None = None
    scores: tuple[float, float] | None = None

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know of a model of this family."""
        if self.scores is None:
            return ()
        return (
            f"base model: {self.name}: it knows the {self.max_timestep} least noisy timesteps alone, so those are "
            "trained unless max_timestep says otherwise; all pictures are said to have the aesthetic score "
            f"{self.scores[0]:g}",
        )

    def told(self, sizes: Tensor, *, negative: bool = False) -> Tensor:
        """What the UNet is told of pictures of these `sizes` [B, 6] (`crops.View.sizes`), float32: [B, 6], or [B, 5]
        with a score."""
        if self.scores is None:
            return sizes.float()
        score = torch.full_like(sizes[:, :1], self.scores[negative], dtype=torch.float32)
        return torch.cat([sizes[:, :4].float(), score], dim=1)


SD1 = Family(
    name="Stable Diffusion 1.x",
    base_version="sd_v1",
    architecture="stable-diffusion-v1",
    resolution=512,
    scale_factor=0.18215,
    prediction="epsilon",
    text=(TextPart("cond_stage_model.transformer.", "lora_te"),),
    num_heads=8,
    clip_skip=True,
)
SD2 = Family(
    name="Stable Diffusion 2.x",
    base_version="sd_v2",
    architecture="stable-diffusion-v2-512",
    resolution=512,
    scale_factor=0.18215,
    prediction="epsilon",
    text=(TextPart("cond_stage_model.model.", "lora_te", "open_clip", layer=2, pad=0),),
    head_channels=64,
    probed=True,
)
SD2_V = replace(SD2, base_version="sd_v2_v", architecture="stable-diffusion-v2-768-v", resolution=768, prediction="v")
# Podell et al. 2023, arXiv:2307.01952.
_BIG_G = TextPart(
    prefix="conditioner.embedders.1.model.",
    lora="lora_te2",
    form="open_clip",
    layer=2,
    normed=False,
    pad=0,
    pooled=True,
    network="text_encoder_2",
)
SDXL = Family(
    name="SDXL",
    base_version="sdxl_base_v1-0",
    architecture="stable-diffusion-xl-v1-base",
    resolution=1024,
    scale_factor=0.13025,
    prediction="epsilon",
    text=(
        TextPart("conditioner.embedders.0.transformer.", "lora_te1", layer=2, normed=False),
        _BIG_G,
    ),
    head_channels=64,
    ldm_names=True,
    attends=(True, True, False),
    heavy_text=True,
)
# SDXL with blocks cut out, all of its middle's attention among them (Gupta et al. 2024, arXiv:2401.02677).
SSD = replace(SDXL, name="SSD-1B or Segmind Vega")
# Trained on the 200 least noisy timesteps (arXiv:2307.01952, section 2.5); the scores are those with which Stability's
# code, diffusers and the WebUI draw.
REFINER = replace(
    SDXL,
    name="SDXL refiner",
    base_version="sdxl_refiner_v1-0",
    architecture="stable-diffusion-xl-v1-refiner",
    text=(replace(_BIG_G, prefix="conditioner.embedders.0.model.", native=True),),
    attends=(False, True, True, False),
    max_timestep=200,
    scores=(6.0, 2.5),
)
# Esser et al. 2024, arXiv:2403.03206; without T5-XXL, as the WebUI loads it by default.
SD3 = Family(
    name="Stable Diffusion 3",
    base_version="sd3_medium",
    architecture="stable-diffusion-3-medium",
    resolution=1024,
    scale_factor=1.5305,
    prediction="flow",
    text=(
        TextPart("text_encoders.clip_l.transformer.", "lora_te1", layer=2, normed=False, pooled=True),
        TextPart(
            "text_encoders.clip_g.transformer.",
            "lora_te2",
            layer=2,
            normed=False,
            pad=0,
            pooled=True,
            projected=True,
            activation="gelu",
            network="text_encoder_2",
        ),
    ),
    network="mmdit",
    shift_factor=0.0609,
    flow_shift=3.0,
    alphas=False,
    heavy_text=True,
)
# Those with UNets.
FAMILIES = (SDXL, REFINER, SD2, SD1)


def predicting(family: Family, prediction: Prediction) -> Family:
    """The declaration for a model of `family` that predicts this."""
    return SD2_V if family is SD2 and prediction == "v" else family
