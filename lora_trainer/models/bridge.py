"""The zero-copy bridge: diffusers and transformers modules over tensors that somebody else owns.

A module is built on the meta device, its parameters are assigned from the placed state dict under renamed keys,
and nothing is copied: each parameter has the address of the tensor it views. The config comes from the shapes,
so that any topology of the family works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_trainer.errors import ModelError
from lora_trainer.models import open_clip, unet_names, vae_names
from lora_trainer.models.mmdit import MMDiT, Sizes

TEXT_PREFIX = "cond_stage_model.transformer."
PROJECTION = "text_projection.weight"

State = Mapping[str, Tensor]


def unet_view(state: State, *, num_heads: int | None = None, head_channels: int | None = None) -> UNet2DConditionModel:
    """The UNet of an LDM state dict as a frozen diffusers model that shares every tensor.

    Each attention has `num_heads`, or where that is not given as many as have `head_channels` each.
    """
    part = _part(state, unet_names.LDM_PREFIX)
    config = unet_config(part, num_heads=num_heads, head_channels=head_channels)
    layers = config["layers_per_block"]
    with torch.device("meta"), _Blank():
        unet = UNet2DConditionModel(**config)
    return _assign(unet, part, lambda name: unet_names.to_diffusers(name, layers))


def mmdit_view(state: State) -> MMDiT:
    """The network of a Stable Diffusion 3 checkpoint, frozen, sharing every tensor."""
    part = _part(state, unet_names.LDM_PREFIX)
    with torch.device("meta"), _Blank():
        network = MMDiT(mmdit_sizes(part))
    return _assign(network, part, str)


def vae_view(state: State, *, scale_factor: float, shift_factor: float = 0.0) -> AutoencoderKL:
    """The VAE of an LDM state dict as a frozen diffusers model that shares every tensor."""
    part = {
        name: tensor
        for name, tensor in _part(state, vae_names.LDM_PREFIX).items()
        if name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))
    }
    config = vae_config(part, scale_factor=scale_factor)
    if shift_factor:
        config["shift_factor"] = shift_factor
    levels = len(config["block_out_channels"])
    with torch.device("meta"), _Blank():
        vae = AutoencoderKL(**config)
    return _assign(vae, part, lambda name: vae_names.to_diffusers(name, levels))


def text_view(
    state: State,
    *,
    prefix: str = TEXT_PREFIX,
    config_folder: Path | None = None,
    config: CLIPTextConfig | None = None,
    activation: str = "quick_gelu",
    projection: bool = False,
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A CLIP text encoder of `state` as a frozen transformers model that shares every parameter; with its `projection`
    or without.

    The number of heads is that of `config`, or read from `config_folder`, else it follows from CLIP's 64 channels a
    head; likewise the `activation`.
    """
    left_out = "position_ids" if projection else ("position_ids", PROJECTION)
    part = {name: tensor for name, tensor in _part(state, prefix).items() if not name.endswith(left_out)}
    config = config or text_config(part, config_folder, activation)
    with torch.device("meta"), _Blank():
        text = CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)
    return _assigned_text(text, part)


def open_clip_view(state: State, *, prefix: str, projection: bool) -> CLIPTextModel | CLIPTextModelWithProjection:
    """An OpenCLIP text encoder of `state` as a frozen transformers model that shares every parameter; with its
    `projection`, which gives the pooled embedding, or without."""
    part = open_clip.to_transformers(_part(state, prefix), projection=projection)
    sizes = text_config(part, None)
    ends = sizes.vocab_size - 1
    # Both differ between versions of transformers where they are left to it.
    settings = {"hidden_act": "gelu", "eos_token_id": ends, "bos_token_id": ends - 1, "pad_token_id": 0}
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    with torch.device("meta"), _Blank():
        text = kind(CLIPTextConfig.from_dict({**sizes.to_dict(), **settings}))
    return _assigned_text(text, part)


def _assigned_text(text: nn.Module, part: State) -> nn.Module:
    # transformers 5 dropped the `text_model` level that files (and older versions) have.
    has_level = any(name.startswith("text_model.") for name, _ in text.named_parameters())
    _assign(text, part, lambda name: name if has_level else name.removeprefix("text_model."))
    for module in text.modules():
        if "position_ids" in dict(module.named_buffers(recurse=False)):
            positions = module.position_embedding.weight
            module.position_ids = torch.arange(positions.shape[0], device=positions.device).unsqueeze(0)
    return text


