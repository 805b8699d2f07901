"""The flat buffers, the optimizer, the scaler and the schedules."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from lora_trainer.training.optimizers import AdamWSettings, FlatAdamW
from lora_trainer.training.precision import LossScaler, resolve
from lora_trainer.training.settings import WORKSPACE, fast_or_repeatable
from lora_trainer.training.snapshot import Snapshot, restore
from lora_trainer.training.trainables import Trainables

CPU = torch.device("cpu")


def layers():
    torch.manual_seed(0)
    return nn.Linear(5, 3), nn.Linear(3, 7)


def flat(first, second):
    return Trainables({"a": [("first", first, "weight")], "b": [("second", second, "weight")]})


def test_parameters_and_gradients_are_views_that_survive_training():
    first, second = layers()
    before = first.weight.detach().clone()
    trainables = flat(first, second)
    assert torch.equal(first.weight, before)
    for _ in range(2):
        second(first(torch.ones(2, 5))).sum().backward()
        trainables.verify_views()
    first.weight.grad.zero_()
    assert trainables.grads[: trainables.groups[0].stop].abs().sum() == 0
    assert trainables.grads.abs().sum() > 0
    assert trainables.count == 5 * 3 + 3 * 7
    first.half()
    with pytest.raises(RuntimeError, match="first no longer is a view"):
        trainables.verify_views()


def test_a_snapshot_goes_back_by_parameter_whatever_the_layout():
    one, other = (
        flat(*layers()),
        Trainables({"b": [("second", layers()[1], "weight")], "a": [("first", layers()[0], "weight")]}),
    )
    live = {"masters": one.masters, "steps": torch.tensor(3.0)}
    one.masters.add_(1)
    snapshot = Snapshot.of(live, one.slots)
    kept = {slot.name: one.of(one.masters, slot).clone() for slot in one.slots}
    one.masters.add_(1)
    steps = torch.zeros(())
    restore(snapshot.named(), {"masters": other.masters, "steps": steps}, other.slots)
    assert steps == 3
    assert all(torch.equal(other.of(other.masters, slot), kept[slot.name]) for slot in other.slots)


@pytest.mark.parametrize("fused", [True, False])
def test_flat_adamw_is_torchs_adamw(fused):
    reference, mine = layers(), layers()
    torch_adamw = torch.optim.AdamW([layer.weight for layer in reference], lr=1e-2, weight_decay=0.1)
    trainables = flat(*mine)
    optimizer = FlatAdamW(trainables, AdamWSettings(weight_decay=0.1))
    if fused and not optimizer.fused:
        pytest.skip("this torch has no fused AdamW here")
    optimizer.fused = fused
    trainables.set_learning_rate(1e-2)
    for step in range(20):
        for first, second in (reference, mine):
            (second(first(torch.full((2, 5), 1.0 + step))).square().mean()).backward()
        torch_adamw.step()
        torch_adamw.zero_grad()
        optimizer.step(trainables, torch.zeros(()))
        trainables.grads.zero_()
    for expected, got in zip(reference, mine, strict=True):
        torch.testing.assert_close(got.weight, expected.weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fused", [True, False])
def test_a_bad_step_changes_nothing(fused):
    trainables = flat(*layers())
    optimizer = FlatAdamW(trainables, AdamWSettings())
    if fused and not optimizer.fused:
        pytest.skip("this torch has no fused AdamW here")
    optimizer.fused = fused
    trainables.set_learning_rate(1e-2)
    trainables.grads.fill_(0.5)
    optimizer.step(trainables, torch.zeros(()))
    before = {name: value.clone() for name, value in optimizer.live().items()} | {"masters": trainables.masters.clone()}
    trainables.grads[3] = float("nan")
    trainables.grads[4] = float("inf")
    optimizer.step(trainables, torch.ones(()))
    after = optimizer.live() | {"masters": trainables.masters}
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_loss_scaler_halves_on_bad_and_doubles_after_a_good_run():
    scaler = LossScaler(CPU, enabled=True)
    start = scaler.scale.item()
    scaler.update(torch.ones(()))
    assert scaler.scale.item() == start / 2
    for _ in range(LossScaler.INTERVAL):
        scaler.update(torch.zeros(()))
    assert scaler.scale.item() == start
    off = LossScaler(CPU, enabled=False)
    off.update(torch.ones(()))
    assert off.scale.item() == 1


def test_fp16_on_a_cpu_is_said():
    precision, notice = resolve("fp16", CPU)
    assert precision.compute == torch.float32
    assert "fp16" in notice
    assert resolve("bf16", CPU) == (type(precision)(CPU, torch.bfloat16), None)


def test_repeatable_algorithms_are_asked_for_only_inside(monkeypatch):
    monkeypatch.delenv(WORKSPACE, raising=False)
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic

    def fail() -> None:
        with fast_or_repeatable(deterministic=True):
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.backends.cudnn.deterministic
            assert os.environ[WORKSPACE]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not torch.are_deterministic_algorithms_enabled()
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic) == before
    assert WORKSPACE not in os.environ
    with fast_or_repeatable(deterministic=False):
        assert torch.backends.cudnn.benchmark
        assert not torch.are_deterministic_algorithms_enabled()
