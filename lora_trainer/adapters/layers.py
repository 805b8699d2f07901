"""How adapters compute that are no plain LoRA: forwards of ours on PEFT's layers, which hold the tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_trainer.adapters.lycoris import Rotation, Scales
from lora_trainer.adapters.naming import Factors, Weights

ADAPTER = "default"


@dataclass(eq=False)
class Change:
    """A change of the weight that is computed whole: y = W x + b + ΔW x.

    ΔW is made in fp32 from the layer's tensors by the formula of its file, again in the backward pass instead of kept.
    `keep` gives what of the outputs is kept for each sample, [B, 1, out], or None for all.
    """

    layer: BaseTunerLayer
    weights: Callable[[], Weights]
    keep: Callable[[], Tensor | None] = lambda: None

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        layer = self.layer
        y = layer.base_layer(x, *args, **kwargs)
        if layer.disable_adapters:
            return y
        base, delta = layer.get_base_layer(), self.delta().to(x.dtype)
        if isinstance(base, nn.Linear):
            return y + _kept(F.linear(x, delta), self.keep())
        change = F.conv2d(x, delta, None, base.stride, base.padding, base.dilation, base.groups)
        keep = self.keep()
        return y + (change if keep is None else change * keep.transpose(1, 2).unsqueeze(-1))

    def linear(self, x: Tensor) -> Tensor:
        """ΔW x of rows or pixels x [M, in]."""
        return _kept(F.linear(x, self.delta().to(x.dtype).flatten(1)), self.keep())

    def delta(self) -> Tensor:
        """ΔW, times the strength, fp32 in the weight's shape."""
        with torch.autocast(self.layer.get_base_layer().weight.device.type, enabled=False):
            if not torch.is_grad_enabled():
                return self._delta()
            return checkpoint(self._delta, use_reentrant=False, preserve_rng_state=False)

    def _delta(self) -> Tensor:
        return self.weights().delta(self.layer.get_base_layer().weight) * strength(self.layer)


@dataclass(eq=False)
class Turned:
    """A change of what the weight answers: y = z + T z + b, z = W x, where T z costs little beside W x.

    `keep` as in `Change`.
    """

    layer: BaseTunerLayer
    weights: Callable[[], Scales | Rotation]
    keep: Callable[[], Tensor | None] = lambda: None

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        y = self.layer.base_layer(x, *args, **kwargs)
        if self.layer.disable_adapters:
            return y
        rows = y.movedim(1, -1) if y.dim() == 4 else y
        change = self.linear(rows.reshape(-1, rows.shape[-1])).view(rows.shape)
        return y + (change.movedim(-1, 1) if y.dim() == 4 else change)

    def linear(self, y: Tensor) -> Tensor:
        """T z of rows or pixels y = z + b [M, out]."""
        bias = self.layer.get_base_layer().bias
        change, at = self.weights().turned(y if bias is None else y - bias.to(y.dtype)), strength(self.layer)
        return _kept(change if at == 1 else change * at, self.keep())


@dataclass(eq=False)
class Decomposed:
    """DoRA: a LoRA on inputs whose channels are scaled by c = m / ‖W + (alpha / r) B A‖, since (W + s B A) diag(c) x is
    (W + s B A) (c ∘ x). The norm counts as a constant in the backward pass (the paper's section 4.3)."""

    layer: BaseTunerLayer
    weights: Callable[[], Factors]

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        layer = self.layer
        if layer.disable_adapters:
            return layer.base_layer(x, *args, **kwargs)
        channels, at = self.channels(), strength(layer)
        if isinstance(layer.get_base_layer(), nn.Linear):
            channels = channels.view(-1)
        scaled = x * channels.to(x.dtype)
        through = scaled if at == 1 else x * (1 - at) + scaled * at
        low = layer.lora_A[ADAPTER](scaled)
        return layer.base_layer(through, *args, **kwargs) + layer.lora_B[ADAPTER](low) * layer.scaling[ADAPTER]

    def scaled(self, x: Tensor) -> Tensor:
        """Rows or pixels x [M, in] with their channels scaled."""
        return x * self.channels().view(-1).to(x.dtype)

    def channels(self) -> Tensor:
        """c, fp32 [1, in] or [1, in, 1, 1]."""
        weights, weight = self.weights(), self.layer.get_base_layer().weight
        with torch.autocast(weight.device.type, enabled=False):
            with torch.no_grad():
                plain = Factors(weights.down, weights.up, weights.alpha)
                merged = weight.float() + plain.delta(weight)
            return weights.channels(merged)


def computed(layer: BaseTunerLayer, weights: Callable[[], Weights]) -> Change | Turned | Decomposed:
    """What computes `layer`, of which `weights` gives the live tensors."""
    now = weights()
    if isinstance(now, Factors):
        return Decomposed(layer, weights)
    turns = isinstance(now, Rotation) or (isinstance(now, Scales) and not now.on_input)
    return (Turned if turns else Change)(layer, weights)


def _kept(y: Tensor, keep: Tensor | None) -> Tensor:
    """Of rows y [M, out] of samples what `keep` [B, 1, out] keeps."""
    return y if keep is None else (y.reshape(len(keep), -1, y.shape[-1]) * keep).view(y.shape)


def strength(layer: BaseTunerLayer) -> float:
    """How much of its adapter a layer applies; 1 as trained."""
    alpha = getattr(layer, "lora_alpha", None) or layer.alpha
    return layer.scaling[ADAPTER] / (alpha[ADAPTER] / layer.r[ADAPTER])
