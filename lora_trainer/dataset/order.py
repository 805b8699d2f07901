"""The order of training: a pure function of (seed, epoch), the same on every machine and version.

Shuffling sorts by a hash of (seed, epoch, purpose, index), so it needs no generator state and a run can start
at any step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one group. A tail is filled up with repeats of weight 0, so every batch is full.

    `visits` key the randomness of each sample: epoch × images + image, whatever the batch it lands in.
    """

    indices: tuple[int, ...]
    weights: tuple[float, ...]
    visits: tuple[int, ...]
    group: Hashable


@dataclass(frozen=True)
class Update:
    """The micro-batches of one optimizer update; `step` and `epoch` count from 0."""

    step: int
    epoch: int
    batches: tuple[Batch, ...]


def epoch_batches(groups: Sequence[Hashable], batch_size: int, *, seed: int, epoch: int) -> tuple[Batch, ...]:
    """One epoch over images of these `groups`: each once with weight 1, and no batch of two groups."""
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    batches = []
    for group, indices in members.items():
        shuffled = sorted(indices, key=lambda index: _key(seed, epoch, "image", index))
        for start in range(0, len(shuffled), batch_size):
            real = shuffled[start : start + batch_size]
            padding = [shuffled[n % len(shuffled)] for n in range(batch_size - len(real))]
            batches.append(_batch(real, padding, group, first_visit=epoch * len(groups)))
    return tuple(sorted(batches, key=lambda batch: _key(seed, epoch, "batch", batch.indices[0])))


def steps_per_epoch(groups: Sequence[Hashable], batch_size: int, accumulation: int) -> int:
    """Optimizer updates an epoch; its last one may have fewer micro-batches."""
    sizes: dict[Hashable, int] = {}
    for group in groups:
        sizes[group] = sizes.get(group, 0) + 1
    batches = sum(-(-size // batch_size) for size in sizes.values())
    return -(-batches // accumulation)


def updates(
    groups: Sequence[Hashable], batch_size: int, accumulation: int, *, seed: int, first_step: int = 0
) -> Iterator[Update]:
    """Updates from `first_step` on, without end. None crosses the end of an epoch."""
    per_epoch = steps_per_epoch(groups, batch_size, accumulation)
    epoch, skip = divmod(first_step, per_epoch)
    while True:
        batches = epoch_batches(groups, batch_size, seed=seed, epoch=epoch)
        for position in range(skip, per_epoch):
            part = batches[position * accumulation : (position + 1) * accumulation]
            yield Update(epoch * per_epoch + position, epoch, part)
        epoch, skip = epoch + 1, 0


def _batch(real: list[int], padding: list[int], group: Hashable, *, first_visit: int) -> Batch:
    indices = (*real, *padding)
    return Batch(
        indices=indices,
        weights=(1.0,) * len(real) + (0.0,) * len(padding),
        visits=tuple(first_visit + index for index in indices),
        group=group,
    )


def _key(seed: int, epoch: int, purpose: str, index: int) -> bytes:
    return hashlib.blake2b(f"{seed}:{epoch}:{purpose}:{index}".encode(), digest_size=8).digest()
