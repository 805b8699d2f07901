"""Tiny random checkpoints of other families, with the WebUI's own YAMLs beside them, of which only the sizes differ."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.ldm import Shapes, clip_state, open_clip_state, unet_state
from tests.ldm import vae_state
from tests.tiny import VAE

REPOSITORIES = Path(os.environ.get("WEBUI_DIR", "")) / "repositories"
XL = REPOSITORIES / "generative-models" / "configs" / "inference" / "sd_xl_base.yaml"
REFINER = XL.with_name("sd_xl_refiner.yaml")
V2 = REPOSITORIES / "stable-diffusion-stability-ai" / "configs" / "stable-diffusion"
# The smallest text encoder that OpenCLIP knows, and the demo's.
ARCH, WIDE, LAYERS = "ViT-S-32-alt", 256, 10
CLIP = {
    "vocab_size": 49408,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "max_position_embeddings": 77,
}
UNET = {"layers_per_block": 2, "use_linear_projection": True}
UNET_XL = UNET | {
    "block_out_channels": (32, 64, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 4),
    "cross_attention_dim": CLIP["hidden_size"] + WIDE,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": WIDE + 6 * 256,
}
# SSD-1B's depths, since the WebUI cuts just its blocks out of SDXL.
UNET_SSD = UNET_XL | {
    "transformer_layers_per_block": (1, 2, 4),
    "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
    "mid_block_type": "UNetMidBlock2D",
}
UNET_VEGA = {name: value for name, value in UNET_SSD.items() if not name.startswith("reverse")} | {
    "transformer_layers_per_block": (1, 1, 2)
}
UNET_REFINER = UNET_XL | {
    "block_out_channels": (32, 64, 128, 128),
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
    "transformer_layers_per_block": (1, 4, 4, 4),
    "attention_head_dim": (1, 2, 4, 4),
    "cross_attention_dim": WIDE,
    "projection_class_embeddings_input_dim": WIDE + 5 * 256,
}
UNET_2 = UNET | {
    "block_out_channels": (32, 64, 128, 128),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "attention_head_dim": (1, 2, 4, 4),
    "cross_attention_dim": WIDE,
}
SIZES = {"model_channels": 32, "num_head_channels": 32, "use_checkpoint": False}


def write_xl(
    folder: Path,
    name: str,
    clip: Path,
    *,
    v: bool = False,
    keys: tuple[str, ...] = (),
    unet: Mapping[str, Any] = UNET_XL,
) -> None:
    """`folder`/NAME.safetensors of SDXL's form, its first text encoder's config in `clip`; with `v` its YAML says that
    it predicts v, and `keys` are empty tensors in the file. `unet` may be one of what was cut out of SDXL,
    which the WebUI cuts out of its own."""
    config = yaml.safe_load(XL.read_text())
    params = config["model"]["params"]
    depth = [1, 2, 10] if "mid_block_type" in unet else [1, 1, 2]
    sizes = {"adm_in_channels": UNET_XL["projection_class_embeddings_input_dim"], "transformer_depth": depth}
    params["network_config"]["params"] |= SIZES | sizes | {"context_dim": UNET_XL["cross_attention_dim"]}
    first, second, *_ = params["conditioner_config"]["params"]["emb_models"]
    first["params"] = {"version": str(clip), "layer": "hidden", "layer_idx": CLIP["num_hidden_layers"] - 1}
    second["params"]["arch"] = ARCH
    if v:
        for part, kind in (("scaling_config", "denoiser_scaling.V"), ("weighting_config", "denoiser_weighting.V")):
            target = params["denoiser_config"]["params"][part]
            target["target"] = target["target"].replace(kind[:-1] + "Eps", kind)
    _write(folder / name, config, shapes_xl(unet), dict.fromkeys(keys, torch.tensor([])))


def write_refiner(folder: Path, name: str) -> None:
    """`folder`/NAME.safetensors of the form of SDXL's refiner."""
    config = yaml.safe_load(REFINER.read_text())
    params = config["model"]["params"]
    sizes = {"adm_in_channels": UNET_REFINER["projection_class_embeddings_input_dim"], "context_dim": [WIDE] * 4}
    params["network_config"]["params"] |= SIZES | sizes
    first, *_ = params["conditioner_config"]["params"]["emb_models"]
    first["params"]["arch"] = ARCH
    _write(folder / name, config, shapes_refiner(), {})