def unet_config(part: State, *, num_heads: int | None = None, head_channels: int | None = None) -> dict:
    """UNet2DConditionModel's arguments, from the shapes of an LDM UNet."""
    numbers = sorted({int(name.split(".")[1]) for name in part if name.startswith("input_blocks.")})
    downs = [n for n in numbers if f"input_blocks.{n}.0.op.weight" in part]
    layers = downs[0] - 1 if downs else numbers[-1]
    firsts = [1] + [n + 1 for n in downs]
    channels = [part[f"input_blocks.{n}.0.in_layers.2.weight"].shape[0] for n in firsts]
    depths = [_depths(part, "input_blocks", n, layers) for n in firsts]
    # The up side has one more a level, and begins with the last.
    ups = [_depths(part, "output_blocks", level * (layers + 1), layers + 1) for level in range(len(firsts))]
    mirrored = [depth for depth in depths if depth] == [depth for depth in reversed(ups) if depth]
    attends = [depth != 0 for depth in depths]
    first = f"input_blocks.{firsts[attends.index(True)]}.1"
    # diffusers takes the middle block's depth from the last level.
    middle = _depth(part, "middle_block.1")
    depths[-1] = depths[-1] or middle
    config = {
        "in_channels": part["input_blocks.0.0.weight"].shape[1],
        "out_channels": part["out.2.weight"].shape[0],
        "block_out_channels": tuple(channels),
        "layers_per_block": layers,
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        "cross_attention_dim": part[f"{first}.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        # diffusers means the number of heads by this name.
        "attention_head_dim": num_heads or tuple(max(1, c // head_channels) for c in channels),
        "use_linear_projection": part[f"{first}.proj_in.weight"].dim() == 2,
        "transformer_layers_per_block": tuple(depth or 1 for depth in depths),
    }
    if not mirrored:
        config["reverse_transformer_layers_per_block"] = tuple(depth or 1 for depth in ups)
    if not middle:
        config["mid_block_type"] = "UNetMidBlock2D"
    if "label_emb.0.0.weight" in part:
        # SDXL's: the pooled embedding and the sizes, each as 256 numbers.
        config["addition_embed_type"] = "text_time"
        config["addition_time_embed_dim"] = 256
        config["projection_class_embeddings_input_dim"] = part["label_emb.0.0.weight"].shape[1]
    return config


def _depths(part: State, side: str, first: int, count: int) -> int | tuple[int, ...]:
    """How many transformer blocks are in each of `count` blocks of `side`; one number where they are alike."""
    found = tuple(_depth(part, f"{side}.{number}.1") for number in range(first, first + count))
    return found[0] if len(set(found)) == 1 else found


def _depth(part: State, block: str) -> int:
    """How many transformer blocks are in `block`."""
    start = f"{block}.transformer_blocks."
    return len({name[len(start) :].split(".")[0] for name in part if name.startswith(start)})


def mmdit_sizes(part: State) -> Sizes:
    """From the shapes of an MMDiT's tensors."""
    width, channels, patch, _ = part["x_embedder.proj.weight"].shape
    return Sizes(
        width=width,
        depth=len({name.split(".")[1] for name in part if name.startswith("joint_blocks.")}),
        channels=channels,
        patch=patch,
        places=part["pos_embed"].shape[1],
        context=part["context_embedder.weight"].shape[1],
        pooled=part["y_embedder.mlp.0.weight"].shape[1],
    )


def vae_config(part: State, *, scale_factor: float) -> dict:
    """AutoencoderKL's arguments, from the shapes of an LDM VAE."""
    levels = 1 + max(int(name.split(".")[2]) for name in part if name.startswith("encoder.down."))
    blocks = [name for name in part if name.startswith("encoder.down.0.block.")]
    channels = tuple(part[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels))
    quantised = "post_quant_conv.weight" in part
    config = {
        "block_out_channels": channels,
        "layers_per_block": 1 + max(int(name.split(".")[4]) for name in blocks),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "latent_channels": part["post_quant_conv.weight" if quantised else "decoder.conv_in.weight"].shape[1],
        "scaling_factor": scale_factor,
    }
    # Newer VAEs have none, such as SD3's.
    return config if quantised else config | {"use_quant_conv": False, "use_post_quant_conv": False}


def text_config(part: State, folder: Path | None, activation: str = "quick_gelu") -> CLIPTextConfig:
    """The text encoder's config: of `folder` where there is one, with the sizes of the tensors."""
    vocabulary, width = part["text_model.embeddings.token_embedding.weight"].shape
    layers = [name for name in part if name.endswith(".mlp.fc1.weight")]
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": part[layers[0]].shape[0],
        "num_hidden_layers": len(layers),
        "max_position_embeddings": part["text_model.embeddings.position_embedding.weight"].shape[0],
    }
    if PROJECTION in part:
        sizes["projection_dim"] = part[PROJECTION].shape[0]
    if folder is None:
        return CLIPTextConfig(**sizes, num_attention_heads=max(1, width // 64), hidden_act=activation)
    return CLIPTextConfig.from_pretrained(folder, local_files_only=True, **sizes)


class _Blank(TorchFunctionMode):
    """Inside, new weights are not initialised, since others take their place. On the meta device that would do nothing,
    slowly, and under torch 2.1 each call would keep its numbers for ever."""

    FILLING = ("uniform_", "normal_", "fill_", "zero_")

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if getattr(func, "__module__", "") == "torch.nn.init" or getattr(func, "__name__", "") in self.FILLING:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _part(state: State, prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}


def _assign(module: nn.Module, part: State, rename: Callable[[str], str]) -> nn.Module:
    """Give `module`'s parameters the storage of `part`; a 1×1 convolution may stand for a linear layer."""
    shapes = {name: parameter.shape for name, parameter in module.state_dict().items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in part.items():
        try:
            target = rename(name)
            renamed[target] = tensor.detach().view(shapes[target])
        except (KeyError, RuntimeError):
            raise ModelError(
                f"{type(module).__name__}: the tensor {name} {list(tensor.shape)} has no place in this family"
            ) from None
    missing = [name for name in shapes if name not in renamed and not name.endswith("position_ids")]
    if missing:
        raise ModelError(
            f"{type(module).__name__}: the checkpoint lacks {len(missing)} of {len(shapes)} tensors, "
            f"for example the one diffusers calls {missing[0]}"
        )
    module.load_state_dict(renamed, assign=True, strict=False)
    return module.requires_grad_(False).eval()
