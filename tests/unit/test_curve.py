"""What a held-out curve says: the best step, the noise, the end, the warning."""

from __future__ import annotations

import math
import random

import pytest

from lora_trainer.curve import FEWEST, Point, best, chosen, noise, risen, waited, warning


def curve(*losses: float) -> list[Point]:
    """The base's loss, then one every 10 steps."""
    return [Point(10 * number, losses[0], loss) for number, loss in enumerate(losses)]


def test_the_best_is_a_step_of_the_lora():
    assert best([]) is best(curve(0.5)) is None
    assert best(curve(0.5, 0.6, 0.55)).step == 20
    assert best(curve(0.5, 0.4, 0.3, 0.3, 0.35)).step == 20
    assert best(curve(0.5, math.nan, 0.4)).step == 20


def test_noise_is_how_far_points_lie_off_their_course():
    draw = random.Random(0)
    smooth = [0.3 * math.exp(-n / 30) + 0.1 for n in range(60)]
    rough = [loss + draw.gauss(0, 0.01) for loss in smooth]
    assert noise(curve(*smooth)) < 1e-4
    found = [noise(curve(*rough[:end])) for end in range(20, 61)]
    assert 0.005 < sum(found) / len(found) < 0.02
    # Of the first few points nothing is known.
    assert noise(curve(*rough[: FEWEST + 2])) == 0
    assert noise(curve(*rough[: FEWEST + 3])) > 0


def test_patience_counts_from_the_last_lower_loss():
    assert waited(curve(0.5)) == 0
    assert waited(curve(0.5, 0.4, 0.3)) == 0
    assert waited(curve(0.5, 0.4, 0.3, 0.35, 0.3, 0.31)) == 3
    assert waited(curve(0.5, 0.4, 0.3, 0.35, 0.29)) == 0
    # Worse than the base from the start on.
    assert waited(curve(0.5, 0.6, 0.6)) == 2
    assert waited(curve(0.5, 0.4, math.nan, math.nan)) == 2


def test_patience_takes_no_luck_for_progress_but_slow_progress_for_some():
    # A flat end that jitters: new lows come now and then, each within the noise.
    draw = random.Random(1)
    flat = [0.3, 0.2, *(0.1 + draw.gauss(0, 0.002) for _ in range(40))]
    assert waited(curve(*flat)) >= 20
    slow = [0.3, 0.2, *(0.1 - 0.008 * n for n in range(10))]
    assert waited(curve(*slow)) == 0
    # Of 0.2195 that were learned, a fortieth takes it eleven points.
    crawling = [0.3, 0.2, *(0.1 - 0.0005 * n for n in range(40))]
    assert waited(curve(*crawling)) == 10


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ((0.5, 0.4, 0.3), None),
        ((0.5, 0.4, 0.3, 0.3149), None),
        ((0.5, 0.4, 0.3, 0.3151, 0.25), 30),
        ((0.5, 0.4, 0.4201, 0.5), 20),
        ((0.5, 0.53), 10),
        ((0.5,), None),
        ((), None),
    ],
)
def test_the_warning_comes_as_soon_as_it_has_risen_by_five_percent_and_else_never(losses, step):
    points = curve(*losses) if losses else []
    assert (risen(points).step if risen(points) else None) == step
    assert (warning(points) is None) == (step is None)


def test_the_warning_names_the_best_step_and_what_helps():
    told = warning(curve(0.5, 0.4, 0.3, 0.36))
    for words in ("step 30", "step 20", "0.3600", "0.3000", "half the learning rate", "varied", "lora_dropout"):
        assert words in told
    assert "worse than with the base model" in warning(curve(0.5, 0.6))


def test_what_was_saved_is_said():
    points = curve(0.5, 0.0913, 0.0975)
    assert chosen(points[1], points[2], 1000, "style-step00000020") == (
        "step 10 of 1000 was best on held-out pictures (0.0913; at step 20 0.0975): saved that one; the last one is "
        "style-step00000020"
    )


def test_no_loss_at_all_is_no_rise():
    assert risen(curve(0.0, 0.0, 0.0)) is None
    assert warning(curve(0.0, 0.0, 0.0)) is None


def test_a_point_that_stands_twice_is_found_where_it_rises():
    points = [Point(1, 1.0, 1.0), Point(2, 1.0, 0.5), Point(1, 1.0, 1.0)]
    assert "0.5000 at step 2" in warning(points)
