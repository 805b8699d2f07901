"""Drawing in latents, and other latents that are shown along with it."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from lora_trainer.models.noise import NoiseSchedule, scaled_linear
from lora_trainer.training.looks import answer, drawn

STEPS = 4


@pytest.fixture
def network():
    """Whose answer to each latent depends on it, on the timestep and on what is told of it."""

    def unet(x, times, bias, return_dict):
        return (0.1 * x.flip(1) + (times / 1000 + bias).view(-1, 1, 1, 1),)

    return SimpleNamespace(
        unet=unet,
        noise=NoiseSchedule(scaled_linear(0.00085, 0.012, 1000), "epsilon"),
        precision=SimpleNamespace(autocast=nullcontext),
        memory_format=torch.contiguous_format,
    )


def test_what_is_shown_beside_is_answered_as_if_alone_and_changes_no_drawing(network):
    others, x = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0)).split([2, 3])
    own, told = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5])
    alone = drawn(network, x, {"bias": own}, STEPS)
    along = drawn(network, others, {"bias": told}, STEPS)
    both = drawn(network, x, {"bias": torch.cat([told, own])}, STEPS, along.shown)
    assert torch.equal(both.latents, alone.latents)
    assert not torch.equal(alone.latents, x)
    times = [751, 501, 251, 1]
    assert len(both.shown) == len(both.answered) == STEPS
    for t, shown, answered, before in zip(times, both.shown, both.answered, along.answered, strict=True):
        assert torch.equal(answered[:2], before)
        assert torch.equal(answered, answer(network, shown, t, {"bias": torch.cat([told, own])}))