def write_2(folder: Path, name: str, *, v: bool = False) -> None:
    """`folder`/NAME.safetensors of the form of Stable Diffusion 2.x, which predicts noise, or `v`."""
    config = yaml.safe_load((V2 / ("v2-inference-v.yaml" if v else "v2-inference.yaml")).read_text())
    params = config["model"]["params"]
    params["unet_config"]["params"] |= SIZES | {"context_dim": WIDE}
    params["cond_stage_config"]["params"]["arch"] = ARCH
    _write(folder / name, config, shapes_2(), {})


def write_inpainting(folder: Path, name: str, clip: Path) -> None:
    """`folder`/NAME.safetensors of the form of Stable Diffusion 1.5's for inpainting; `clip` as in `write_xl`."""
    write_1(folder, name, clip, inpainting=True)


def write_1(folder: Path, name: str, clip: Path, *, inpainting: bool = False) -> None:
    """`folder`/NAME.safetensors of Stable Diffusion 1.5's form; `clip` as in `write_xl`."""
    file = "v1-inpainting-inference.yaml" if inpainting else "v1-inference.yaml"
    config = yaml.safe_load((REPOSITORIES.parent / "configs" / file).read_text())
    params = config["model"]["params"]
    params["unet_config"]["params"] |= {"model_channels": 32, "num_heads": 4, "context_dim": CLIP["hidden_size"]}
    params["cond_stage_config"]["params"] = {"version": str(clip)}
    _write(folder / name, config, shapes_1(9 if inpainting else 4), {})


def shapes_1(channels: int = 4) -> Shapes:
    """Of all but the VAE."""
    sizes = {"in_channels": channels, "cross_attention_dim": CLIP["hidden_size"], "use_linear_projection": False}
    return unet_state(UNET_2 | sizes) | clip_state("cond_stage_model.transformer.", CLIP)


def shapes_2() -> Shapes:
    return unet_state(UNET_2) | open_clip_state("cond_stage_model.model.", width=WIDE, layers=LAYERS)


def shapes_xl(unet: Mapping[str, Any] = UNET_XL) -> Shapes:
    shapes = unet_state(unet) | clip_state("conditioner.embedders.0.transformer.", CLIP)
    return shapes | open_clip_state("conditioner.embedders.1.model.", width=WIDE, layers=LAYERS)


def shapes_refiner() -> Shapes:
    return unet_state(UNET_REFINER) | open_clip_state("conditioner.embedders.0.model.", width=WIDE, layers=LAYERS)


def tensors(shapes: Shapes) -> dict[str, Tensor]:
    """A checkpoint's, the same numbers at every call."""
    generator = torch.Generator().manual_seed(0)

    def fill(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        fan = max(1, torch.Size(shape[1:]).numel()) if len(shape) > 1 else 100
        return (torch.randn(shape, generator=generator) / fan**0.5).to(dtype)

    return vae_state(VAE, torch.float32, fill) | {name: fill(shape) for name, shape in shapes.items()}


def _write(target: Path, config: dict[str, Any], shapes: Shapes, extra: dict[str, Tensor]) -> None:
    first_stage = config["model"]["params"]["first_stage_config"]["params"]["ddconfig"]
    first_stage |= {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    save_file(tensors(shapes) | extra, target.with_suffix(".safetensors"))
    target.with_suffix(".yaml").write_text(yaml.safe_dump(config))
