"""The borrowed view computed by fewer, larger operations: blocks of diffusers with forwards of ours while trained.

Modules stay diffusers' and PEFT's, so that names, saving and everything else stay theirs. A block of a form that is
not known here keeps its own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from lora_trainer.adapters.layers import Change, Decomposed, Turned, strength
from lora_trainer.kernels.plain import PlainOps, like
from lora_trainer.kernels.site import Site
from lora_trainer.training.patching import patch


@dataclass(frozen=True)
class Fused:
    """How the blocks compute: the operations, the dtype, the LoRA sites, copies of weights in another layout, and what
    computes adapters that are no plain LoRA."""

    ops: PlainOps
    dtype: torch.dtype
    sites: Mapping[nn.Module, Site]
    kernels: Mapping[nn.Module, Tensor] = field(default_factory=dict)
    computed: Mapping[nn.Module, Change | Turned | Decomposed] = field(default_factory=dict)

    def linear(self, layer: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """A linear layer or 1×1 convolution on x [M, in], with its LoRA if it has one, plus `residual` [M, out]."""
        site = self.sites.get(layer)
        base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        computed = None if base is layer or layer.disable_adapters else self.computed.get(layer)
        weight = like(base.weight, x).view(base.weight.shape[:2])
        bias = None if base.bias is None else like(base.bias, x)
        if isinstance(computed, Decomposed):
            given, x = x, computed.scaled(x)
            if (at := strength(layer)) != 1:
                # W sees so much less of the scaled input, and of its own input what is left.
                rest = F.linear((given - x) * (1 - at), weight)
                residual = rest if residual is None else residual + rest
        if site is not None and not layer.disable_adapters:
            return self.ops.lora_linear(x, weight, bias, site, residual)
        y = F.linear(x, weight, bias)
        if isinstance(computed, Change):
            y = y + computed.linear(x)
        if isinstance(computed, Turned):
            y = y + computed.linear(y)
        return y if residual is None else y + residual

    def conv(self, conv: nn.Conv2d, x: Tensor, *, bias: bool = True) -> Tensor:
        """A convolution that nothing was injected into, on x [B, C, H, W]."""
        weight = self.kernels.get(conv, conv.weight)
        offset = like(conv.bias, x) if bias and conv.bias is not None else None
        return F.conv2d(x, like(weight, x), offset, conv.stride, conv.padding, conv.dilation, conv.groups)

    def attention(self, attn: Attention, x: Tensor, context: Tensor, residual: Tensor) -> Tensor:
        """x and residual [B, N, C], context [B, M, width]."""
        batch, length, width = x.shape
        flat, given = x.reshape(-1, width), context.reshape(-1, context.shape[-1])

        def heads(layer: nn.Module, tokens: Tensor) -> Tensor:
            return self.linear(layer, tokens).view(batch, -1, attn.heads, attn.inner_dim // attn.heads).transpose(1, 2)

        q, k, v = heads(attn.to_q, flat), heads(attn.to_k, given), heads(attn.to_v, given)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch * length, -1)
        return self.linear(attn.to_out[0], y, residual.reshape(batch * length, -1)).view(batch, length, -1)


def transformer_block(
    fused: Fused, block: BasicTransformerBlock, hidden_states: Tensor, *args: object, **kwargs: object
) -> Tensor:
    """Self-attention, cross-attention and the gated feed-forward layer on [B, N, C]."""
    context = kwargs.get("encoder_hidden_states")
    normed, x = fused.ops.layer_norm(hidden_states, block.norm1)
    x = fused.attention(block.attn1, normed, normed, x)
    normed, x = fused.ops.layer_norm(x, block.norm2)
    x = fused.attention(block.attn2, normed, like(context, x), x)
    normed, x = fused.ops.layer_norm(x, block.norm3)
    shape = x.shape
    gate, _, out = block.ff.net
    inner = fused.ops.geglu(fused.linear(gate.proj, normed.reshape(-1, shape[-1])))
    return fused.linear(out, inner, x.reshape(-1, shape[-1])).view(shape)


def transformer(
    fused: Fused, block: Transformer2DModel, hidden_states: Tensor, *args: object, **kwargs: object
) -> tuple[Tensor]:
    """The blocks between their projections, on pictures [B, C, H, W]."""
    batch, channels, height, width = hidden_states.shape
    normed, x = fused.ops.group_norm(hidden_states, block.norm, silu=False)
    tokens = fused.linear(block.proj_in, _tokens(normed)).view(batch, height * width, -1)
    for inner in block.transformer_blocks:
        tokens = inner(tokens, encoder_hidden_states=kwargs.get("encoder_hidden_states"))
    y = fused.linear(block.proj_out, tokens.reshape(batch * height * width, -1), _tokens(x))
    return (y.view(batch, height, width, channels).permute(0, 3, 1, 2),)


def resnet(fused: Fused, block: ResnetBlock2D, input_tensor: Tensor, temb: Tensor, *args: object) -> Tensor:
    """Two normed convolutions with the time embedding between them, on [B, C, H, W]."""
    normed, x = fused.ops.group_norm(input_tensor, block.norm1, silu=True)
    y = fused.conv(block.conv1, normed, bias=False)
    shift = fused.linear(block.time_emb_proj, F.silu(temb)) + like(block.conv1.bias, y)
    normed, _ = fused.ops.group_norm(y, block.norm2, silu=True, shift=shift)
    y = fused.conv(block.conv2, normed, bias=False)
    if block.conv_shortcut is not None:
        batch, _, height, width = x.shape
        x = fused.linear(block.conv_shortcut, _tokens(x)).view(batch, height, width, -1).permute(0, 3, 1, 2)
    return fused.ops.add(y, block.conv2.bias, x)


def lora_layer(fused: Fused, layer: BaseTunerLayer, x: Tensor, *args: object, **kwargs: object) -> Tensor:
    """A linear layer with a LoRA that somebody else's forward calls, on [..., in]."""
    flat = like(x, fused.sites[layer].down).reshape(-1, x.shape[-1]).contiguous()
    return fused.linear(layer, flat).view(*x.shape[:-1], -1)


