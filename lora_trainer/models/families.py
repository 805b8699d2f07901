"""Model families: what tells one from another, and what each needs. One declaration a family."""

from __future__ import annotations

from dataclasses import dataclass

from lora_trainer.errors import ModelError
from lora_trainer.models.checkpoint import Shapes
from lora_trainer.models.noise import Prediction

SUPPORTED = "Stable Diffusion 1.x (.safetensors or .ckpt in the WebUI's single-file form)"

_CONTEXT = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"


@dataclass(frozen=True)
class Family:
    """`base_version` is what `ss_base_model_version` says; `scale_factor` turns VAE latents into UNet latents."""

    name: str
    base_version: str
    architecture: str
    resolution: int
    scale_factor: float
    prediction: Prediction
    num_heads: int
    linear_start: float = 0.00085
    linear_end: float = 0.012
    timesteps: int = 1000


SD1 = Family(
    name="Stable Diffusion 1.x",
    base_version="sd_v1",
    architecture="stable-diffusion-v1",
    resolution=512,
    scale_factor=0.18215,
    prediction="epsilon",
    num_heads=8,
)

# The first key that is there names what the file is instead.
_OTHERS = {
    "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight": "an SDXL checkpoint",
    "conditioner.embedders.0.model.text_projection": "an SDXL refiner checkpoint",
    "cond_stage_model.model.text_projection": "a Stable Diffusion 2.x checkpoint",
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": "a Stable Diffusion 3 checkpoint",
    "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": "a Flux checkpoint",
    "double_blocks.0.img_attn.qkv.weight": "a Flux model",
    "conv_in.weight": "a diffusers UNet without its pipeline",
}


def detect(shapes: Shapes, name: str) -> Family:
    """The family of a checkpoint by its tensors' names and shapes.

    Raises ModelError that says what the file is instead.
    """
    for key, kind in _OTHERS.items():
        if key in shapes:
            raise ModelError(f"{name}: this is {kind}; expected {SUPPORTED}")
    if any(".lora_down." in key or ".lora_A." in key for key in shapes):
        raise ModelError(f"{name}: this is a LoRA, not a checkpoint; base_model must name {SUPPORTED}")
    missing = [
        part
        for part, key in {
            "a UNet with text attention": _CONTEXT,
            "a VAE": "first_stage_model.decoder.conv_in.weight",
            "a CLIP text encoder": "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
        }.items()
        if not shapes.get(key)
    ]
    if missing:
        raise ModelError(f"{name}: not {SUPPORTED}: {' and '.join(missing)} not found in {len(shapes)} tensors")
    entrance = shapes.get(_CONV_IN, ())
    if len(entrance) != 4:
        raise ModelError(f"{name}: not {SUPPORTED}: the UNet's first convolution has the shape {list(entrance)}")
    channels = entrance[1]
    if channels != 4:
        raise ModelError(
            f"{name}: the UNet takes {channels} channels (an inpainting or editing checkpoint); expected 4"
        )
    return SD1
