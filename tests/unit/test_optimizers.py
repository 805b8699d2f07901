"""Optimizers of other packages: they learn, leave bad steps out, go on from a state, and are imported on demand."""

from __future__ import annotations

import importlib
import json
import math
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_trainer.adapters.load import read_lora
from lora_trainer.config import build
from lora_trainer.config.export import to_header
from lora_trainer.config.options import options
from lora_trainer.config.sources import HEADER_KEY, read_file
from lora_trainer.errors import ConfigError, UserError
from lora_trainer.events import Finished, Notice, Started, StepDone
from lora_trainer.hosts.roots import Roots
from lora_trainer.training.average import Averaged
from lora_trainer.training.library import REGISTRY, Library, optimizer_class, optimizer_of
from lora_trainer.training.optimizers import AdamWSettings, FlatAdamW
from lora_trainer.training.snapshot import Snapshot
from lora_trainer.training.trainables import Trainables
from tests.unit.test_run import of, train, weights

NEEDED = {"train_data_dir": "d", "base_model": "m"}
# A learning rate that suits each on the tiny model.
RATES = {
    "adamw": 5e-3,
    "adamw8bit": 5e-3,
    "lion": 5e-3,
    "adafactor": 5e-3,
    "prodigy": 1.0,
    "prodigyplusschedulefree": 1.0,
    "adamwschedulefree": 2e-2,
    "came": 2e-3,
    "custom": 5e-3,
}
EXTRA = {
    "prodigy": {"optimizer_args": ["d0=1e-4"]},
    "prodigyplusschedulefree": {"optimizer_args": ["d0=1e-2"]},
    "custom": {"optimizer_class": "torch.optim.Adam", "optimizer_args": ["betas=(0.8, 0.99)"]},
}


def installed(name):
    if name in REGISTRY:
        pytest.importorskip(REGISTRY[name].path.split(".")[0])
    return name


def chosen(name, **more):
    return {"optimizer": installed(name), "learning_rate": RATES[name], **EXTRA.get(name, {}), **more}


def flat():
    torch.manual_seed(0)
    first, second = nn.Linear(40, 4, bias=False), nn.Linear(4, 48, bias=False)
    return Trainables({"unet": [("first", first, "weight")], "text_encoder": [("second", second, "weight")]})


def stepped(name, count, **more):
    """`count` steps of an optimizer on a small problem, then the trainables and it."""
    trainables = flat()
    optimizer = optimizer_of(build(NEEDED, chosen(name, **more)), trainables)
    for step in range(count):
        take(trainables, optimizer, step)
    return trainables, optimizer


def take(trainables, optimizer, step, bad=0.0):
    trainables.set_learning_rate(RATES["adamw"])
    generator = torch.Generator().manual_seed(step)
    trainables.grads.copy_(torch.randn(trainables.grads.shape, generator=generator))
    if bad:
        trainables.grads[0] = math.nan
    optimizer.step(trainables, torch.tensor(bad))


def state(trainables, optimizer):
    live = {name: tensor.clone() for name, tensor in optimizer.live().items()}
    return Snapshot.of({"masters": trainables.masters, **live}, trainables.slots).named()


def same(one, other):
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one), [
        name for name in one if not torch.equal(one[name], other[name])
    ]


@pytest.mark.parametrize("name", RATES)
def test_each_learns(settings, name):
    short = {"validation_split": 0.34, "resolution": 64, "batch_size": 4, "epochs": 12, "lora_dropout": 0.0}
    events, data = train(settings, **short, **chosen(name))
    (finished,) = of(events, Finished)
    assert finished.validation_lora < 0.995 * finished.validation_base
    uncaptured = [event.text for event in of(events, Notice) if "updates the weights uncaptured" in event.text]
    assert bool(uncaptured) == (name != "adamw")
    assert data


@pytest.mark.parametrize("name", RATES)
def test_a_bad_step_touches_neither_weights_nor_state(name):
    trainables, optimizer = stepped(name, 2)
    before = state(trainables, optimizer)
    take(trainables, optimizer, 2, bad=1.0)
    same(state(trainables, optimizer), before)


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("after", [0, 3])
def test_a_state_goes_on_bit_by_bit(name, after):
    trainables, optimizer = stepped(name, after)
    kept = state(trainables, optimizer)
    for step in range(after, after + 3):
        take(trainables, optimizer, step)
    again, other = stepped(name, 5)
    # Once more into what has already stepped: a rehearsal goes back to a state that knows of no step.
    for step in (0, 1):
        take(again, other, step)
    again.masters.copy_(trainables_of(kept, again))
    other.load(kept, again.slots)
    for step in range(after, after + 3):
        take(again, other, step)
    same(state(again, other), state(trainables, optimizer))


