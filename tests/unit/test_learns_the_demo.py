"""Every optimizer and every schedule, as they are shipped, teaches the demo's LoRA a style that its base never saw.

Twelve icons at 64 px and eight steps of two each; judged by icons that no step has seen.
"""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import pytest
import torch

from lora_trainer.config.options import options
from lora_trainer.demo import WORLD
from lora_trainer.events import Finished, Notice, StepDone
from lora_trainer.hosts.standalone import FileModels
from lora_trainer.training.library import REGISTRY, Library
from lora_trainer.training.optimizers import FlatAdamW
from tests.unit.test_optimizers import installed
from tests.unit.test_run import of, train

STEPS = 8
# What each is used with: AdamW's kind at a learning rate for so few steps, and those that look for it from near it.
OPTIMIZERS = {
    "adamw": {"learning_rate": 2e-3},
    "adamw8bit": {"learning_rate": 2e-3},
    "lion": {"learning_rate": 1e-3},
    "adafactor": {"learning_rate": 2e-3},
    "prodigy": {"learning_rate": 1.0, "optimizer_args": ["d0=2e-4"]},
    "prodigyplusschedulefree": {"learning_rate": 1.0, "max_grad_norm": 0.0, "optimizer_args": ["d0=5e-4"]},
    "adamwschedulefree": {"learning_rate": 5e-3},
    "came": {"learning_rate": 3e-5},
    "custom": {"learning_rate": 2e-3, "optimizer_class": "torch.optim.NAdam"},
}
SCHEDULES = {
    "constant": {},
    "linear": {},
    "cosine": {"lr_warmup_ratio": 0.1},
    "cosine_with_restarts": {"lr_scheduler_num_cycles": 2},
    "polynomial": {"lr_scheduler_power": 0.5},
    "rex": {"lr_warmup_steps": 2},
}


def few(source: Path, target: Path, count: int) -> Path:
    """The first `count` pictures of a folder with their captions."""
    target.mkdir()
    with (source / "metadata.csv").open(encoding="utf-8", newline="") as file:
        kept = [row for row in csv.reader(file) if row][:count]
    for row in kept:
        shutil.copy(source / row[0], target / row[0])
    with (target / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(kept)
    return target


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[dict, FileModels]:
    """Settings, and the demo's model, opened once."""
    home = tmp_path_factory.mktemp("demo")
    base = WORLD / "emoji-world.safetensors"
    settings = {
        "base_model": str(base),
        "train_data_dir": str(few(WORLD / "twemoji", home / "train", 12)),
        "validation_data_dir": str(few(WORLD / "twemoji-held-out", home / "held-out", 3)),
        "cache_dir": str(home / "cache"),
        "output_dir": str(home / "out"),
        "resolution": 64,
        "batch_size": 2,
        "target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
        "max_train_steps": STEPS,
        "checkpoint_every": 0,
        "cpu_threads": 1,
    }
    return settings, FileModels(base, torch.device("cpu"), torch.float32)


def learned(world, **changes) -> tuple[list, float]:
    """(events, share of the base's held-out loss that is gone)."""
    settings, models = world
    events, data = train(settings, models=models, **changes)
    (finished,) = of(events, Finished)
    assert data
    return events, 1 - finished.validation_lora / finished.validation_base


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_learns_and_says_whether_its_update_is_captured(world, name):
    installed(name)
    events, gain = learned(world, optimizer=name, **OPTIMIZERS[name])
    assert gain > 0.01, gain
    said = [event.text for event in of(events, Notice) if "updates the weights uncaptured" in event.text]
    assert len(said) == (name != "adamw")


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_schedule_learns(world, name):
    events, gain = learned(world, lr_scheduler=name, learning_rate=2e-3, **SCHEDULES[name])
    assert gain > 0.01, gain
    rates = [event.learning_rate for event in of(events, StepDone)]
    assert len(rates) == STEPS
    assert (len(set(rates)) == 1) == (name == "constant")


def test_none_is_left_out():
    assert set(OPTIMIZERS) == set(options()["optimizer"].choices) == {"adamw", "custom", *REGISTRY}
    assert set(SCHEDULES) == set(options()["lr_scheduler"].choices)


def test_the_readme_says_which_updates_are_captured():
    readme = (WORLD.parent / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| (yes|no) \| .*\|$", readme, re.MULTILINE))
    assert rows == {name: "yes" if name == "adamw" else "no" for name in OPTIMIZERS}
    assert (FlatAdamW.capturable, Library.capturable) == (True, False)
