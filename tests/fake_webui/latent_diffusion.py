"""The loaded model as the WebUI has it: LDM's module tree, without the mathematics of the UNet and the VAE."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tests.fake_webui.open_clip import FrozenOpenCLIPEmbedder, FrozenOpenCLIPEmbedder2

HEADS = 8
TOKENIZER = Path(__file__).parents[2] / "lora_trainer" / "models" / "clip"
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
SECOND, CONDITIONER = "cond_stage_model.model.", "conditioner.embedders."


def model_of(state: dict[str, Tensor]) -> nn.Module:
    """Empty, of the family and form of `state`: `load_state_dict` fills it."""
    return DiffusionEngine(state) if any(name.startswith(CONDITIONER) for name in state) else LatentDiffusion(state)


class Diffusion(nn.Module):
    parameterization, scale_factor, cond_stage_key = "eps", 0.18215, "txt"

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.model = DiffusionWrapper(tree(part(state, UNET), UNetModel()))
        self.first_stage_model = tree(part(state, VAE), nn.Module()).requires_grad_(False)
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.register_buffer("alphas_cumprod", torch.cumprod(1 - betas, dim=0).float())


class LatentDiffusion(Diffusion):
    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__(state)
        second = part(state, SECOND)
        text = FrozenOpenCLIPEmbedder(second) if second else FrozenCLIPEmbedder(part(state, TEXT))
        self.cond_stage_model = text.requires_grad_(False)


class DiffusionEngine(Diffusion):
    """SDXL's, and its refiner's with the second text encoder alone."""

    scale_factor = 0.13025

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__(state)
        alone = part(state, f"{CONDITIONER}0.model.")
        texts = [FrozenOpenCLIPEmbedder2(alone)] if alone else self.two(state)
        self.conditioner = GeneralConditioner([*texts, Sizes()]).requires_grad_(False)

    @staticmethod
    def two(state: dict[str, Tensor]) -> list[nn.Module]:
        first = FrozenCLIPEmbedder(part(state, f"{CONDITIONER}0.transformer."))
        first.layer, first.layer_idx = "hidden", first.transformer.config.num_hidden_layers - 1
        return [first, FrozenOpenCLIPEmbedder2(part(state, f"{CONDITIONER}1.model."))]


class GeneralConditioner(nn.Module):
    def __init__(self, embedders: list[nn.Module]) -> None:
        super().__init__()
        self.embedders = nn.ModuleList(embedders)

    def forward(self, prompts: list[str]) -> Tensor:
        said = [embedder(prompts) for embedder in self.embedders if hasattr(embedder, "wrapped")]
        return torch.cat([one[0] if isinstance(one, tuple) else one for one in said], dim=2)


class Sizes(nn.Module):
    return_pooled = False


class DiffusionWrapper(nn.Module):
    def __init__(self, diffusion_model: nn.Module) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.diffusion_model(x, context=context)


class UNetModel(nn.Module):
    """Its forward calls that of each layer, since that is where the Lora extension merges; then all weights count."""

    def forward(self, x: Tensor, timesteps: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.LayerNorm):
                layer(torch.zeros(1, layer.weight.shape[-1]))
            elif isinstance(layer, nn.Conv2d):
                layer(torch.zeros(1, layer.in_channels, 3, 3))
            elif isinstance(layer, nn.GroupNorm):
                layer(torch.zeros(1, layer.num_channels, 2, 2))
        weights = sum((p.double() * torch.linspace(1, 2, p.numel()).view_as(p)).sum() for p in self.parameters())
        return x * (1 + torch.sin(weights)) / 2 + torch.sin(context.double().sum())


class Block(nn.Module):
    pass


class CrossAttention(Block):
    heads = HEADS


class FrozenCLIPEmbedder(nn.Module):
    layer = "last"

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        vocabulary, width = state["text_model.embeddings.token_embedding.weight"].shape
        config = CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=sum(name.endswith("mlp.fc1.weight") for name in state),
            num_attention_heads=1,
        )
        self.tokenizer = CLIPTokenizer.from_pretrained(str(TOKENIZER))
        text = CLIPTextModel(config)
        self.transformer = text if hasattr(text, "text_model") else WithLevel(text)


class WithLevel(nn.Module):
    """transformers 5 dropped the `text_model` level, which the WebUI's transformers 4.30 has."""

    def __init__(self, text_model: nn.Module) -> None:
        super().__init__()
        self.text_model = text_model
        self.config = text_model.config

    def forward(self, **inputs: object) -> object:
        return self.text_model(**inputs)


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def tree(state: dict[str, Tensor], root: nn.Module) -> nn.Module:
    """`root` with an empty layer for each of `state`, under its name."""
    for name, weight in state.items():
        path, _, kind = name.rpartition(".")
        if kind != "weight":
            continue
        *blocks, last = path.split(".")
        place = root
        for block in blocks:
            if block not in place._modules:
                place.add_module(block, CrossAttention() if block.startswith("attn") else Block())
            place = place._modules[block]
        place.add_module(last, layer(name, weight, f"{path}.bias" in state))
    return root


def layer(name: str, weight: Tensor, bias: bool) -> nn.Module:
    if weight.dim() == 4:
        out, into, kernel, _ = weight.shape
        return nn.Conv2d(into, out, kernel, padding=kernel // 2, bias=bias)
    if weight.dim() == 2:
        return nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    return nn.LayerNorm(len(weight)) if ".transformer_blocks." in name else nn.GroupNorm(32, len(weight))
