"""On a CUDA device: the captured step computes what the eager one does, waits for nobody, and steps down."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import islice

import pytest
import torch

from benchmarks.step import RandomFeed, bytes_of, config_of, model_of
from benchmarks.workload import Workload
from lora_trainer.adapters.kinds import KINDS
from lora_trainer.errors import ConfigError
from lora_trainer.kernels.plain import PlainOps
from lora_trainer.models.storage import STORAGES, storage_of
from lora_trainer.training import segment as segments
from lora_trainer.training.capture import Captures
from lora_trainer.training.library import optimizer_class
from lora_trainer.training.settings import torch_settings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

WORK = Workload(batch=2, resolution=256, dropout=0.1)
WORKS = [WORK, replace(WORK, train_text_encoder=True)]


def steps(count, *, work=WORK, lr=1e-3, captured=True, **changes):
    """What `count` steps learn: the product B A of each module, and the segment's captures."""
    feed = RandomFeed(work).stream(0, pinned=True)
    model = model_of(work)
    if changes.get("mixed_precision") == "no":
        for network in filter(None, (model.unet, model.text and model.text.module)):
            network.float()
    with torch_settings(None), segments.open_segment(config_of(work, **changes), model, None) as segment:
        segment.captures.enabled &= captured
        for _ in range(count):
            _, batches = next(feed)
            segment.trainables.set_learning_rate(lr)
            for batch in batches:
                segment.forward_backward(batch)
            segment.update()
        segment.trainables.verify_views()
        graphs = segment.captures.count
        factors = [f for adapter in segment.adapters.values() for f in adapter.factors().values()]
        learned = [f.up.flatten(1) @ f.down.flatten(1) for f in factors]
    return torch.cat([product.flatten() for product in learned]), graphs


def apart(one, other):
    return ((one - other).norm() / other.norm()).item()


def ordinary(monkeypatch):
    """diffusers' and PEFT's own forwards under autocast, eagerly."""
    monkeypatch.setattr(segments, "fuse", lambda network, fused: nullcontext())
    original = segments.choose_tier

    def choose(*given):
        tier = original(*given)
        plain = {"ops": PlainOps(), "captured": False, "kernels": {}, "memory_format": torch.contiguous_format}
        return replace(tier, **plain)

    monkeypatch.setattr(segments, "choose_tier", choose)


def test_fifty_captured_steps_differ_from_ordinary_ones_as_those_do_from_each_other(monkeypatch):
    fast, graphs = steps(50, lr=2e-4)
    assert graphs == 2
    ordinary(monkeypatch)
    one, other = (steps(50, lr=2e-4)[0] for _ in range(2))
    print(f"fast against ordinary {apart(fast, one):.2e}, ordinary against itself {apart(other, one):.2e}")
    assert apart(fast, one) <= 2 * apart(other, one)


@pytest.mark.parametrize("work", WORKS)
def test_fifty_captured_steps_are_nearer_to_the_exact_ones_than_ordinary_ones(monkeypatch, work):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    fast, _ = steps(50, work=work, lr=2e-4)
    exact, _ = steps(50, work=work, lr=2e-4, mixed_precision="no")
    ordinary(monkeypatch)
    usual, _ = steps(50, work=work, lr=2e-4)
    print(f"from fp32: fast {apart(fast, exact):.2e}, ordinary {apart(usual, exact):.2e}")
    assert apart(fast, exact) <= apart(usual, exact)


def gradient(work, *, captured=True, **changes):
    """Of the third of three batches of one shape, with weights that are all at work; and how many graphs there are."""
    batches = [batch for _, (batch,) in islice(RandomFeed(work).stream(0, pinned=True), 3)]
    generator = torch.Generator("cuda").manual_seed(0)
    model = model_of(work, storage=changes.get("base_precision", "auto"))
    with torch_settings(None), segments.open_segment(config_of(work, **changes), model, None) as segment:
        segment.captures.enabled &= captured
        masters, grads = segment.trainables.masters, segment.trainables.grads
        masters.copy_(torch.randn(masters.shape, device="cuda", generator=generator).mul_(0.02))
        segment.working.refresh()
        for batch in batches:
            grads.zero_()
            segment.forward_backward(batch)
        return grads / segment.scaler.scale, segment.captures.count


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lora"])
def test_every_kind_of_adapter_is_captured_and_computes_the_same(kind):
    """With convolutions, and whole ranks and modules left out."""
    changes = {"adapter": kind, "conv_rank": 4, "rank_dropout": 0.1, "module_dropout": 0.1}
    plain, again = (gradient(WORK, captured=False, **changes)[0] for _ in range(2))
    got, graphs = gradient(WORK, **changes)
    print(f"{kind}: {apart(got, plain):.2e}, eager against itself {apart(again, plain):.2e}")
    assert plain.abs().max() > 0
    assert graphs == 1
    assert apart(got, plain) <= max(2 * apart(again, plain), 1e-3)


