"""Runs on a base in fewer bits: what they learn, what the base takes, what their files say, and when they choose it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from lora_trainer.config import build
from lora_trainer.errors import ConfigError
from lora_trainer.events import Finished, Forecast, Notice, StepDone
from lora_trainer.hosts.standalone import host_of
from lora_trainer.models import single_file
from lora_trainer.models.checkpoint import read_header
from lora_trainer.models.storage import LIGHTER, STORAGES, lighter_than, storage_of
from lora_trainer.models.stored import Stored, stored_in
from lora_trainer.training import planning
from lora_trainer.training.planning import OutOfMemoryError
from lora_trainer.training.run import run
from lora_trainer.training.states import FOLDER
from tests.unit.test_forecast import FakeGpu, told
from tests.unit.test_learns_the_demo import world
from tests.unit.test_run import of

__all__ = ["world"]

CPU = torch.device("cpu")
# How far the losses of steps (the same pictures, noise and timesteps) are from those on the base itself, on average:
# about twice what was seen.
APART = {"fp8": 0.025, "int8": 0.007, "nf4": 0.1}


def works(name: str) -> bool:
    try:
        storage_of(name, CPU)
    except ConfigError:
        return False
    return True


HERE = [name for name in STORAGES if works(name)]
needs_nf4 = pytest.mark.skipif("nf4" not in HERE, reason="needs bitsandbytes")


def train(settings, *, at=lambda event: None, resumes=False, **changes):
    """(events, the published file or None), on a host of the command line."""
    config, events = build(settings, changes), []

    def sink(event) -> None:
        events.append(event)
        at(event)

    finished = run(config, host_of(config), sink, clock=lambda: 1.7e9, resumes=resumes)
    return events, Path(finished.output[0]) if finished.output else None


def losses(events) -> torch.Tensor:
    return torch.tensor([event.loss for event in of(events, StepDone)])


@pytest.fixture(scope="module")
def plain(world):
    return train(world[0] | {"overwrite": True, "learning_rate": 2e-3, "loraplus_lr_ratio": 1})[0]


@pytest.mark.parametrize("name", HERE)
def test_the_demo_is_learned_nearly_as_on_the_base_itself(world, plain, name):
    events, file = train(
        world[0] | {"overwrite": True, "learning_rate": 2e-3, "loraplus_lr_ratio": 1}, base_precision=name
    )
    (finished,) = of(events, Finished)
    assert finished.validation_lora < 0.99 * finished.validation_base
    apart = ((losses(events) - losses(plain)).abs() / losses(plain)).mean().item()
    held_out = finished.validation_lora / of(plain, Finished)[0].validation_lora - 1
    print(f"{name}: {apart:.2%} apart, held out {held_out:+.2%}")
    assert 0 < apart < APART[name]
    assert abs(held_out) < APART[name]
    (text,) = told(events, "base: ")
    assert f"are kept in {name}" in text
    header = read_header(file)["__metadata__"]
    assert header["ss_base_precision"] == name
    assert json.loads(header["lora_trainer_config"])["base_precision"] == name
    assert header.get("ss_fp8_base_unet") == ("True" if name == "fp8" else None)


@pytest.mark.parametrize("name", HERE)
def test_the_placed_base_takes_less_and_nothing_else_is_kept(checkpoint, name):
    def bytes_of(storage):
        _, state = single_file.place(checkpoint, CPU, torch.float16, storage=storage)
        unet = [tensor for key, tensor in state.items() if key.startswith("model.diffusion_model.")]
        matrices = [tensor for key, tensor in state.items() if single_file.is_matrix(key, tensor)]
        return sum(map(taken, unet)), sum(map(taken, matrices))

    def taken(tensor):
        return tensor.stored_bytes if isinstance(tensor, Stored) else tensor.numel() * tensor.element_size()

    (whole, matrices), (less, stored) = bytes_of(None), bytes_of(storage_of(name, CPU))
    assert whole - less == matrices - stored
    # Of 16 bits a weight; the tiny rows' scales weigh more than real ones'.
    assert stored / matrices < {"fp8": 0.501, "int8": 0.57, "nf4": 0.29}[name]


@pytest.mark.parametrize("name", HERE)
def test_with_a_trained_text_encoder_and_saved_in_the_same_form(settings, name):
    def header(base):
        return read_header(train(settings, base_precision=base, train_text_encoder=True, overwrite=True)[1])

    plain, stored = header("auto"), header(name)
    assert plain["__metadata__"]["sshs_model_hash"] != stored["__metadata__"]["sshs_model_hash"]
    assert {key: entry for key, entry in plain.items() if key != "__metadata__"} == {
        key: entry for key, entry in stored.items() if key != "__metadata__"
    }


def test_the_same_run_twice_writes_the_same_bytes(settings):
    one, other = (train(settings, base_precision="fp8", overwrite=True)[1].read_bytes() for _ in range(2))
    assert one == other


def test_what_is_not_installed_is_said_before_anything_is_read(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="base_precision: nf4 needs the package bitsandbytes, which is not installed"):
        train(settings, base_precision="nf4", base_model="nowhere.safetensors")
    assert lighter_than("auto", CPU) == ("fp8",)
    assert lighter_than("fp8", CPU) == ()


@pytest.fixture
def imagine(monkeypatch):
    def put(gpu: FakeGpu) -> FakeGpu:
        monkeypatch.setattr(planning, "gpu_of", lambda device: gpu)
        return gpu

    return put


@needs_nf4
def test_a_base_in_fewer_bits_is_the_last_to_be_given_up(settings, imagine):
    imagine(FakeGpu(9.5, 9.3, 9.2, 9.1, 5))
    events, file = train(settings, gradient_checkpointing=True)
    assert [text.removeprefix("step 1: ") for text in told(events, "goes on with")][-2:] == [
        "needs 9.2 of 8.0 GB, goes on with gradient checkpointing of all blocks, batches in 2 parts, the base in fp8",
        "needs 9.1 of 8.0 GB, goes on with gradient checkpointing of all blocks, batches in 2 parts, the base in nf4",
    ]
    assert len(of(events, Forecast)) == 1
    assert read_header(file)["__metadata__"]["ss_base_precision"] == "nf4"
    assert [event.step for event in of(events, StepDone)] == [1, 2, 3, 4, 5, 6]


def test_without_auto_fit_it_is_only_proposed(settings, imagine, monkeypatch):
    imagine(FakeGpu(9.5))
    events, file = train(settings, auto_fit=False, gradient_checkpointing=True, batch_size=1)
    assert "goes on" not in " ".join(notice.text for notice in of(events, Notice))
    assert "ss_base_precision" not in read_header(file)["__metadata__"]
    plan = planning.Planning(build(settings, {"auto_fit": False}), events.append, lambda storage: LIGHTER[storage])
    plan.go_on_with(2, 2, "auto")
    with pytest.raises(OutOfMemoryError, match="auto_fit: true, which goes on with .*the base in fp8"):
        plan.step_down(3)
    with pytest.raises(OutOfMemoryError, match="while preparing.* base_precision=fp8 or auto_fit: true"):
        plan.store_lighter("while preparing")


def test_a_base_that_does_not_fit_itself_is_placed_in_fewer_bits(settings, monkeypatch):
    read, placed = single_file.read_tensors, []

    def short(path, device, dtype_of, stored):
        placed.append(isinstance(stored("model.diffusion_model.x.proj_in.weight", torch.ones(2, 2)), Stored))
        if len(placed) == 1:
            raise torch.cuda.OutOfMemoryError("by the test")
        return read(path, device, dtype_of, stored)

    monkeypatch.setattr(single_file, "read_tensors", short)
    events, file = train(settings)
    assert placed == [False, True]
    assert told(events, "out of memory") == ["out of memory while placing the base model: goes on with the base in fp8"]
    assert read_header(file)["__metadata__"]["ss_base_precision"] == "fp8"


class KilledError(BaseException):
    pass


def test_a_resumed_run_goes_on_with_the_base_it_came_to(settings, imagine):
    """And writes what it would have written."""
    settings = settings | {"checkpoint_every": 2, "overwrite": True, "gradient_checkpointing": True, "batch_size": 1}
    settings["max_train_steps"] = 6
    peaks = (9.5, 9.4, 5)
    imagine(FakeGpu(*peaks))
    expected = train(settings, output_dir=settings["output_dir"] + "/undisturbed")[1].read_bytes()

    def killed(event) -> None:
        if isinstance(event, StepDone) and event.step == 5:
            raise KilledError

    imagine(FakeGpu(*peaks))
    with pytest.raises(KilledError):
        train(settings, at=killed)
    assert list((Path(settings["output_dir"]) / FOLDER).rglob("step00000004.safetensors"))
    imagine(FakeGpu(5))
    events, file = train(settings, resumes=True)
    assert told(events, "goes on from step 4")
    assert told(events, "are kept in fp8")
    assert weights(file.read_bytes()) == weights(expected)


def weights(data: bytes) -> bytes:
    return data[8 + int.from_bytes(data[:8], "little") :]


def test_each_borrowing_has_the_storage_that_was_asked_for(settings):
    models = host_of(build(settings)).models
    for asked, found in (("auto", None), ("fp8", "fp8"), (None, "fp8"), ("auto", None)):
        with models.borrow(asked) as model:
            stored = stored_in(model.unet)
            assert (stored[0].storage.name if stored else None) == found
