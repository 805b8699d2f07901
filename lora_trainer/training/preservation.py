"""Output preservation: what the LoRA does without its trigger words is held at what the frozen base does.

Prior preservation (DreamBooth, arXiv:2208.12242) without pictures: the base answers for itself, at the same noisy
latents and timestep, as ai-toolkit's differential output preservation and OneTrainer's prior prediction have it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_trainer.adapters.inject import Adapter, without


@dataclass(frozen=True)
class Preservation:
    """By `weight`, with all `adapters` of the run."""

    weight: float
    adapters: Sequence[Adapter]

    def losses(self, predicted: Callable[[], Tensor]) -> Tensor:
        """Each sample's squared distance of what `predicted` gives, [B, C, h, w], from what it gives with every LoRA
        off, times the weight: [B] float32. Gradients go through the first alone."""
        with torch.no_grad(), without(self.adapters):
            target = predicted().float()
        return self.weight * F.mse_loss(predicted().float(), target, reduction="none").mean(dim=(1, 2, 3))
