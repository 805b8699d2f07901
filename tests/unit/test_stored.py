"""Frozen weights in fewer bits: what is stored, and what is computed with it."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_trainer.config import build
from lora_trainer.errors import ConfigError
from lora_trainer.kernels.plain import PlainOps
from lora_trainer.models.single_file import model_of, place
from lora_trainer.models.storage import STORAGES, Storage, storage_of
from lora_trainer.models.stored import Stored, dense, stored_in
from lora_trainer.training.segment import open_segment
from tests.unit import test_kernels
from tests.unit.test_fused import one_step

CPU = torch.device("cpu")
# What rounding takes of normally distributed weights, of their norm, and bits a weight of wide matrices.
ROUNDED = {"fp8": (0.02, 0.04, 8.0), "int8": (0.003, 0.01, 8.1), "nf4": (0.07, 0.11, 4.5)}


@pytest.fixture(params=STORAGES)
def storage(request) -> Storage:
    """Each that works here; what does not is another test's."""
    try:
        return storage_of(request.param, CPU)
    except ConfigError as error:
        pytest.skip(str(error))


def weight_of(*shape: int, std: float = 0.05) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * std


def test_rounding_and_size(storage):
    weight = weight_of(640, 320)
    stored = Stored.encode(weight, storage)
    low, high, bits = ROUNDED[storage.name]
    assert low < ((stored.decoded() - weight).norm() / weight.norm()).item() < high
    assert stored.stored_bytes * 8 <= bits * weight.numel()
    assert (stored.shape, stored.dtype, stored.device) == (weight.shape, weight.dtype, weight.device)


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_the_codes_are_those_of_bitsandbytes(name):
    functional = pytest.importorskip("bitsandbytes").functional
    weight = weight_of(128, 64)
    stored = Stored.encode(weight, STORAGES[name])
    if name == "int8":
        expected = functional.int8_vectorwise_dequant(*functional.int8_vectorwise_quant(weight.half())[:2])
    else:
        expected = functional.dequantize_4bit(*functional.quantize_4bit(weight, blocksize=64, quant_type="nf4"))
    torch.testing.assert_close(stored.decoded(), expected, rtol=1e-6, atol=0)


def test_fp8_is_the_plain_cast_and_does_not_overflow():
    weight = weight_of(64, 64)
    weight[0, 0] = 1e4
    decoded = Stored.encode(weight, STORAGES["fp8"]).decoded()
    expected = weight.to(torch.float8_e4m3fn).float()
    expected[0, 0] = 448
    assert torch.equal(decoded, expected)


