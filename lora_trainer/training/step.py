"""The train step in two parts: forward/backward for each micro-batch, one update for all.

Both parts read and write buffers that stay where they are, take no decision on the host and never synchronise,
so that each can be captured in a CUDA graph as it stands; here they run eagerly.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from lora_trainer.models.noise import NoiseSchedule
from lora_trainer.training.dropout import LoraDropout
from lora_trainer.training.objectives import Objective
from lora_trainer.training.optimizers import Optimizer
from lora_trainer.training.precision import LossScaler, Precision
from lora_trainer.training.trainables import Trainables


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B samples: everything random is already drawn.

    latents, eps: [B, 4, h, w] float32; t: [B] int64; context: [B, 77 n, width]; weight: [B] float32, summing to 1
    over an update (0 for padding); mask_keys: [B, 2] int32.
    """

    latents: Tensor
    eps: Tensor
    t: Tensor
    context: Tensor
    weight: Tensor
    mask_keys: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """What a captured graph depends on: (B, h, w, tokens)."""
        return (*self.latents.shape[:1], *self.latents.shape[2:], self.context.shape[1])

    def like(self, device: torch.device) -> Batch:
        """Empty buffers of the same shapes on `device`."""
        return Batch(*(torch.empty_like(getattr(self, f.name), device=device) for f in fields(self)))

    def copy_(self, other: Batch) -> None:
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(other, field.name), non_blocking=True)


@dataclass(frozen=True)
class Network:
    """What the forward pass runs: the injected view, its schedule, and how it is computed."""

    unet: UNet2DConditionModel
    noise: NoiseSchedule
    objective: Objective
    precision: Precision
    dropout: LoraDropout

    def losses(self, batch: Batch) -> Tensor:
        """Each sample's loss, [B] float32."""
        with self.precision.autocast():
            return self.objective(
                self.unet, self.noise, latents=batch.latents, eps=batch.eps, t=batch.t, context=batch.context
            )


class ForwardBackward:
    """Adds the gradient of one micro-batch's weighted loss, times the loss scale, into the flat gradient."""

    def __init__(self, network: Network, scaler: LossScaler, loss: Tensor) -> None:
        self.network, self.scaler, self.loss = network, scaler, loss
        self.buffers: dict[tuple[int, ...], Batch] = {}

    def __call__(self, batch: Batch) -> None:
        shape = batch.shape
        if shape not in self.buffers:
            self.buffers[shape] = batch.like(self.loss.device)
        static = self.buffers[shape]
        static.copy_(batch)
        if not self.network.dropout.knows(shape):
            with torch.no_grad(), self.network.dropout.recording(shape):
                self.network.losses(static)
        self._compute(static)

    def _compute(self, batch: Batch) -> None:
        # Checkpointed blocks run again in backward: the masks must still be there.
        with self.network.dropout.masks(batch.shape, batch.mask_keys):
            loss = (self.network.losses(batch) * batch.weight).sum()
            (loss * self.scaler.scale).backward()
        self.loss.add_(loss.detach())


class Update:
    """One optimizer update from the accumulated gradient.

    A loss or gradient that is not finite changes nothing but the loss scale; the device decides. `result` holds
    (loss, gradient norm before clipping, 1 if the update was held back).
    """

    def __init__(
        self, trainables: Trainables, optimizer: Optimizer, scaler: LossScaler, loss: Tensor, *, max_grad_norm: float
    ) -> None:
        self.trainables, self.optimizer, self.scaler, self.loss = trainables, optimizer, scaler, loss
        self.max_grad_norm = max_grad_norm
        self.result = torch.zeros(3, device=loss.device)

    def __call__(self) -> None:
        grads = self.trainables.grads
        grads.div_(self.scaler.scale)
        norm = torch.linalg.vector_norm(grads)
        bad = 1 - (torch.isfinite(norm) & torch.isfinite(self.loss)).float()
        if self.max_grad_norm > 0:
            grads.mul_((self.max_grad_norm / (norm + 1e-6)).clamp(max=1))
        self.optimizer.step(self.trainables, bad)
        self.scaler.update(bad)
        self.result.copy_(torch.stack([self.loss, norm, bad]))
        grads.zero_()
        self.loss.zero_()
