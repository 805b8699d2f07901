from __future__ import annotations

import torch

from lora_trainer.training import randomness


def test_draws_depend_on_seed_purpose_and_visit_alone():
    before = torch.get_rng_state()
    rows = randomness.normal(7, "noise", [3, 9], (4, 2, 2))
    again = randomness.normal(7, "noise", [9, 1, 3], (4, 2, 2))
    assert torch.equal(rows[0], again[2])
    assert torch.equal(rows[1], again[0])
    assert not torch.equal(rows[0], randomness.normal(8, "noise", [3], (4, 2, 2))[0])
    assert not torch.equal(rows[0], randomness.normal(7, "latents", [3], (4, 2, 2))[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_timesteps_are_uniform():
    t = randomness.timesteps(0, range(20_000), 1000)
    assert t.min() == 0
    assert t.max() == 999
    counts = torch.bincount(t // 100, minlength=10).float()
    assert (counts - 2000).abs().max() < 200  # 4.7 standard deviations


def test_keep_mask_keeps_the_right_share_and_repeats():
    keys = randomness.mask_keys(1, range(8))
    keep = randomness.keep_mask(keys, 50_000, 0.1)
    assert abs(keep.float().mean().item() - 0.9) < 0.002
    assert torch.equal(keep[5:6, :777], randomness.keep_mask(keys[5:6], 777, 0.1))


def test_keep_masks_of_visits_and_neighbours_are_independent():
    """The correlation of masks of different visits, and of one mask with itself shifted, is noise."""
    keep = randomness.keep_mask(randomness.mask_keys(3, range(40)), 4096, 0.5).float() - 0.5
    visits = (keep @ keep.T / 4096 * 4).fill_diagonal_(0).abs().max()
    shifts = max((keep[:, k:] * keep[:, :-k]).mean(1).abs().max() * 4 for k in (1, 2, 8, 64, 1024))
    assert visits < 0.09
    assert shifts < 0.1
