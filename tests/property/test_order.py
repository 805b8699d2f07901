"""The order of training: what holds for any data set, batch size and seed."""

from __future__ import annotations

from itertools import islice

from hypothesis import given, settings
from hypothesis import strategies as st

from lora_trainer.dataset.order import epoch_batches, steps_per_epoch, updates

SAME_EVERYWHERE = settings(deadline=None, derandomize=True, max_examples=100)
groups = st.lists(st.sampled_from(["a", "b", ("c", 1)]), min_size=1, max_size=40)
sizes = st.integers(1, 7)
seeds = st.integers(0, 2**32)


@SAME_EVERYWHERE
@given(groups, sizes, seeds, st.integers(0, 1000))
def test_an_epoch_is_every_image_once_in_full_batches_of_one_group(groups, size, seed, epoch):
    batches = epoch_batches(groups, size, seed=seed, epoch=epoch)
    real = []
    for batch in batches:
        assert len(batch.indices) == len(batch.weights) == len(batch.visits) == size
        assert {groups[index] for index in batch.indices} == {batch.group}
        assert set(batch.weights) <= {0.0, 1.0}
        assert batch.weights[0] == 1
        assert list(batch.visits) == [epoch * len(groups) + index for index in batch.indices]
        real += [index for index, weight in zip(batch.indices, batch.weights, strict=True) if weight]
    assert sorted(real) == list(range(len(groups)))


@SAME_EVERYWHERE
@given(groups, sizes, seeds)
def test_visits_never_repeat_in_a_run(groups, size, seed):
    visits = [
        visit
        for epoch in range(3)
        for batch in epoch_batches(groups, size, seed=seed, epoch=epoch)
        for visit, weight in zip(batch.visits, batch.weights, strict=True)
        if weight
    ]
    assert sorted(visits) == list(range(3 * len(groups)))


@SAME_EVERYWHERE
@given(groups, sizes, st.integers(1, 4), seeds, st.integers(0, 60))
def test_resuming_continues_the_same_stream(groups, size, accumulation, seed, first):
    whole = list(islice(updates(groups, size, accumulation, seed=seed), first + 5))
    resumed = list(islice(updates(groups, size, accumulation, seed=seed, first_step=first), 5))
    assert resumed == whole[first:]
    assert [update.step for update in whole] == list(range(first + 5))


@SAME_EVERYWHERE
@given(groups, sizes, st.integers(1, 4), seeds)
def test_updates_of_an_epoch_are_its_batches(groups, size, accumulation, seed):
    steps = steps_per_epoch(groups, size, accumulation)
    found = list(islice(updates(groups, size, accumulation, seed=seed), 2 * steps))
    for epoch in (0, 1):
        mine = [update for update in found if update.epoch == epoch]
        assert len(mine) == steps
        assert all(len(update.batches) == accumulation for update in mine[:-1])
        assert 1 <= len(mine[-1].batches) <= accumulation
        flat = tuple(batch for update in mine for batch in update.batches)
        assert flat == epoch_batches(groups, size, seed=seed, epoch=epoch)


GOLDEN = [("a", (3, 0), (1.0, 1.0)), ("b", (4, 2), (1.0, 1.0)), ("a", (1, 3), (1.0, 0.0))]


def test_order_is_the_same_everywhere():
    """Golden: a changed order would make every saved run resume wrongly."""
    batches = epoch_batches(["a", "a", "b", "a", "b"], 2, seed=7, epoch=1)
    assert [(batch.group, batch.indices, batch.weights) for batch in batches] == GOLDEN


def test_seed_and_epoch_change_the_order():
    def order(seed, epoch):
        return [batch.indices for batch in epoch_batches(["a"] * 30, 4, seed=seed, epoch=epoch)]

    assert len({str(order(seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16
    assert order(1, 2) == order(1, 2)


def test_a_group_smaller_than_a_batch_repeats_its_own_images():
    (batch,) = epoch_batches(["a", "a"], 5, seed=0, epoch=0)
    assert sorted(batch.indices[:2]) == [0, 1]
    assert batch.indices[2:] == (*batch.indices[:2], batch.indices[0])
    assert batch.weights == (1, 1, 0, 0, 0)
