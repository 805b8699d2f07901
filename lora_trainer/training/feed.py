"""Samples to batches: everything random of a micro-batch, drawn ahead of its step."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch

from lora_trainer.config import Config
from lora_trainer.dataset import order
from lora_trainer.dataset.samples import Captions, Prepared, Sample
from lora_trainer.models.model import Model
from lora_trainer.training import randomness
from lora_trainer.training.noising import PLAIN, Noising
from lora_trainer.training.step import Batch, directions, stacked, with_sizes


@dataclass(frozen=True)
class Example:
    """A micro-batch of one shape, and how many of that shape an epoch has."""

    batch: Batch
    count: int


@dataclass(frozen=True)
class Feed:
    """`samples` as an endless stream of updates, a pure function of (samples, captions, seed, sizes).

    Each batch is cut into `parts` micro-batches, which changes memory and time and nothing else.
    """

    samples: Sequence[Sample]
    captions: Captions
    batch_size: int
    accumulation: int
    seed: int
    timesteps: int
    parts: int = 1
    noising: Noising = PLAIN

    @classmethod
    def of(cls, config: Config, prepared: Prepared, model: Model, parts: int = 1) -> Feed:
        """Of a run of `config` over `prepared`."""
        return cls(
            prepared.epoch,
            prepared.captions(model.text.tokens),
            config.batch_size,
            config.gradient_accumulation_steps,
            config.seed,
            model.noise.timesteps,
            parts,
            Noising.of(config, model.noise),
        )

    @property
    def steps_per_epoch(self) -> int:
        return order.steps_per_epoch(self._groups, self.batch_size, self.accumulation)

    @property
    def batches_per_epoch(self) -> int:
        return order.steps_per_epoch(self._groups, self.batch_size, 1)

    def examples(self) -> list[Example]:
        """One for each shape, the largest first."""
        members: dict[Hashable, list[int]] = {}
        for index, group in enumerate(self._groups):
            members.setdefault(group, []).append(index)
        found: dict[tuple[int, ...], Example] = {}
        for group, indices in members.items():
            same = (indices[0],) * self.batch_size
            parts = self._parts(order.Batch(same, (1.0,) * self.batch_size, same, group), float(self.batch_size))
            count = -(-len(indices) // self.batch_size) * len(parts)
            other = found.get(parts[0].shape)
            found[parts[0].shape] = Example(parts[0], count + (other.count if other else 0))
        return sorted(found.values(), key=lambda example: math.prod(example.batch.shape), reverse=True)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [example.batch.shape for example in self.examples()]

    def updates(self, first_step: int) -> Iterator[order.Update]:
        """The updates from `first_step` (counted from 0) on, without end."""
        return order.updates(self._groups, self.batch_size, self.accumulation, seed=self.seed, first_step=first_step)

    def stream(self, first_step: int, *, pinned: bool) -> Iterator[tuple[order.Update, list[Batch]]]:
        """`updates` with their micro-batches, in page-locked memory if `pinned`."""
        for update in self.updates(first_step):
            batches = self.batches(update)
            yield update, [batch.pinned() for batch in batches] if pinned else list(batches)

    def batches(self, update: order.Update) -> Iterator[Batch]:
        """The micro-batches of an update, on the CPU; a real sample's weight is its picture's by their number."""
        total = sum(sum(batch.weights) for batch in update.batches)
        for batch in update.batches:
            yield from self._parts(batch, total)

    def _parts(self, batch: order.Batch, total: float) -> list[Batch]:
        whole = self._batch(batch, total)
        return whole.split(self.parts) if self.parts > 1 else [whole]

    def _batch(self, batch: order.Batch, total: float) -> Batch:
        samples = [self.samples[index] for index in batch.indices]
        draws = [randomness.Draws(self.seed, visit) for visit in batch.visits]
        seen = stacked([sample.view(draw) for sample, draw in zip(samples, draws, strict=True)])
        drawn = [self.captions.drawn(sample, draw) for sample, draw in zip(samples, draws, strict=True)]
        # The captions, and with output preservation those without trigger words, all of one length.
        texts = self.captions.alike([text for column in zip(*drawn, strict=True) for text in column], samples[0].tokens)
        own, others = texts[: len(samples)], texts[len(samples) :]
        weights = [weight * sample.item.weight for weight, sample in zip(batch.weights, samples, strict=True)]
        eps = self.noising.noise(self.seed, batch.visits, seen["latents"])
        return Batch(
            latents=seen["latents"],
            eps=eps,
            input_eps=self.noising.input_noise(self.seed, batch.visits, eps),
            t=self.noising.timesteps(self.seed, batch.visits, self.timesteps),
            weight=torch.tensor(weights) / total,
            mask=seen.get("mask"),
            shown=seen.get("shown"),
            mask_keys=randomness.mask_keys(self.seed, batch.visits),
            preserved=stacked(others) if others else None,
            original=seen.get("original"),
            **directions(samples),
            **with_sizes(stacked(own), seen["sizes"]),
        )

    @property
    def _groups(self) -> list:
        return [sample.group for sample in self.samples]