@pytest.mark.parametrize("work", WORKS)
def test_checkpointing_dropout_and_capture_together_change_no_gradient(work):
    plain, again = (gradient(work, captured=False)[0] for _ in range(2))
    assert plain.abs().max() > 0
    for changes in ({}, {"gradient_checkpointing": True}):
        got, graphs = gradient(work, **changes)
        print(f"{changes}: {apart(got, plain):.2e}, eager against itself {apart(again, plain):.2e}")
        assert graphs == 1
        assert apart(got, plain) <= max(2 * apart(again, plain), 1e-3), changes
        exact = [gradient(work, captured=taken, deterministic=True, **changes)[0] for taken in (False, True)]
        assert torch.equal(*exact), changes


@pytest.mark.parametrize("work", WORKS)
def test_deterministic_runs_are_equal_bit_by_bit(work):
    first, second = (steps(4, work=work, deterministic=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("work", WORKS)
def test_no_step_waits_for_the_device(work):
    feed = RandomFeed(work).stream(0, pinned=True)
    with torch_settings(None), segments.open_segment(config_of(work), model_of(work), None) as segment:
        for number in range(6):
            _, (batch,) = next(feed)
            if number == 3:
                torch.cuda.set_sync_debug_mode("error")
            try:
                segment.trainables.set_learning_rate(1e-4)
                segment.forward_backward(batch)
                segment.update()
            finally:
                if number == 5:
                    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kernels", ["triton", "plain"])
@pytest.mark.parametrize("name", STORAGES)
def test_a_base_in_fewer_bits_is_captured_computes_the_same_and_waits_for_nobody(name, kernels):
    try:
        storage_of(name, torch.device("cuda"))
    except ConfigError as error:
        pytest.skip(str(error))
    changes = {"base_precision": name, "kernels": kernels, "gradient_checkpointing": True}
    plain, again = (gradient(WORK, captured=False, **changes)[0] for _ in range(2))
    got, graphs = gradient(WORK, **changes)
    print(f"{name}, {kernels}: {apart(got, plain):.2e}, eager against itself {apart(again, plain):.2e}")
    assert plain.abs().max() > 0
    assert graphs == 1
    assert apart(got, plain) <= max(2 * apart(again, plain), 1e-3)
    feed = RandomFeed(WORK).stream(0, pinned=True)
    model = model_of(WORK, storage=name)
    assert bytes_of(model.unet) < 0.85 * bytes_of(model_of(WORK).unet)
    with torch_settings(None), segments.open_segment(config_of(WORK, **changes), model, None) as segment:
        for number in range(6):
            _, (batch,) = next(feed)
            if number == 3:
                torch.cuda.set_sync_debug_mode("error")
            try:
                segment.forward_backward(batch)
                segment.update()
            finally:
                if number == 5:
                    torch.cuda.set_sync_debug_mode("default")
        assert segment.captures.count == 2
        assert not segment.captures.reason


def test_a_frozen_text_encoder_is_captured_too():
    frozen = {"work": replace(WORK, train_text_encoder=True), "train_text_encoder": False}
    (eager, none), (again, _), (captured, graphs) = (
        steps(5, captured=taken, **frozen) for taken in (False, False, True)
    )
    print(f"captured {apart(captured, eager):.2e}, eager against itself {apart(again, eager):.2e}")
    assert (none, graphs) == (0, 2)
    assert apart(captured, eager) <= max(2 * apart(again, eager), 5e-3)


def test_memory_short_at_a_capture_is_told_and_leaves_nothing_behind():
    model = model_of(WORK)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    with torch_settings(None), segments.open_segment(config_of(WORK), model, None) as segment:
        _, (batch,) = next(RandomFeed(WORK).stream(0, pinned=True))
        segment.forward_backward(batch)
        torch.cuda.empty_cache()
        filler = torch.empty(torch.cuda.mem_get_info()[0] - 256 * 2**20, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.cuda.OutOfMemoryError):
            segment.forward_backward(batch)
        del filler
        torch.cuda.empty_cache()
        segment.forward_backward(batch)
        assert torch.isfinite(segment.trainables.grads).all()
    del segment
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= 1.01 * before


def test_a_part_that_cannot_be_captured_runs_eagerly():
    captures, x, seen = Captures(torch.device("cuda")), torch.ones(1, device="cuda"), []
    for _ in range(4):
        captures.run("part", lambda: seen.append(x.item()))
    assert seen[0] == 1
    assert len(seen) >= 4
    assert captures.count == 0
    assert captures.reason


def test_bad_numbers_never_reach_the_weights_and_nobody_waits():
    feed = RandomFeed(WORK).stream(0, pinned=True)
    with torch_settings(None), segments.open_segment(config_of(WORK), model_of(WORK), None) as segment:

        def step(*, spoil: bool = False) -> None:
            _, (batch,) = next(feed)
            if spoil:
                batch.latents.fill_(float("nan"))
            segment.trainables.set_learning_rate(1e-4)
            segment.forward_backward(batch)
            segment.update()

        for _ in range(3):
            step()
        before = {name: tensor.clone() for name, tensor in segment.live().items()}
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(spoil=True)
            snapshot = segment.snapshot()
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert segment.update.result[2] == 0
        snapshot.wait()
        for name in ("masters", "optimizer.exp_avg", "optimizer.exp_avg_sq", "optimizer.steps"):
            # The snapshot is of the moment it was taken, though later steps were under way before it had arrived.
            assert torch.equal(snapshot.copies[name], before[name].cpu()), name
            assert not torch.equal(segment.live()[name], before[name]), name
        assert snapshot.copies["scaler.scale"] == before["scaler.scale"].cpu() / 2


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema_decay": 0.9, "loss_type": "huber", "min_snr_gamma": 5},
        {"optimizer": "lion"},
        {"optimizer": "prodigy"},
        {"optimizer": "prodigyplusschedulefree"},
        {"optimizer": "adamwschedulefree"},
        {"optimizer": "came"},
        {"optimizer": "adafactor"},
    ],
    ids=lambda changes: changes.get("optimizer", "ema" if changes else "adamw"),
)
def test_a_segment_goes_on_from_a_snapshot_bit_by_bit(changes):
    config = config_of(WORK, deterministic=True, **changes)
    optimizer_class_or_skip(config)
    _, update = next(RandomFeed(WORK).stream(0, pinned=True))
    batches = update * 8

    def train(segment: segments.Segment, part: list) -> None:
        for batch in part:
            segment.trainables.set_learning_rate(1e-3)
            segment.forward_backward(batch)
            segment.update()

    # A model as borrowed is fresh each time, and always the same.
    with torch_settings(None):
        with segments.open_segment(config, model_of(WORK), None) as segment:
            train(segment, batches[:4])
            state = segment.snapshot().named()
            train(segment, batches[4:])
            assert ("update" in segment.captures._graphs) == (config.optimizer == "adamw")
            with segment.settled():
                assert torch.isfinite(segment.trainables.masters).all()
            expected = segment.trainables.masters.clone()
        with segments.open_segment(config, model_of(WORK), state) as segment:
            train(segment, batches[4:])
            assert torch.equal(segment.trainables.masters, expected)


def optimizer_class_or_skip(config):
    try:
        optimizer_class(config)
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    "changes", [{"loss_type": "smooth_l1"}, {"min_snr_gamma": 5}, {"debiased_estimation_loss": True}]
)
def test_objectives_are_the_same_captured(changes):
    """The loss of a replay is that of the same batch run eagerly."""
    work = replace(WORK, dropout=0.0)
    feed = RandomFeed(work).stream(0, pinned=True)
    batches = [batch for _, (batch,) in islice(feed, 4)]
    with torch_settings(None), segments.open_segment(config_of(work, **changes), model_of(work), None) as segment:
        for batch in batches:
            noisy = replace(batch, input_eps=batch.eps + 0.1 * torch.randn_like(batch.eps)).pinned()
            segment.update.loss.zero_()
            segment.forward_backward(noisy)
            captured = segment.update.loss.item()
            static = noisy.like(segment.captures.device)
            static.copy_(noisy)
            with torch.no_grad():
                eager = (segment.network.losses(static) * static.weight).sum().item()
            assert captured == pytest.approx(eager, rel=2e-2)
        assert segment.captures.count == 1