def trainables_of(kept, trainables):
    masters = torch.zeros_like(trainables.masters)
    for slot in trainables.slots:
        slot.of(masters).copy_(kept[f"masters/{slot.name}"])
    return masters


@pytest.mark.parametrize("name", ["adamw", "lion", "prodigyplusschedulefree"])
def test_a_run_is_resumed_to_the_byte(settings, name):
    changes = chosen(name, resolution=64, checkpoint_every=2, **({"ema_decay": 0.9} if name == "adamw" else {}))
    _, expected = train(settings, **changes)
    asked = iter(range(1000))
    # Six images, then each step.
    events, _ = train(settings, stop=lambda: next(asked) >= 6 + 3, **changes)
    assert of(events, Finished)[0].steps == 3
    events, resumed = train(settings, resumes=True, **changes)
    assert [event.step for event in of(events, StepDone)] == [4, 5, 6]
    assert resumed == expected


def test_measuring_and_saving_on_the_way_change_no_bit(settings):
    changes = chosen("adamwschedulefree", resolution=64)
    plain = train(settings, **changes, validation_split=0.34)[1]
    watched = train(settings, **changes, validation_split=0.34, validate_every=1, save_steps=1)[1]
    assert weights(plain) == weights(watched)


def test_schedule_free_saves_its_average():
    trainables, optimizer = stepped("adamwschedulefree", 4)
    before = trainables.masters.clone()
    with optimizer.settled(trainables.masters):
        inside = trainables.masters.clone()
    assert not torch.equal(inside, before)
    assert torch.equal(trainables.masters, before)
    z = optimizer.inner.state[next(iter(optimizer.parameters[0].values()))]["z"]
    part = slice(trainables.groups[0].start, trainables.groups[0].stop)
    # y = (1 - beta) z + beta x, of which x is saved.
    torch.testing.assert_close(inside[part], (before[part] - 0.1 * z) / 0.9, rtol=1e-4, atol=1e-6)


def test_a_flat_group_steps_like_its_matrices():
    """AdamW of torch by matrices beside ours: views, learning rates of groups, and padding are right."""
    settings = {"optimizer": "custom", "optimizer_class": "torch.optim.AdamW", "optimizer_args": ["weight_decay=0.1"]}
    mine, theirs = flat(), flat()
    mine.groups[1] = theirs.groups[1] = _half(mine.groups[1])
    ours = FlatAdamW(mine, AdamWSettings(weight_decay=0.1))
    library = Library(build(NEEDED, settings), theirs)
    for step in range(5):
        take(mine, ours, step)
        take(theirs, library, step)
    torch.testing.assert_close(cut(mine), cut(theirs), rtol=1e-5, atol=1e-7)


def _half(group):
    return replace(group, factor=0.5)


def cut(trainables):
    return {slot.name: slot.of(trainables.masters).clone() for slot in trainables.slots}


def test_ema_is_diffusers():
    try:
        training_utils = importlib.import_module("diffusers.training_utils")
    except (ImportError, AttributeError) as error:  # with old transformers it cannot be imported
        pytest.skip(str(error))
    trainables = flat()
    optimizer = Averaged(FlatAdamW(trainables, AdamWSettings()), trainables.masters, 0.6)
    reference = [nn.Parameter(trainables.masters.clone())]
    theirs = training_utils.EMAModel(reference, decay=0.6)
    for step in range(30):
        take(trainables, optimizer, step, bad=float(step in (0, 4)))
        if step not in (0, 4):
            reference[0].data.copy_(trainables.masters)
            theirs.step(reference)
    torch.testing.assert_close(optimizer.average, theirs.shadow_params[0].detach(), rtol=1e-6, atol=1e-7)
    before = trainables.masters.clone()
    with optimizer.settled(trainables.masters):
        assert torch.equal(trainables.masters, optimizer.average)
    assert torch.equal(trainables.masters, before)


def test_the_file_is_the_average(settings):
    changes = {"resolution": 64, "learning_rate": 5e-3}
    last, averaged = (
        read_lora(written(settings, train(settings, **changes, **more)[1])).factors
        for more in ({"ema_decay": 0}, {"ema_decay": 0.9})
    )
    name = next(iter(last))
    assert 0 < averaged[name].up.abs().sum() < last[name].up.abs().sum()


def written(settings, data):
    path = Path(settings["output_dir"]) / "read.safetensors"
    path.write_bytes(data)
    return path


