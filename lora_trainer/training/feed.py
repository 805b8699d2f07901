"""Samples to batches: everything random of a micro-batch, drawn ahead of its step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lora_trainer.dataset import order
from lora_trainer.dataset.prepare import Sample
from lora_trainer.training import randomness
from lora_trainer.training.step import Batch, stacked


@dataclass(frozen=True)
class Feed:
    """`samples` as an endless stream of updates, a pure function of (samples, seed, sizes).

    Each batch is cut into `parts` micro-batches, which changes memory and time and nothing else.
    """

    samples: Sequence[Sample]
    batch_size: int
    accumulation: int
    seed: int
    timesteps: int
    parts: int = 1

    @property
    def steps_per_epoch(self) -> int:
        return order.steps_per_epoch(self._groups, self.batch_size, self.accumulation)

    @property
    def batches_per_epoch(self) -> int:
        return order.steps_per_epoch(self._groups, self.batch_size, 1)

    def updates(self, first_step: int) -> Iterator[order.Update]:
        """The updates from `first_step` (counted from 0) on, without end."""
        return order.updates(self._groups, self.batch_size, self.accumulation, seed=self.seed, first_step=first_step)

    def stream(self, first_step: int, *, pinned: bool) -> Iterator[tuple[order.Update, list[Batch]]]:
        """`updates` with their micro-batches, in page-locked memory if `pinned`."""
        for update in self.updates(first_step):
            batches = self.batches(update)
            yield update, [batch.pinned() for batch in batches] if pinned else list(batches)

    def batches(self, update: order.Update) -> Iterator[Batch]:
        """The micro-batches of an update, on the CPU; the weights of its real samples sum to 1."""
        total = sum(sum(batch.weights) for batch in update.batches)
        for batch in update.batches:
            whole = self._batch(batch, total)
            yield from whole.split(self.parts) if self.parts > 1 else (whole,)

    def _batch(self, batch: order.Batch, total: float) -> Batch:
        samples = [self.samples[index] for index in batch.indices]
        latents = torch.stack([sample.latents for sample in samples])
        return Batch(
            latents=latents,
            eps=randomness.normal(self.seed, "noise", batch.visits, tuple(latents.shape[1:])),
            t=randomness.timesteps(self.seed, batch.visits, self.timesteps),
            weight=torch.tensor(batch.weights) / total,
            mask_keys=randomness.mask_keys(self.seed, batch.visits),
            **stacked([sample.text for sample in samples]),
        )

    @property
    def _groups(self) -> list:
        return [sample.group for sample in self.samples]
