"""What a checkpoint is, by the names and shapes of its tensors."""

from __future__ import annotations

from lora_trainer.errors import ModelError
from lora_trainer.models.checkpoint import Shapes
from lora_trainer.models.families import FAMILIES, SD2, SD3, SDXL, SSD, Family

SUPPORTED = (
    "Stable Diffusion 1.x, 2.x, 3 medium, SDXL, its refiner or SSD-1B (.safetensors or .ckpt in the WebUI's "
    "single-file form)"
)

_UNET = "model.diffusion_model."
_CONV_IN = _UNET + "input_blocks.0.0.weight"
_JOINT = "joint_blocks.0.x_block.attn.qkv.weight"
_VAE = "first_stage_model.decoder.conv_in.weight"
# The first key that is there names what the file is instead; networks alone come without the checkpoint's prefix.
_OTHERS = {
    "edm_mean": "a checkpoint of the EDM form (Playground v2.5)",
    "edm_vpred.sigma_max": "a checkpoint of the EDM form (CosXL)",
    "cond_stage_model.roberta.embeddings.word_embeddings.weight": "an AltDiffusion checkpoint",
    "embedder.model.token_embedding.weight": "an unCLIP checkpoint",
    "embedder.model.visual.conv1.weight": "an unCLIP checkpoint",
    "conv_in.weight": "a diffusers UNet without its pipeline",
}
# The same of networks of other kinds, which are transformers.
_TRANSFORMERS = {
    "joint_blocks.0.x_block.attn.ln_q.weight": "a Stable Diffusion 3.5 checkpoint",
    "distilled_guidance_layer.in_proj.weight": "a Chroma checkpoint",
    "double_stream_modulation_img.lin.weight": "a Flux.2 checkpoint",
    "double_blocks.0.img_attn.qkv.weight": "a Flux checkpoint",
    "double_layers.0.attn.w1q.weight": "an AuraFlow checkpoint",
    "txt_in.individual_token_refiner.blocks.0.norm1.weight": "a Hunyuan Video checkpoint",
    "mlp_t5.0.weight": "a Hunyuan-DiT checkpoint",
    "clip_txt_mapper.weight": "a Stable Cascade checkpoint",
    "t_block.1.weight": "a PixArt checkpoint",
    "cap_embedder.1.weight": "a Lumina or Z-Image checkpoint",
    "caption_projection.0.linear.weight": "a HiDream checkpoint",
    "txt_norm.weight": "a Qwen-Image checkpoint",
    "head.modulation": "a Wan checkpoint",
}
_NF4 = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4", ".weight.absmax")
# What tensors of adapters are called.
_ADAPTERS = (".lora_down.", ".lora_A.", ".hada_w1_a", ".lokr_w1", ".oft_blocks", ".on_input")
# The number of channels a UNet takes: the noisy latents alone, or with mask and latents of what it leaves (inpainting).
_TRAINED = (4, 9)
_SHOWN_MORE = {8: "an editing checkpoint", 5: "a depth checkpoint", 7: "an upscaler"}
# The middle's first resnet, which all have but KOALA-700M, and its attention.
_MIDDLE = _UNET + "middle_block.0.in_layers.2.weight"
_MIDDLE_ATTENTION = _UNET + "middle_block.1.transformer_blocks.0.attn1.to_q.weight"


def detect(shapes: Shapes, name: str) -> Family:
    """The family of a checkpoint by its tensors' names and shapes.

    Raises ModelError that says what the file is instead.
    """
    other = _other(shapes)
    if other is not None:
        raise ModelError(f"{name}: this is {other}; expected {SUPPORTED}")
    if any(part in key for key in shapes for part in _ADAPTERS):
        raise ModelError(f"{name}: this is a LoRA, not a checkpoint; base_model must name {SUPPORTED}")
    if any(_JOINT in key for key in shapes):
        return _sd3(shapes, name)
    family = _by_text(shapes)
    missing = [
        part
        for part, there in {
            "a UNet with text attention": any(_is_context(key) and shape for key, shape in shapes.items()),
            "a VAE": bool(shapes.get(_VAE)),
            "a CLIP text encoder": family is not None,
        }.items()
        if not there
    ]
    if missing:
        raise ModelError(f"{name}: not {SUPPORTED}: {' and '.join(missing)} not found in {len(shapes)} tensors")
    entrance = shapes.get(_CONV_IN, ())
    if len(entrance) != 4:
        raise ModelError(f"{name}: not {SUPPORTED}: the UNet's first convolution has the shape {list(entrance)}")
    channels = entrance[1]
    if channels not in _TRAINED:
        what = _SHOWN_MORE.get(channels, "of a kind that is not known here")
        raise ModelError(f"{name}: the UNet takes {channels} channels ({what}); expected 4, or 9 for inpainting")
    if family is SDXL and not shapes.get(_MIDDLE):
        raise ModelError(f"{name}: this is an SDXL without its middle (KOALA-700M); expected {SUPPORTED}")
    if family is SDXL and not shapes.get(_MIDDLE_ATTENTION):
        return SSD
    if family is SD2 and shapes.get(_UNET + "label_emb.0.0.weight"):
        raise ModelError(f"{name}: this is an unCLIP checkpoint; expected {SUPPORTED}")
    return family


def _sd3(shapes: Shapes, name: str) -> Family:
    """Raises ModelError for one that is not whole."""
    wanted = {
        f"{_UNET}*": _UNET + _JOINT,
        "a VAE": _VAE,
        **{f"a text encoder {part.prefix}*": part.embedding for part in SD3.text},
    }
    missing = [part for part, key in wanted.items() if not shapes.get(key)]
    if missing:
        raise ModelError(
            f"{name}: a Stable Diffusion 3 checkpoint without {' and '.join(missing)}; expected one file with all, "
            "such as sd3_medium_incl_clips.safetensors"
        )
    return SD3


def _other(shapes: Shapes) -> str | None:
    """What else this is, of the kinds that one tensor's name gives away."""
    if any(key.endswith(_NF4) for key in shapes):
        return "a checkpoint quantised to 4 bits (nf4)"
    if "scaled_fp8" in shapes or any(key.endswith(".scale_weight") for key in shapes):
        return "a checkpoint in scaled fp8"
    for key, kind in _OTHERS.items():
        if key in shapes:
            return kind
    for key, kind in _TRANSFORMERS.items():
        if key in shapes or _UNET + key in shapes:
            return kind
    return None


def _by_text(shapes: Shapes) -> Family | None:
    """The family whose text encoders are all there."""
    return next((family for family in FAMILIES if all(shapes.get(part.embedding) for part in family.text)), None)


def _is_context(key: str) -> bool:
    return key.startswith(_UNET + "input_blocks.") and key.endswith(".1.transformer_blocks.0.attn2.to_k.weight")
