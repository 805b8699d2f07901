"""OpenCLIP's text encoders under transformers' names (github.com/mlfoundations/open_clip, open_clip/model.py)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

_OUTER = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_INNER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_LAYER = "transformer.resblocks."


def to_transformers(part: Mapping[str, Tensor], *, projection: bool) -> dict[str, Tensor]:
    """The tensors of `part` as views, under the names of transformers' CLIPTextModel before version 5; with its
    `projection` as CLIPTextModelWithProjection has it. The packed q, k, v are three views; what transformers has no use
    for (logit_scale) is left out."""
    renamed = {f"text_model.{theirs}": part[name] for name, theirs in _OUTER.items() if name in part}
    if projection and "text_projection" in part:
        renamed["text_projection.weight"] = part["text_projection"].t()
    for name, tensor in part.items():
        if name.startswith(_LAYER):
            number, _, inner = name[len(_LAYER) :].partition(".")
            renamed |= {f"text_model.encoder.layers.{number}.{new}": view for new, view in _inner(inner, tensor)}
    return renamed


def _inner(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The names and views of one tensor of a layer."""
    for kind in ("weight", "bias"):
        if name == f"attn.in_proj_{kind}":
            for part, view in zip("qkv", tensor.chunk(3, 0), strict=False):
                yield f"self_attn.{part}_proj.{kind}", view
            return
    outer, _, kind = name.rpartition(".")
    yield f"{_INNER.get(outer, outer)}.{kind}", tensor
