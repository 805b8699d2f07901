"""Repeats: an epoch sees each picture as often as it should, each time with other noise, in full batches."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_trainer.dataset.buckets import Bucket
from lora_trainer.dataset.items import Item
from lora_trainer.dataset.samples import Prepared, Sample
from lora_trainer.training.feed import Feed

TEXT = {"context": torch.zeros(77, 4)}
counts = st.lists(st.tuples(st.integers(1, 5), st.sampled_from([64, 128])), min_size=1, max_size=8)


def prepared(repeats: list[tuple[int, int]]) -> Prepared:
    """Pictures of (repeats, width), whose latents hold their number."""
    return Prepared(
        tuple(
            Sample(
                Item(Path(f"{number}.png"), "x", ".txt", count),
                Bucket(width, 64),
                torch.full((1, 4, 8, width // 8), float(number)),
                torch.zeros(1, 6, dtype=torch.int64),
                TEXT,
                77,
            )
            for number, (count, width) in enumerate(repeats)
        ),
        (),
        texts={"x": TEXT},
    )


def feed_of(data: Prepared, size: int, accumulation: int, seed: int) -> Feed:
    return Feed(data.epoch, data.captions(lambda caption: TEXT), size, accumulation, seed, 1000)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(counts, st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_an_epoch_sees_each_picture_so_many_times(repeats, size, accumulation, seed):
    data = prepared(repeats)
    feed = feed_of(data, size, accumulation, seed)
    epochs = 2
    seen: Counter[int] = Counter()
    noises = []
    for update in islice(feed.updates(0), epochs * feed.steps_per_epoch):
        batches = list(feed.batches(update))
        assert abs(sum(float(batch.weight.sum()) for batch in batches) - 1) < 1e-5
        for batch in batches:
            assert len(batch.latents) == size
            real = batch.weight > 0
            seen.update(int(number) for number in batch.latents[real, 0, 0, 0])
            noises += [row.flatten()[:4].numpy().tobytes() for row in batch.eps[real]]
    assert seen == {number: epochs * count for number, (count, _) in enumerate(repeats)}
    assert len(set(noises)) == len(noises) == epochs * sum(count for count, _ in repeats)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(counts, st.integers(1, 4), st.integers(0, 30))
def test_a_run_goes_on_in_the_middle_of_an_epoch(repeats, size, first):
    feed = feed_of(prepared(repeats), size, 1, 7)
    assert list(islice(feed.updates(first), 4)) == list(islice(feed.updates(0), first + 4))[first:]


@settings(deadline=None, derandomize=True, max_examples=30)
@given(counts)
def test_buckets_count_what_an_epoch_sees(repeats):
    data = prepared(repeats)
    assert sum(data.buckets.values()) == len(data.epoch) == sum(count for count, _ in repeats)
