"""What a run learns that is not its pictures: the way between two prompts, or from one picture to another.

Both use the LoRA at +1 and at -1, so that what would pull at both ends alike cancels out, and the file is a slider: a
weight between -1 and 1 in the prompt goes from one end to the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_trainer.adapters.inject import Adapter, strengthened, without
from lora_trainer.config import Config
from lora_trainer.training.step import Batch, Lesson, Network


@dataclass(frozen=True)
class Slider:
    """Concept Sliders from prompts (Gandikota et al. 2023, arXiv:2311.12092): at +1 the LoRA predicts for the target
    prompt what the base does, plus `guidance` times what its predictions for the two prompts differ by; at -1 minus, as
    ai-toolkit has it."""

    guidance: float
    adapters: Sequence[Adapter]

    def __call__(self, network: Network, batch: Batch) -> Iterator[Tensor]:
        """Half of each sample's loss at +1, then at -1, [B] float32."""
        with torch.no_grad(), without(self.adapters):
            neutral, positive, negative = (
                network.predicted(seen).float()
                for seen in (batch, batch.directed(batch.positive), batch.directed(batch.negative))
            )
            way = self.guidance * (positive - negative)
        for weight in (1, -1):
            with strengthened(self.adapters, weight):
                yield 0.5 * network.objective(network.predicted(batch), neutral + weight * way, batch.t)


@dataclass(frozen=True)
class Difference:
    """Concept Sliders from pairs of pictures (arXiv:2311.12092): at +1 the LoRA learns the pictures after a change, at
    -1 the originals, with the same noise, timestep and caption."""

    adapters: Sequence[Adapter]

    def __call__(self, network: Network, batch: Batch) -> Iterator[Tensor]:
        """Half of each pair's loss at +1, then at -1, [B] float32."""
        for weight, latents in ((1, batch.latents), (-1, batch.original)):
            with strengthened(self.adapters, weight):
                yield 0.5 * network.losses(replace(batch, latents=latents))


def lesson_of(config: Config, adapters: Sequence[Adapter]) -> Lesson | None:
    """None where the pictures themselves are learned."""
    if config.mode == "slider":
        return Slider(config.slider_guidance, adapters)
    return Difference(adapters) if config.mode == "difference" else None
