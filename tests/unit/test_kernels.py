"""The fused operations against what autograd makes of the plain formulas; the Triton ones in Triton's interpreter."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_trainer.kernels.plain import LoraLinear, PlainOps
from lora_trainer.kernels.site import Draw, Site
from lora_trainer.training import randomness

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def half() -> torch.dtype:
    """fp16, or fp32 where torch has no half-precision products on this device (torch 2.1 on a CPU)."""
    x = torch.ones(2, 32, 1, 1, device=DEVICE, dtype=torch.float16)
    try:
        F.group_norm(F.linear(x.flatten(1), x.flatten(1)[:, :32]).view(2, 2, 1, 1), 1)
    except RuntimeError:
        return torch.float32
    return torch.float16


HALF = half()


def triton_ops():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no triton here")
    from lora_trainer.kernels.triton_ops import TritonOps

    return TritonOps()


@pytest.fixture(params=["plain", "triton"])
def ops(request):
    return PlainOps() if request.param == "plain" else triton_ops()


def rand(*shape, seed=0, dtype=HALF):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def site(fan_in, fan_out, rank, *, batch, rows, dropout=0.0, direct=True, dtype=HALF, scale=2.0):
    """A site with random weights and zero gradients, its masters in `dtype`."""
    down, up = rand(rank, fan_in, dtype=dtype) / fan_in**0.5, rand(rank, fan_out, seed=1, dtype=dtype).t() / rank**0.5
    grad = torch.float32 if direct and dtype == HALF else dtype
    keys, offset = randomness.mask_keys(0, range(batch)).to(DEVICE), 48
    entries = rows // batch * rank
    mask = randomness.keep_mask(keys, offset + entries, dropout or 0.5)[:, offset:].reshape(rows, rank)
    draw = Draw(keys, offset, dropout, lambda: mask.to(dtype) / (1 - dropout)) if dropout else None
    return Site(
        down=down,
        up=up,
        grad_down=torch.zeros(rank, fan_in, device=DEVICE, dtype=grad),
        grad_up=torch.zeros(rank, fan_out, device=DEVICE, dtype=grad).t(),
        parameters=(nn.Parameter(down.clone()), nn.Parameter(up.clone())),
        scale=lambda: scale,
        draw=lambda rows: draw,
    )


def reference(x, weight, bias, site, residual=None):
    """The plain formula in float64, with autograd through A and B; (y, A, B)."""
    down, up = (p.detach().double().requires_grad_() for p in site.parameters)
    draw = site.draw(x.shape[0])
    low = x @ down.t() * site.scale()
    low = low if draw is None else low * draw.mask().double()
    y = F.linear(x, weight.double(), None if bias is None else bias.double()) + low @ up.t()
    return (y if residual is None else y + residual), down, up


def close(got, expected, tolerance=3e-3):
    error = (got.double() - expected).norm() / expected.norm().clamp(min=1e-12)
    assert error < tolerance, error


@pytest.mark.parametrize(
    ("rows", "fan_in", "fan_out", "rank"), [(64, 64, 96, 8), (2 * 77, 48, 64, 4), (130, 80, 208, 16), (32, 64, 64, 20)]
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("residual", [False, True])
def test_lora_linear(ops, rows, fan_in, fan_out, rank, dropout, residual):
    s = site(fan_in, fan_out, rank, batch=2, rows=rows, dropout=dropout, direct=not ops.collects)
    x, weight, bias = rand(rows, fan_in), rand(fan_out, fan_in) / fan_in**0.5, rand(fan_out)
    added = rand(rows, fan_out, seed=3) if residual else None
    dy = rand(rows, fan_out, seed=2)
    inputs = [t.double().requires_grad_() for t in (x, added) if t is not None]
    expected, down, up = reference(inputs[0], weight, bias, s, inputs[1] if residual else None)
    expected.backward(dy.double())
    given = [t.clone().requires_grad_() for t in (x, added) if t is not None]
    got = ops.lora_linear(given[0], weight, bias, s, given[1] if residual else None)
    got.backward(dy)
    close(got, expected)
    for mine, theirs in zip(given, inputs, strict=True):
        close(mine.grad, theirs.grad)
    close(s.grad_down, down.grad)
    close(s.grad_up, up.grad)
    assert all(p.grad is None for p in s.parameters)


def test_gradients_add_up_and_a_frozen_input_has_none(ops):
    s = site(64, 64, 8, batch=2, rows=64, dropout=0.3, direct=not ops.collects)
    x, weight = rand(64, 64), rand(64, 64) / 8
    expected, down, up = reference(x.double(), weight, None, s)
    expected.sum().backward()
    for _ in range(2):
        ops.lora_linear(x, weight, None, s).sum().backward()
    times = 1 if ops.collects and torch.float16 == HALF else 2
    close(s.grad_down, times * down.grad)
    close(s.grad_up, times * up.grad)


def test_the_fused_function_in_float64():
    s = site(6, 5, 2, batch=2, rows=4, dropout=0.4, dtype=torch.float64)
    x, weight, bias = (rand(*shape, dtype=torch.float64) for shape in ((4, 6), (5, 6), (5,)))
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: LoraLinear.apply(x, weight, bias, s, *s.parameters), (x,))
    s.grad_down.zero_(), s.grad_up.zero_()
    dy = rand(4, 5, dtype=torch.float64)
    LoraLinear.apply(x, weight, bias, s, *s.parameters).backward(dy)
    expected, down, up = reference(x.detach(), weight, bias, s)
    expected.backward(dy)
    torch.testing.assert_close(s.grad_down, down.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(s.grad_up, up.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 64, 4, 4), (1, 320, 17, 16), (2, 96, 18, 17)])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
def test_group_norm(ops, shape, silu, shifted):
    batch, channels = shape[:2]
    norm = nn.GroupNorm(32, channels).to(DEVICE, HALF).requires_grad_(False)
    norm.weight.copy_(1 + rand(channels) / 4)
    norm.bias.copy_(rand(channels) / 4)
    x = (rand(*shape) + 3).contiguous(memory_format=torch.channels_last)
    shift = rand(batch, channels) if shifted else None
    mine, theirs = x.clone(memory_format=torch.preserve_format).requires_grad_(), x.double().requires_grad_()
    y, passed = ops.group_norm(mine, norm, silu=silu, shift=shift)
    assert y.is_contiguous(memory_format=torch.channels_last)
    moved = theirs if shift is None else theirs + shift.double()[:, :, None, None]
    expected = F.group_norm(moved, 32, norm.weight.double(), norm.bias.double(), norm.eps)
    expected = F.silu(expected) if silu else expected
    dy, residual = rand(*shape, seed=1), rand(*shape, seed=2)
    ((y * dy).float().sum() + (passed * residual).float().sum()).backward()
    ((expected * dy.double()).sum() + (theirs * residual.double()).sum()).backward()
    close(y, expected, 5e-3)
    close(mine.grad, theirs.grad, 5e-3)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_plain_group_norm_in_float64(layout):
    """Of both layouts, and with a shift that is learned."""
    norm = nn.GroupNorm(2, 4, dtype=torch.float64).to(DEVICE).requires_grad_(False)
    norm.weight.copy_(1 + rand(4) / 4)
    x, shift = rand(2, 4, 3, 2, dtype=torch.float64), rand(2, 4, dtype=torch.float64)
    given = (x.contiguous(memory_format=layout).requires_grad_(), shift.requires_grad_())
    for silu in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, s, silu=silu: PlainOps().group_norm(x, norm, silu=silu, shift=s), given
        )
        assert torch.autograd.gradcheck(lambda x, silu=silu: PlainOps().group_norm(x, norm, silu=silu), given[:1])


@pytest.mark.parametrize("width", [64, 320])
def test_layer_norm(ops, width):
    norm = nn.LayerNorm(width).to(DEVICE, HALF).requires_grad_(False)
    norm.weight.copy_(1 + rand(width) / 4)
    norm.bias.copy_(rand(width) / 4)
    x = rand(2, 7, width) + 1
    mine, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    y, passed = ops.layer_norm(mine, norm)
    expected = F.layer_norm(theirs, (width,), norm.weight.double(), norm.bias.double(), norm.eps)
    dy, residual = rand(2, 7, width, seed=1), rand(2, 7, width, seed=2)
    ((y * dy).float().sum() + (passed * residual).float().sum()).backward()
    ((expected * dy.double()).sum() + (theirs * residual.double()).sum()).backward()
    close(y, expected)
    close(mine.grad, theirs.grad)


def test_geglu_and_add(ops):
    x = rand(12, 2 * 72)
    mine, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    dy = rand(12, 72, seed=1)
    got, (value, gate) = ops.geglu(mine), theirs.chunk(2, dim=-1)
    expected = value * F.gelu(gate)
    got.backward(dy)
    expected.backward(dy.double())
    close(got, expected)
    close(mine.grad, theirs.grad)

    a, b = (rand(2, 24, 5, 4, seed=n).contiguous(memory_format=torch.channels_last).requires_grad_() for n in (1, 2))
    bias = rand(24)
    y = ops.add(a, bias, b)
    close(y, a.double() + bias.double()[None, :, None, None] + b.double())
    y.sum().backward()
    assert (a.grad == 1).all()
    assert (b.grad == 1).all()
