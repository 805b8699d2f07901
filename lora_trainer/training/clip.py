"""CLIP's text half inside the step: token ids to embeddings, in operations that a CUDA graph can hold.

transformers' own forward makes its causal mask on the host in some versions and differs between them; here only its
modules are used. A LoRA is computed as in the UNet; an encoder without one is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_trainer.models.text import ClipEncoder, Conditions, TextEncoder, ends, side_by_side
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

    def __call__(self, ids: Tensor, emphasis: Tensor | None = None) -> Conditions:
        """[B, n, 77] token ids (and emphasis of that shape) to context [B, 77 n, width], and pooled [B, projection] of
        the first chunks, in the compute dtype.

        Each chunk of 77 is encoded by itself, as the frozen encoder does.
        """
        chunks, parts, pooled = ids.flatten(0, 1), [], []
        trained = self.trained and torch.is_grad_enabled()
        with torch.autocast(ids.device.type, enabled=False), torch.set_grad_enabled(trained):
            for encoder in self.text.encoders:
                x, last = self._hidden(encoder, chunks)
                parts.append(x)
                if encoder.pooled:
                    pooled.append(self._pooled(encoder, last.unflatten(0, ids.shape[:2])[:, 0], ids[:, 0]))
            joined = self.text.joined(parts, None if emphasis is None else emphasis.flatten(0, 1))
        return Conditions(joined.reshape(len(ids), -1, joined.shape[-1]), side_by_side(pooled))

    def _hidden(self, encoder: ClipEncoder, ids: Tensor) -> tuple[Tensor, Tensor]:
        """[M, 77] to what the encoder says and its last layer's output, [M, 77, width] each."""
        inner = encoder.inner
        x = said = self._embedded(inner.embeddings, encoder.padded(ids))
        heard = len(inner.encoder.layers) + 1 - encoder.clip_skip
        checkpointing = self.checkpointing and torch.is_grad_enabled()
        for number, layer in enumerate(inner.encoder.layers[: encoder.layers], start=1):
            x = recomputed(self._layer, layer, x) if checkpointing else self._layer(layer, x)
            said = x if number == heard else said
        if encoder.normed:
            said, _ = self.fused.ops.layer_norm(said, inner.final_layer_norm)
        return said, x

    def _pooled(self, encoder: ClipEncoder, last: Tensor, ids: Tensor) -> Tensor:
        """[B, projection] of the last layer's [B, 77, width] where the text [B, 77] ends."""
        at_end = last[torch.arange(len(ids), device=ids.device), ends(ids)]
        normed, _ = self.fused.ops.layer_norm(at_end, encoder.inner.final_layer_norm)
        return normed if encoder.projection is None else self.fused.linear(encoder.projection, normed)

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
