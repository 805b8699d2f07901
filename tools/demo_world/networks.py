"""The demo world's networks: Stable Diffusion 1's topology, about a hundredth of its size.

The first level is 64 wide, not 32: Stable Diffusion normalizes in 32 groups, so with 32 channels every group would
be one channel and each norm would erase its mean, which is where a flat icon keeps its colors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional

WIDTH, LAYERS, HEADS, TOKENS, VOCABULARY = 64, 3, 4, 77, 49408
SCALE = 0.18215
LATENT = (4, 16, 16)


def make_unet() -> UNet2DConditionModel:
    """9.7 M parameters, 684 tensors."""
    return UNet2DConditionModel(
        sample_size=LATENT[1],
        block_out_channels=(64, 64, 128, 128),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=WIDTH,
        attention_head_dim=HEADS,  # diffusers means the number of heads
    )


def make_vae() -> AutoencoderKL:
    """1.5 M parameters, 176 tensors."""
    return AutoencoderKL(
        block_out_channels=(64, 64, 64, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=LATENT[0],
        scaling_factor=SCALE,
    )


def text_config() -> dict:
    """transformers' CLIPTextConfig of the text encoder."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": TOKENS,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": WIDTH,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 49407,
    }


def quick_gelu(h: Tensor) -> Tensor:
    """OpenAI's CLIP's."""
    return h * torch.sigmoid(1.702 * h)


class Layer(nn.Module):
    """One layer of CLIP's text encoder, under transformers' names."""

    def __init__(self, heads: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.heads, self.activation = heads, activation
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in names})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(WIDTH, 4 * WIDTH), "fc2": nn.Linear(4 * WIDTH, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer_norm1(x)
        projected = (self.self_attn[name](h) for name in ("q_proj", "k_proj", "v_proj"))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in projected)
        h = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.self_attn["out_proj"](h.transpose(1, 2).flatten(2))
        h = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](self.activation(h))


class Text(nn.Module):
    """CLIP's text encoder without transformers' control flow, so that a CUDA graph can hold it.

    Only the rows of `seen` tokens exist here; all others are zero, in training as afterwards: an unknown word
    has no meaning of its own.
    """

    def __init__(
        self, seen: Tensor, *, heads: int = HEADS, activation: Callable[[Tensor], Tensor] = quick_gelu
    ) -> None:
        super().__init__()
        self.seen = seen
        tokens, positions = nn.Embedding(len(seen), WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.embeddings = nn.ModuleDict({"token_embedding": tokens, "position_embedding": positions})
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(Layer(heads, activation) for _ in range(LAYERS))})
        self.final_layer_norm = nn.LayerNorm(WIDTH)
        nn.init.normal_(tokens.weight, std=0.3)
        nn.init.normal_(positions.weight, std=0.1)

    def forward(self, rows: Tensor, known: Tensor) -> Tensor:
        """`rows` [B, 77] index the seen tokens; `known` [B, 77] is 0 where the token is not one of them."""
        return self.final_layer_norm(self.layers(rows, known)[-1])

    def layers(self, rows: Tensor, known: Tensor) -> list[Tensor]:
        """What each layer says, [B, 77, WIDTH]."""
        x = self.embeddings["token_embedding"](rows) * known.unsqueeze(-1)
        x = x + self.embeddings["position_embedding"].weight
        said = []
        for layer in self.encoder["layers"]:
            x = layer(x)
            said.append(x)
        return said


def make_text(seen: Tensor) -> Text:
    """The text side: one encoder."""
    return Text(seen)


def told(said: Tensor) -> dict[str, Tensor]:
    """What the UNet is given of what the text side says."""
    return {"encoder_hidden_states": said}


def full_text_state(values: dict[str, Tensor], seen: Tensor) -> dict[str, Tensor]:
    """Text's state dict as that of transformers 4's CLIPTextModel, with the whole vocabulary."""
    state = {f"text_model.{name}": tensor for name, tensor in values.items()}
    name = "text_model.embeddings.token_embedding.weight"
    table = torch.zeros(VOCABULARY, WIDTH, dtype=state[name].dtype)
    table[seen] = state[name]
    return state | {name: table}
