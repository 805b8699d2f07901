"""The pretrained parts as one fp16 checkpoint with Stable Diffusion 1's key names, and the folder it needs.

usage: python export.py PARTS_FOLDER VAE.pt DEMO_FOLDER

PARTS_FOLDER holds pretrain.py's unet-average-*.pt and text-average-0.pt. The names come from the trainer's own
maps, read backwards; diffusers' converters are the oracle that they are right.
"""

from __future__ import annotations

import json
import shutil
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from networks import LAYERS, TOKENS, full_text_state, make_unet, make_vae, text_config
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from lora_trainer.models import unet_names, vae_names

MAX_BYTES, MAX_PACKED_BYTES = 32_000_000, 24_000_000
METADATA = {
    "modelspec.sai_model_spec": "1.0.1",
    "modelspec.architecture": "stable-diffusion-v1",
    "modelspec.implementation": "sgm",
    "modelspec.title": "Emoji World",
    "modelspec.resolution": "128x128",
    "modelspec.description": "A tiny Stable Diffusion 1 that draws icons: '<style> emoji of <words>', "
    "where the style is noto, fluent, emojione, outline, flat, android or firefox. "
    "Its sizes are in the YAML beside it.",
    "modelspec.license": "Apache-2.0; trained on Noto Emoji and FxEmoji (Apache-2.0), Fluent Emoji (MIT), "
    "EmojiOne 2 and Streamline Emojis (CC-BY 4.0)",
}
_UNET_LAYERS, _VAE_LEVELS = 2, 4


def ldm_unet_names() -> Iterable[str]:
    """Every LDM name that the SD1 UNet may have (without prefix), with 2 resnets a level."""
    resnet = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
    heads = (*(f"attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")),)
    inner = (*heads, "ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3")
    attention = ("norm", "proj_in", "proj_out", *(f"transformer_blocks.0.{name}" for name in inner))
    blocks = [f"{side}_blocks.{n}" for side in ("input", "output") for n in range(12)]
    stems = ["time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2"]
    stems += [f"middle_block.{n}.{name}" for n in (0, 2) for name in resnet]
    stems += [f"middle_block.1.{name}" for name in attention]
    for block in blocks:
        stems += [f"{block}.0.{name}" for name in (*resnet, "op")]
        stems += [f"{block}.1.{name}" for name in (*attention, "conv")] + [f"{block}.2.conv"]
    return (f"{stem}.{kind}" for stem in stems for kind in ("weight", "bias"))


def ldm_vae_names() -> Iterable[str]:
    """Every LDM name that a VAE of 4 levels and up to 3 blocks a level may have (without prefix)."""
    resnet = ("norm1", "conv1", "norm2", "conv2", "nin_shortcut")
    stems = ["quant_conv", "post_quant_conv"]
    for side, way in (("encoder", "down"), ("decoder", "up")):
        stems += [f"{side}.{name}" for name in ("conv_in", "norm_out", "conv_out")]
        stems += [f"{side}.mid.block_{n}.{name}" for n in (1, 2) for name in resnet]
        stems += [f"{side}.mid.attn_1.{name}" for name in ("norm", "q", "k", "v", "proj_out")]
        for level in range(_VAE_LEVELS):
            stems += [f"{side}.{way}.{level}.block.{n}.{name}" for n in range(3) for name in resnet]
            stems.append(f"{side}.{way}.{level}.{way}sample.conv")
    return (f"{stem}.{kind}" for stem in stems for kind in ("weight", "bias"))


def _conv(name: str, tensor: Tensor) -> Tensor:
    """LDM's 1×1 convolutions where diffusers has linear layers."""
    projection = ".attn_1." in name and tensor.dim() == 2
    return tensor[:, :, None, None] if projection else tensor


def to_ldm(unet: dict[str, Tensor], vae: dict[str, Tensor], text: dict[str, Tensor]) -> dict[str, Tensor]:
    """One state dict in WebUI form; every tensor must find its name."""
    maps = (
        (
            unet_names.LDM_PREFIX,
            unet,
            {unet_names.to_diffusers(n, _UNET_LAYERS): n for n in _valid(ldm_unet_names())},
        ),
        (vae_names.LDM_PREFIX, vae, {vae_names.to_diffusers(n, _VAE_LEVELS): n for n in ldm_vae_names()}),
    )
    state = {
        prefix + names[key]: _conv(names[key], tensor) for prefix, part, names in maps for key, tensor in part.items()
    }
    state |= {f"cond_stage_model.transformer.{key}": tensor for key, tensor in text.items()}
    positions = torch.arange(TOKENS).unsqueeze(0)
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = positions
    return {key: tensor.contiguous() for key, tensor in sorted(state.items())}


def _valid(names: Iterable[str]) -> Iterable[str]:
    """Without the names that say one thing twice: `.1.conv` is the upsampler of a level without attention."""
    attending = {f"output_blocks.{n}.1.conv" for n in range(3, 12)} | {f"output_blocks.{n}.2.conv" for n in range(3)}
    return (name for name in names if name.rpartition(".")[0] not in attending)


def check(state: dict[str, Tensor], unet: dict[str, Tensor], vae: dict[str, Tensor]) -> None:
    """diffusers' own converters give back what went in."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    back = convert_ldm_unet_checkpoint(dict(state), dict(make_unet().config))
    assert back.keys() == unet.keys(), sorted(back.keys() ^ unet.keys())[:4]
    assert all(torch.equal(back[key].reshape(unet[key].shape), unet[key]) for key in unet)
    back = convert_ldm_vae_checkpoint(dict(state), dict(make_vae().config))
    assert back.keys() == vae.keys(), sorted(back.keys() ^ vae.keys())[:4]
    assert all(torch.equal(back[key].reshape(vae[key].shape), vae[key]) for key in vae)


def write_clip(folder: Path) -> None:
    """The text encoder's config and the tokenizer, as transformers reads them from a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(text_config(), indent=2) + "\n", encoding="utf-8")
    for file in (Path(__file__).parents[2] / "lora_trainer" / "models" / "clip").iterdir():
        shutil.copyfile(file, folder / file.name)


def main(parts: Path, vae_file: Path, demo: Path) -> None:
    unet: dict[str, Tensor] = {}
    for path in sorted(parts.glob("unet-average-*.pt")):
        unet |= torch.load(path, weights_only=True)
    text = torch.load(parts / "text-average-0.pt", weights_only=True)
    seen = text.pop("seen")
    vae = {name: tensor.half() for name, tensor in torch.load(vae_file, weights_only=True).items()}
    assert sum(f".{n}." in name for name in text for n in range(LAYERS)) == 16 * LAYERS
    state = to_ldm(unet, vae, full_text_state(text, seen))
    check(state, unet, vae)
    out = demo / "emoji-world.safetensors"
    save_file(state, out, METADATA)
    write_clip(demo / "clip")
    size, packed = out.stat().st_size, len(zlib.compress(out.read_bytes()))
    print(f"{out}: {len(unet)} UNet, {len(vae)} VAE, {len(state)} tensors; {size:,} bytes, packed {packed:,}")
    assert size <= MAX_BYTES
    assert packed <= MAX_PACKED_BYTES


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
