"""CLIP's text half inside the step: token ids to embeddings, in operations that a CUDA graph can hold.

transformers' own forward makes its causal mask on the host in some versions and differs between them; here only its
modules are used. A LoRA is computed as in the UNet; an encoder without one is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_trainer.models.text import TextEncoder
from lora_trainer.training.checkpointing import recomputed
from lora_trainer.training.fused import Fused


@dataclass(frozen=True)
class StepClip:
    """`text`, with the LoRAs in its module if it is `trained`, computed by `fused`. With `checkpointing` its layers
    recompute activations."""

    text: TextEncoder
    fused: Fused
    checkpointing: bool = False
    trained: bool = True

    def __call__(self, ids: Tensor, emphasis: Tensor | None = None) -> Tensor:
        """[B, n, 77] token ids (and emphasis of that shape) to [B, 77 n, width] in the compute dtype.

        Each chunk of 77 is encoded by itself, as the frozen encoder does.
        """
        inner, ops = self.text.inner, self.fused.ops
        trained = self.trained and torch.is_grad_enabled()
        with torch.autocast(ids.device.type, enabled=False), torch.set_grad_enabled(trained):
            x = self._embedded(inner.embeddings, ids.flatten(0, 1))
            for layer in inner.encoder.layers[: self.text.layers]:
                x = recomputed(self._layer, layer, x) if self.checkpointing and trained else self._layer(layer, x)
            x, _ = ops.layer_norm(x, inner.final_layer_norm)
            if emphasis is not None:
                x = self.text.weigh(x, emphasis.flatten(0, 1))
        return x.reshape(len(ids), -1, x.shape[-1])

    def _embedded(self, embeddings: nn.Module, ids: Tensor) -> Tensor:
        """[M, 77] to [M, 77, width]."""
        tokens = F.embedding(ids, embeddings.token_embedding.weight)
        return (tokens + embeddings.position_embedding.weight[: ids.shape[1]]).to(self.fused.dtype)

    def _layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Causal self-attention and the feed-forward layer on [M, 77, width]."""
        fused, shape = self.fused, x.shape
        normed, x = fused.ops.layer_norm(x, layer.layer_norm1)
        x = self._attention(layer.self_attn, normed, x)
        normed, x = fused.ops.layer_norm(x, layer.layer_norm2)
        inner = layer.mlp.activation_fn(fused.linear(layer.mlp.fc1, normed.reshape(-1, shape[-1])))
        return fused.linear(layer.mlp.fc2, inner, x.reshape(-1, shape[-1])).view(shape)

    def _attention(self, attn: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
        fused, (batch, length, width) = self.fused, x.shape
        flat = x.reshape(-1, width)

        def heads(layer: nn.Module) -> Tensor:
            return fused.linear(layer, flat).view(batch, length, attn.num_heads, -1).transpose(1, 2)

        q, k, v = heads(attn.q_proj), heads(attn.k_proj), heads(attn.v_proj)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(-1, width)
        return fused.linear(attn.out_proj, y, residual.reshape(-1, width)).view(batch, length, width)