@contextmanager
def fuse(network: nn.Module, fused: Fused) -> Iterator[int]:
    """Inside, the blocks of `network` that are known here run `fused`; yields their number."""
    plan = list(_plan(network, fused))
    with ExitStack() as stack:
        for module, forward in plan:
            patch(stack, module, partial(_exactly, fused.dtype, partial(forward, fused, module)))
        yield len(plan)


def _plan(network: nn.Module, fused: Fused) -> Iterator[tuple[nn.Module, Callable]]:
    forwards = {
        ResnetBlock2D: (_is_resnet, resnet),
        Transformer2DModel: (_is_transformer, transformer),
        BasicTransformerBlock: (_is_transformer_block, transformer_block),
    }
    for module in network.modules():
        known, forward = forwards.get(type(module), (None, None))
        if known is not None and known(module, fused):
            yield module, forward
        elif module in fused.sites and isinstance(module.get_base_layer(), nn.Linear):
            yield module, lora_layer
        elif type(module) is nn.Conv2d and module in fused.kernels:
            yield module, Fused.conv


def _exactly(dtype: torch.dtype, forward: Callable, x: Tensor, *args: object, **kwargs: object) -> Tensor:
    """`forward` in the compute dtype, without autocast's own choices."""
    with torch.autocast(x.device.type, enabled=False):
        args = tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
        return forward(x.to(dtype), *args, **kwargs)


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer multiplies each row or pixel by one matrix."""
    if type(layer) is nn.Conv2d:
        return layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0) and layer.groups == 1
    return type(layer) is nn.Linear


def _tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] to [B H W, C]; no copy for channels-last pictures."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _is_linear(layer: nn.Module, fused: Fused) -> bool:
    """A layer that `Fused.linear` computes: plain, with a LoRA site, or with a change beside it."""
    if not isinstance(layer, BaseTunerLayer):
        return is_linear(layer)
    beside = isinstance(fused.computed.get(layer), (Change, Turned))
    return layer in fused.sites or (beside and is_linear(layer.get_base_layer()))


def _is_resnet(block: ResnetBlock2D, fused: Fused) -> bool:
    plain = (block.conv1, block.conv2)
    linear = [layer for layer in (block.time_emb_proj, block.conv_shortcut) if layer is not None]
    return (
        block.time_embedding_norm == "default"
        and block.time_emb_proj is not None
        and block.upsample is None
        and block.downsample is None
        and not getattr(block, "skip_time_act", False)
        and block.output_scale_factor == 1
        and isinstance(block.nonlinearity, nn.SiLU)
        and block.dropout.p == 0
        and all(type(conv) is nn.Conv2d for conv in plain)
        and all(_is_linear(layer, fused) for layer in linear)
    )


def _is_transformer(block: Transformer2DModel, fused: Fused) -> bool:
    return (
        getattr(block, "is_input_continuous", False)
        and isinstance(block.norm, nn.GroupNorm)
        and _is_linear(block.proj_in, fused)
        and _is_linear(block.proj_out, fused)
    )


def _is_transformer_block(block: BasicTransformerBlock, fused: Fused) -> bool:
    return (
        getattr(block, "norm_type", None) == "layer_norm"
        and block.pos_embed is None
        and block.attn2 is not None
        and not block.only_cross_attention
        and block._chunk_size is None
        and all(_is_attention(attn, fused) for attn in (block.attn1, block.attn2))
        and _is_gated(block.ff, fused)
    )


def _is_attention(attn: Attention, fused: Fused) -> bool:
    absent = ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim")
    return (
        all(getattr(attn, name, None) in (None, False) for name in absent)
        and not attn.residual_connection
        and attn.rescale_output_factor == 1
        and all(_is_linear(layer, fused) for layer in (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0]))
    )


def _is_gated(ff: FeedForward, fused: Fused) -> bool:
    gate = ff.net[0]
    return (
        type(gate).__name__ == "GEGLU"
        and len(ff.net) == 3
        and _is_linear(gate.proj, fused)
        and _is_linear(ff.net[2], fused)
    )