def test_a_missing_package_says_how_to_get_it():
    entries = {name: entry for name, entry in REGISTRY.items() if name not in ("adafactor",)}
    for name, entry in entries.items():
        config = build(NEEDED, {"optimizer": name})
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, entry.path.split(".")[0], None)
            for module in [m for m in sys.modules if m.startswith(entry.path.split(".")[0] + ".")]:
                patch.setitem(sys.modules, module, None)
            with pytest.raises(ConfigError, match=f"optimizer: {name} needs the package {entry.package}.*pip install"):
                optimizer_class(config)


def test_it_is_said_before_anything_is_encoded(settings, monkeypatch):
    for module in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        train(settings, optimizer="AdamW8bit", train_data_dir="missing")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "custom"}, "optimizer_class: expected module.Class"),
        ({"optimizer_class": "torch.optim.SGD"}, "optimizer_class: expected optimizer custom beside it"),
        ({"optimizer_args": ["a=1"]}, "optimizer_args: expected an optimizer of another package"),
        ({"optimizer": "lion", "optimizer_args": ["betas"]}, "optimizer_args: expected name=value, found 'betas'"),
        ({"optimizer": "adamwschedulefree", "ema_decay": 0.9}, "ema_decay: expected 0"),
        (
            {"optimizer": "prodigy", "train_text_encoder": True, "text_encoder_lr": 0.5},
            "text_encoder_lr: expected that of learning_rate",
        ),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ConfigError, match=message):
        build(NEEDED, settings)


def test_of_too_many_arguments_no_more_are_looked_at_than_are_allowed():
    with pytest.raises(ConfigError) as caught:
        build(NEEDED, {"optimizer": "lion", "optimizer_args": ["betas"] * 100_000})
    assert caught.value.problems[0] == "optimizer_args: expected at most 1,000 entries, found 100,000"
    # Two of the size, a thousand of the form, of which a hundred are told.
    assert caught.value.problems[-1] == "… and 902 more"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer_class": "no.such.Thing"}, "optimizer_class: no.such.Thing cannot be imported"),
        ({"optimizer_class": "torch.optim.Nothing"}, "cannot be imported"),
        ({"optimizer_class": "nodots"}, "cannot be imported"),
        ({"optimizer_class": "os.system"}, "expected a torch.optim.Optimizer, found os.system"),
        ({"optimizer_class": "torch.optim.SGD", "optimizer_args": ["wings=2"]}, "optimizer_args: custom refuses"),
    ],
)
def test_a_custom_optimizer_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        Library(build(NEEDED, {"optimizer": "custom"}, settings), flat())


def test_arguments_are_python_literals():
    config = {"optimizer": "custom", "optimizer_class": "torch.optim.SGD", "weight_decay": 0.25}
    arguments = ["momentum = 0.5", "nesterov=true", "weight_decay=0.125"]
    (group, _) = Library(build(NEEDED, config, {"optimizer_args": arguments}), flat()).inner.param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.5, True, 0.125)


def test_what_cannot_be_saved_is_said_at_the_first_step():
    trainables, optimizer = flat(), None
    optimizer = Library(build(NEEDED, {"optimizer": "custom", "optimizer_class": "torch.optim.SGD"}), trainables)
    optimizer.inner.param_groups[0]["strange"] = object()
    with pytest.raises(UserError, match="keeps what cannot be saved"):
        take(trainables, optimizer, 0)


def test_only_the_command_line_names_code(tmp_path):
    """Not the tab and the API, whose settings all pass `Roots`, nor the header of a file, which may be anybody's."""
    given = {"optimizer": "custom", "optimizer_class": "torch.optim.SGD"}
    for enforced in (True, False):
        with pytest.raises(ConfigError, match="optimizer_class: only the command line may name code"):
            Roots([tmp_path], enforced=enforced).settings(given)
    config = build(NEEDED, given)
    for metadata in (json.loads(to_header(config)), {**json.loads(to_header(config)), **given}):
        header = json.dumps({"__metadata__": {HEADER_KEY: json.dumps(metadata)}}).encode()
        path = tmp_path / "made.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        with pytest.raises(ConfigError, match="optimizer_class: expected module.Class beside optimizer custom"):
            build(read_file(path))
        assert build(read_file(path), {"optimizer_class": "torch.optim.SGD"}) == config


def test_the_registry_is_what_the_option_offers(settings):
    assert set(options()["optimizer"].choices) == {"adamw", "custom", *REGISTRY}
    events, _ = train(settings, resolution=64, max_train_steps=1, optimizer="Adafactor")
    assert of(events, Started)
    assert any("uncaptured" in event.text for event in of(events, Notice))


def test_a_learning_rate_of_one_is_advised(settings):
    installed("prodigy")
    events, _ = train(settings, resolution=64, max_train_steps=1, optimizer="prodigy")
    assert any("1 is meant, found 0.0005" in event.text for event in of(events, Notice))
