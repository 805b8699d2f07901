"""What holds for every bucket and for every picture put into one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lora_trainer.dataset.buckets import MAX_ASPECT, STEP, Bucket, buckets, fit, place

SAME_EVERYWHERE = settings(deadline=None, derandomize=True, max_examples=100)
resolutions = st.integers(STEP, 1536)
sides = st.integers(STEP, 6000)
sizes = st.tuples(sides, sides)


def aspect(width, height):
    return max(width, height) / min(width, height)


def mismatch(bucket, size):
    one, other = bucket.width * size[1], bucket.height * size[0]
    return max(one, other) / min(one, other)


@SAME_EVERYWHERE
@given(resolutions, st.sampled_from([8, 32, 64]))
def test_buckets_stay_in_their_bounds(resolution, step):
    found = buckets(resolution, step=step)
    for bucket in found:
        assert bucket.width % step == bucket.height % step == 0
        assert bucket.width * bucket.height <= resolution**2
        assert aspect(bucket.width, bucket.height) <= MAX_ASPECT
    assert {Bucket(b.height, b.width) for b in found} == set(found)
    assert len(set(found)) == len(found)
    square = resolution // step * step
    assert Bucket(square, square) in found


@SAME_EVERYWHERE
@given(sizes, resolutions, st.booleans())
def test_a_placement_covers_its_bucket_and_no_more(size, resolution, allow_upscaling):
    placement = place(size, resolution, allow_upscaling=allow_upscaling)
    bucket, (width, height) = placement.bucket, placement.resized
    assert bucket.width % STEP == bucket.height % STEP == 0
    assert bucket.width * bucket.height <= resolution**2
    assert aspect(bucket.width, bucket.height) <= MAX_ASPECT
    assert width >= bucket.width
    assert height >= bucket.height
    assert width == bucket.width or height == bucket.height
    left, top, right, bottom = placement.crop
    assert (right - left, bottom - top) == (bucket.width, bucket.height)
    assert left >= 0
    assert right <= width
    assert top >= 0
    assert bottom <= height
    assert abs(left - (width - right)) <= 1
    assert abs(top - (height - bottom)) <= 1
    # The aspect is kept to within the rounding of one side to whole pixels.
    assert abs(width * size[1] - height * size[0]) <= max(size) / 2
    assert placement.original == size


@SAME_EVERYWHERE
@given(sizes, resolutions)
def test_nothing_is_enlarged_unasked(size, resolution):
    placement = place(size, resolution)
    assert placement.resized[0] <= size[0]
    assert placement.resized[1] <= size[1]


@SAME_EVERYWHERE
@given(sizes, resolutions)
def test_the_nearest_aspect_is_chosen(size, resolution):
    every = buckets(resolution)
    nearest = min(mismatch(bucket, size) for bucket in every)
    assert mismatch(place(size, resolution, allow_upscaling=True).bucket, size) == nearest
    placement = place(size, resolution)
    if placement.bucket in every and size[0] >= resolution * 2 <= size[1]:
        assert mismatch(placement.bucket, size) == nearest


@SAME_EVERYWHERE
@given(sizes, st.integers(512, 1536))
def test_little_is_cut_off_an_ordinary_picture(size, resolution):
    if aspect(*size) <= MAX_ASPECT:
        assert mismatch(place(size, resolution, allow_upscaling=True).bucket, size) < 1.25


@SAME_EVERYWHERE
@given(st.tuples(st.integers(STEP, 700), st.integers(STEP, 700)))
def test_a_small_picture_gets_the_largest_bucket_inside_it(size):
    resolution = 512
    bucket = place(size, resolution).bucket
    if size[0] < 512 > size[1]:
        inside = [
            w * h
            for w in range(STEP, size[0] + 1, STEP)
            for h in range(STEP, size[1] + 1, STEP)
            if w * h <= resolution**2 and aspect(w, h) <= MAX_ASPECT
        ]
        full = bucket in buckets(resolution)
        assert full or bucket.width * bucket.height == max(inside)


@SAME_EVERYWHERE
@given(st.integers(1, STEP - 1), st.integers(1, 3000), st.booleans())
def test_a_side_under_64_pixels_is_refused_unless_it_may_grow(short, other, upright):
    size = (short, other) if upright else (other, short)
    with pytest.raises(ValueError, match=f"found {size[0]}×{size[1]}"):
        place(size, 512)
    assert place(size, 512, allow_upscaling=True).bucket in buckets(512)


def test_a_thin_strip_is_not_enlarged_in_whole():
    """In whole it would have 256 × 25,600,000 pixels."""
    size = (1, 100_000)
    assert fit(Image.new("RGB", size), place(size, 512, allow_upscaling=True)).size == (256, 1024)


def test_known_sizes():
    assert place((512, 512), 512).bucket == Bucket(512, 512)
    assert place((4000, 3000), 512).bucket == Bucket(576, 448)
    assert place((1920, 1080), 1024).bucket == Bucket(1344, 768)
    assert place((128, 128), 512).bucket == Bucket(128, 128)
    assert place((128, 128), 512, allow_upscaling=True).bucket == Bucket(512, 512)
    assert place((300, 200), 512).bucket == Bucket(256, 192)
    with pytest.raises(ValueError, match="resolution"):
        buckets(63)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (256, 256), (1000, 700), (64, 640), (513, 515)])
def test_fit_is_resize_then_crop(size):
    ramp = np.linspace(0, 255, size[0])[None, :, None] * np.linspace(0.2, 1, size[1])[:, None, None]
    image = Image.fromarray(np.repeat(ramp, 3, axis=2).astype(np.uint8))
    placement = place(size, 256)
    fitted = fit(image, placement)
    assert fitted.size == (placement.bucket.width, placement.bucket.height)
    plain = image.resize(placement.resized, Image.Resampling.LANCZOS).crop(placement.crop)
    difference = np.abs(np.asarray(fitted, int) - np.asarray(plain, int))
    assert difference[2:-2, 2:-2].max() <= 2
    assert difference.max() <= 3


@SAME_EVERYWHERE
@given(st.tuples(st.integers(STEP, 900), st.integers(STEP, 900)), st.integers(STEP, 700))
def test_the_part_to_keep_is_inside_the_picture(size, resolution):
    placement = place(size, resolution)
    assert fit(Image.new("L", size), placement).size == (placement.bucket.width, placement.bucket.height)
