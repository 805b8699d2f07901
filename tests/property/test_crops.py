"""What holds for every way to cut a picture, and for an epoch over any pictures, sizes and batches."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lora_trainer.dataset.buckets import MAX_ASPECT, STEP, place
from lora_trainer.dataset.crops import Sizes, View, focused, spread, views
from lora_trainer.dataset.order import epoch_batches

SAME_EVERYWHERE = settings(deadline=None, derandomize=True, max_examples=60)
SIDES = st.integers(STEP, 700)
PICTURES = st.tuples(SIDES, SIDES)
SIZES = st.builds(
    Sizes,
    st.integers(1, 12).map(lambda number: number * STEP),
    st.booleans(),
    st.sampled_from(["center", "focus", "random"]),
    st.integers(1, 7),
    st.booleans(),
)


def picture(size, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0]), dtype=np.uint8))


@SAME_EVERYWHERE
@given(PICTURES, SIZES)
def test_views_lie_inside_the_picture_and_fill_one_bucket(size, sizes):
    image = picture(size)
    found = views(image, sizes)
    (bucket,) = {view.placement.bucket for view in found}
    assert bucket.area <= sizes.resolution**2
    assert bucket.width % STEP == bucket.height % STEP == 0
    assert max(bucket.width, bucket.height) <= MAX_ASPECT * min(bucket.width, bucket.height)
    assert len(set(found)) == len(found)
    for view in found:
        left, top, right, bottom = view.placement.crop
        assert 0 <= left <= right <= view.placement.resized[0]
        assert 0 <= top <= bottom <= view.placement.resized[1]
        assert (right - left, bottom - top) == (bucket.width, bucket.height)
        assert view.of(image).size == (bucket.width, bucket.height)
    cuts = len({view.placement for view in found})
    assert len(found) == cuts * (1 + sizes.flip)
    assert cuts <= (sizes.crops if sizes.crop == "random" else 1)
    assert not found[0].flipped


@SAME_EVERYWHERE
@given(st.integers(0, 1000), st.integers(1, 64))
def test_crops_are_spread_from_edge_to_edge_with_the_middle_first(slack, count):
    found = spread(slack, count)
    assert len(found) == len(set(found)) == min(count, slack + 1)
    assert abs(2 * found[0] - slack) <= max(1, slack // max(1, count - 1) + 1)
    if count % 2:
        assert found[0] == slack // 2
    if count > 1:
        assert {min(found), max(found)} == {0, slack}
        gaps = np.diff(sorted(found))
        assert gaps.size == 0 or gaps.max() - gaps.min() <= 1


@SAME_EVERYWHERE
@given(PICTURES, SIZES)
def test_sdxl_is_told_where_the_cut_lies(size, sizes):
    """In the resized picture, mirrored or not, the cut begins at (top, left) and is as large as the target."""
    image = picture(size)
    for view in views(image, sizes):
        height, width, top, left, target_height, target_width = view.sizes
        assert (width, height) == size
        placement = view.placement
        whole = Image.new("L", placement.resized)
        whole.paste(255, placement.crop)
        if view.flipped:
            whole = whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert whole.getbbox() == (left, top, left + target_width, top + target_height)


@SAME_EVERYWHERE
@given(
    st.lists(PICTURES, min_size=1, max_size=12),
    st.lists(st.integers(1, 11), min_size=1, max_size=3, unique=True),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_every_image_is_used_once_an_epoch_at_each_of_its_sizes(pictures, sides, batch, epoch):
    samples = []
    for number, size in enumerate(pictures):
        buckets = dict.fromkeys(place(size, side * STEP).bucket for side in sides)
        samples += [(number, bucket) for bucket in buckets]
    groups = [(bucket.width, bucket.height) for _, bucket in samples]
    seen = Counter()
    for made in epoch_batches(groups, batch, seed=3, epoch=epoch):
        assert len({groups[index] for index in made.indices}) == 1
        assert len(made.indices) == batch
        seen.update(index for index, weight in zip(made.indices, made.weights, strict=True) if weight)
    assert seen == Counter(range(len(samples)))
    assert {number for number, _ in samples} == set(range(len(pictures)))


@pytest.mark.parametrize(("at", "upright"), [(100, False), (700, False), (1240, False), (100, True), (700, True)])
def test_the_focus_is_where_the_detail_is(at, upright):
    values = np.full((512, 1400), 200, np.uint8)
    values[150:350, at - 90 : at + 90] = np.random.default_rng(0).integers(0, 255, (200, 180))
    image = Image.fromarray(values.T.copy() if upright else values)
    placement = place(image.size, 512)
    kept = focused(image, placement).crop[upright::2]
    scale = placement.resized[upright] / 1400
    assert kept[0] <= (at - 90) * scale + 4
    assert kept[1] >= (at + 90) * scale - 4
    if at == 100:
        assert placement.crop[upright] > (at - 90) * scale + 4


def test_a_picture_without_detail_is_cut_in_the_middle():
    for size in ((1400, 512), (512, 1400), (700, 512)):
        placement = place(size, 512)
        assert focused(Image.new("RGB", size, "red"), placement) == placement
        noise = np.random.default_rng(1).integers(0, 255, (size[1], size[0]), dtype=np.uint8)
        assert focused(Image.fromarray(noise), placement) == placement


def test_a_watermark_in_the_lowest_tenth_is_no_focus():
    values = np.full((1400, 512), 200, np.uint8)
    values[1340:1380, ::3] = 0
    placement = place((512, 1400), 512)
    assert focused(Image.fromarray(values), placement) == placement


def test_a_mirrored_view_is_the_mirrored_cut():
    image = picture((300, 130))
    plain, mirrored = views(image, Sizes(128, flip=True))
    assert (plain.flipped, mirrored.flipped) == (False, True)
    assert np.array_equal(np.asarray(plain.of(image))[:, ::-1], np.asarray(mirrored.of(image)))
    assert torch.tensor([View(plain.placement).sizes, mirrored.sizes]).shape == (2, 6)
