"""LoRA dropout: the same masks whoever asks, also through gradient checkpointing."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_trainer.training import randomness
from lora_trainer.training.dropout import LoraDropout, Shares


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down, self.up, self.conv = nn.Linear(6, 4), nn.Linear(4, 6), nn.Conv2d(3, 2, 1)

    def forward(self, x):
        y = self.up(self.down(x)).relu()
        return y.sum() + self.conv(y.reshape(x.shape[0], 3, 2, -1)).square().sum()


def setup(dropout=0.3):
    net = Net()
    return net, LoraDropout({"down": net.down, "conv": net.conv}, Shares(dropout))


def gradients(net, drop, x, keys, run=lambda f, x: f(x)):
    net.zero_grad()
    shape = tuple(x.shape)
    if not drop.knows(shape):
        with torch.no_grad(), drop.recording(shape, keys):
            net(x)
    with drop.masks(shape, keys):
        run(net, x).backward()
    return [p.grad.clone() for p in net.parameters()]


def test_masks_are_applied_and_scaled():
    net, drop = setup()
    x, keys = torch.ones(8, 5, 6), randomness.mask_keys(0, range(8))
    outs = []
    net.down.register_forward_hook(lambda m, a, out: outs.append(out.detach()))
    gradients(net, drop, x, keys)
    masked, plain = outs[1], outs[0]
    kept = masked != 0
    assert 0.5 < kept.float().mean() < 0.9
    torch.testing.assert_close(masked[kept], plain[kept] / 0.7)


def test_gradients_repeat_and_survive_checkpointing():
    net, drop = setup()
    x, keys = torch.randn(4, 5, 6), randomness.mask_keys(0, [3, 1, 4, 1])
    first = gradients(net, drop, x, keys)
    again = gradients(net, drop, x, keys)
    recomputed = gradients(
        net, drop, x, keys, lambda f, x: checkpoint(f, x, use_reentrant=False, preserve_rng_state=False)
    )
    other = gradients(net, drop, x, randomness.mask_keys(0, [5, 6, 7, 8]))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, recomputed, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_samples_masks_do_not_depend_on_its_batch():
    net, drop = setup()
    x = torch.randn(4, 5, 6)
    whole = gradients(net, drop, x, randomness.mask_keys(0, [0, 1, 2, 3]))
    parts = [gradients(net, drop, x[i : i + 1], randomness.mask_keys(0, [i])) for i in range(4)]
    for index, gradient in enumerate(whole):
        torch.testing.assert_close(gradient, sum(part[index] for part in parts), rtol=1e-4, atol=1e-5)


def test_no_dropout_outside_or_after_removal():
    net, drop = setup()
    x, keys = torch.randn(2, 5, 6), randomness.mask_keys(0, range(2))
    plain = Net()(x)
    gradients(net, drop, x, keys)
    assert torch.equal(net(x), plain)
    drop.remove()
    assert not net.down._forward_hooks