@pytest.mark.parametrize("shape", [(5, 64), (2, 5, 64)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_is_that_of_the_decoded_weight_which_nobody_keeps(storage, shape, biased):
    stored = nn.Parameter(Stored.encode(weight_of(96, 64), storage), requires_grad=False)
    plain, bias = stored.decoded(), torch.randn(96) if biased else None
    x, given = (torch.ones(shape).cumsum(0).requires_grad_() for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = F.linear(x, stored, bias)
    expected = F.linear(given, plain, bias)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(x.grad, given.grad)
    assert [type(tensor) for tensor in kept if tensor.numel() == stored.numel()] == [Stored]


def test_a_convolution_of_single_pixels_too(storage):
    weight = weight_of(96, 64)
    stored = Stored.encode(weight[..., None, None], storage)
    assert torch.equal(stored.view(96, 64), Stored.encode(weight, storage).decoded())
    x, given = (torch.ones(1, 64, 4, 4).cumsum(2).requires_grad_() for _ in range(2))
    y, expected = F.conv2d(x, stored), F.conv2d(given, stored.decoded())
    assert torch.equal(y, expected)
    y.sum().backward()
    expected.sum().backward()
    assert torch.equal(x.grad, given.grad)


def test_other_forms_share_the_codes(storage):
    stored = Stored.encode(weight_of(96, 64), storage)
    plain = stored.decoded()
    turned, cast, viewed = stored.t(), stored.to(torch.bfloat16), stored.view(96, 64, 1, 1).flatten(1)
    for form in (turned, turned.t(), cast, viewed, stored.detach(), stored.transpose(0, 1)):
        assert isinstance(form, Stored)
        assert all(one is other for one, other in zip(form.codes, stored.codes, strict=True))
    assert torch.equal(dense(turned), plain.t())
    assert turned.stride() == plain.t().stride()
    assert torch.equal(dense(cast), storage.decode(stored.codes, stored.whole, torch.bfloat16))
    assert torch.equal(stored.float().norm(), plain.norm())
    assert dense(plain) is plain


@pytest.mark.parametrize("write", [lambda w: w.mul_(2), lambda w: w.copy_(w), lambda w: torch.zeros(96, 64, out=w)])
def test_nothing_writes_to_it(storage, write):
    stored = Stored.encode(weight_of(96, 64), storage)
    before = stored.decoded()
    with pytest.raises(RuntimeError, match="frozen weight in storage"):
        write(stored)
    assert torch.equal(stored.decoded(), before)


@pytest.mark.parametrize("ops", ["plain", "triton"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_the_fused_linear_is_the_one_of_the_decoded_weight(storage, ops, dropout):
    """Its output and all its gradients, number by number."""
    computing = PlainOps() if ops == "plain" else test_kernels.triton_ops()
    found = []
    for decode in (False, True):
        site = test_kernels.site(64, 96, 4, batch=2, rows=10, dropout=dropout, direct=ops == "triton")
        stored = Stored.encode(weight_of(96, 64).to(site.dtype), storage)
        x = weight_of(10, 64, std=1).to(site.dtype).requires_grad_()
        computing.lora_linear(x, dense(stored) if decode else stored, None, site).square().sum().backward()
        found.append((x.grad, site.grad_down, site.grad_up))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert all(gradient.abs().sum() > 0 for gradient in found[0])


def opened(checkpoint, storage, *, decode: bool, **settings):
    """A segment on a base in `storage`, or on what that decodes to."""
    family, state = place(checkpoint, CPU, torch.float32, storage=storage)
    if decode:
        state = {name: dense(tensor) for name, tensor in state.items()}
    model = model_of(state, family, checkpoint, device=CPU, hashes=lambda: None)
    assert bool(stored_in(model.unet)) != decode
    config = build({"base_model": "tiny", "train_data_dir": "x", "mixed_precision": "no"}, settings)
    return open_segment(config, model, None)


@pytest.mark.parametrize(
    "settings",
    [
        {"adapter": "lora", "conv_rank": 2},
        {"adapter": "dora"},
        {"adapter": "loha", "lora_dropout": 0.0},
        {"adapter": "lokr", "lora_dropout": 0.0, "gradient_checkpointing": True},
        {"gradient_checkpointing": True, "lora_dropout": 0.3},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_a_step_is_the_one_on_the_decoded_base(checkpoint, storage, settings):
    found = []
    for decode in (False, True):
        with opened(checkpoint, storage, decode=decode, **settings) as segment:
            found.append(one_step(segment))
            assert segment.base_count > 600_000
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][1].any()


def test_what_is_stored_are_the_transformers_matrices(checkpoint, storage):
    _, state = place(checkpoint, CPU, torch.float32, storage=storage)
    stored = {name for name, tensor in state.items() if isinstance(tensor, Stored)}
    parts = ("attn1.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
    assert all(any(name.endswith(f"{part}.weight") for name in stored) for part in parts)
    assert not [name for name in stored if "transformer_blocks" not in name and ".proj_" not in name]
    assert not [name for name in stored if not name.startswith("model.diffusion_model.")]
    assert all(state[name].dim() == 2 or state[name].shape[2:] == (1, 1) for name in stored)
    # Four transformers, each of 10 matrices and two projections.
    assert len(stored) == 4 * 12


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_without_bitsandbytes_one_line_says_so(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError) as raised:
        storage_of(name, CPU)
    assert str(raised.value).count("\n") == 0
    assert f"base_precision: {name} needs the package bitsandbytes, which is not installed" in str(raised.value)
    assert "`pip install bitsandbytes`, or base_precision=fp8" in str(raised.value)
