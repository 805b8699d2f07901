"""Losses that can be compared between steps and runs: fixed images, fixed noise, fixed timesteps, no dropout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from lora_trainer.dataset.rules import First
from lora_trainer.dataset.samples import Sample
from lora_trainer.training import randomness
from lora_trainer.training.step import Batch, Network, directions, stacked, with_sizes

TIMESTEPS = 8
# Rows of draws, each a timestep further for the next picture: the first few already cover low and high noise.
_ROWS = (0, 4, 2, 6, 1, 5, 3, 7)


@dataclass(frozen=True)
class Validator:
    """Mean loss over pairs of a sample and one of TIMESTEPS evenly spaced timesteps that the model knows, the same at
    every call: all pairs, or `most` of them, spread evenly over pictures and timesteps."""

    samples: Sequence[Sample]
    batch_size: int = 16
    most: int | None = None
    # Not the run's seed: runs with different seeds are compared by these numbers.
    seed: int = 0

    @property
    def count(self) -> int:
        """Pairs that are looked at."""
        return draws_of(len(self.samples), self.most)

    def loss(self, network: Network) -> float:
        device = network.noise.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        with torch.no_grad():
            for batch in self.batches(network.noise.trained):
                static = batch.like(device)
                static.copy_(batch)
                total += network.judged(static).double().sum()
        return total.item() / self.count

    def batches(self, timesteps: int) -> Iterator[Batch]:
        """The pairs, on the CPU."""
        draws = sorted(self._draws(), key=lambda draw: (str(self.samples[draw[0]].group), draw))
        for _, same in groupby(draws, key=lambda draw: self.samples[draw[0]].group):
            group = list(same)
            for start in range(0, len(group), self.batch_size):
                yield self._batch(group[start : start + self.batch_size], timesteps)

    def _draws(self) -> Iterator[tuple[int, int]]:
        """(number of the sample, number of the timestep)."""
        shown = min(len(self.samples), self.count)
        for number in range(self.count):
            row, place = divmod(number, shown)
            yield place * len(self.samples) // shown, (place + _ROWS[row]) % TIMESTEPS

    def _batch(self, draws: Sequence[tuple[int, int]], timesteps: int) -> Batch:
        samples = [self.samples[index] for index, _ in draws]
        visits = [index * TIMESTEPS + k for index, k in draws]
        seen = stacked([sample.view(First()) for sample in samples])
        latents = seen["latents"]
        return Batch(
            latents=latents,
            eps=randomness.normal(self.seed, "validation", visits, tuple(latents.shape[1:])),
            t=torch.tensor([int((k + 0.5) * timesteps / TIMESTEPS) for _, k in draws]),
            weight=torch.ones(len(draws)),
            mask=seen.get("mask"),
            shown=seen.get("shown"),
            mask_keys=torch.zeros(len(draws), 2, dtype=torch.int32),
            original=seen.get("original"),
            **directions(samples),
            **with_sizes(stacked([sample.text for sample in samples]), seen["sizes"]),
        )


def draws_of(samples: int, most: int | None) -> int:
    """How many pairs a Validator of so many samples looks at."""
    every = samples * TIMESTEPS
    return every if most is None else min(most, every)
