"""Learning rates: those of transformers and diffusers where they have the same, and the published formula else."""

from __future__ import annotations

import pytest
import torch
from diffusers import optimization
from torch import nn

from lora_trainer.config import build
from lora_trainer.errors import ConfigError
from lora_trainer.events import StepDone
from lora_trainer.training.schedules import Schedule
from tests.unit.test_run import of, train

BASE, STEPS, WARMUP = 0.3, 50, 10


def schedule(name, **settings):
    settings = {"lr_warmup_steps": WARMUP, **settings}
    needed = {"train_data_dir": "d", "base_model": "m", "learning_rate": BASE, "lr_scheduler": name}
    return Schedule.of(build(needed, settings), STEPS)


def theirs(name, **settings):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=BASE)
    make = getattr(optimization, f"get_{name}_with_warmup")
    steps = {} if name == "constant_schedule" else {"num_training_steps": STEPS}
    scheduler = make(optimizer, num_warmup_steps=WARMUP, **steps, **settings)
    for _ in range(STEPS + 3):
        yield scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("mine", "expected"),
    [
        (schedule("constant"), theirs("constant_schedule")),
        (schedule("linear"), theirs("linear_schedule")),
        (schedule("cosine"), theirs("cosine_schedule")),
        (
            schedule("cosine_with_restarts", lr_scheduler_num_cycles=3),
            theirs("cosine_with_hard_restarts_schedule", num_cycles=3),
        ),
        (
            schedule("polynomial", lr_scheduler_power=2.5),
            theirs("polynomial_decay_schedule", power=2.5, lr_end=0.0),
        ),
    ],
    ids=["constant", "linear", "cosine", "restarts", "polynomial"],
)
def test_schedules_are_diffusers(mine, expected):
    for step, rate in enumerate(expected):
        if step < STEPS:
            assert mine(step) == pytest.approx(rate, rel=1e-12, abs=1e-15), step


def test_rex_is_its_formula():
    rex = schedule("rex", lr_warmup_steps=0)
    for step in range(STEPS):
        z = step / STEPS
        assert rex(step) == pytest.approx(BASE * (1 - z) / (0.5 + 0.5 * (1 - z)), rel=1e-12)
    assert rex(STEPS) == rex(STEPS + 5) == 0
    assert all(rex(step) > schedule("linear", lr_warmup_steps=0)(step) for step in range(1, STEPS))


def test_warm_up_by_share():
    shared, counted = schedule("cosine", lr_warmup_steps=0, lr_warmup_ratio=0.2), schedule("cosine")
    assert [shared(step) for step in range(STEPS)] == [counted(step) for step in range(STEPS)]
    assert schedule("constant", lr_warmup_steps=0)(0) == BASE
    with pytest.raises(ConfigError, match="lr_warmup_ratio: expected 0 together with lr_warmup_steps"):
        schedule("constant", lr_warmup_ratio=0.1)


def test_a_run_follows_its_schedule(settings):
    changes = {"lr_scheduler": "rex", "lr_warmup_ratio": 0.34, "learning_rate": 1e-3, "resolution": 64}
    events, _ = train(settings, **changes)
    steps = of(events, StepDone)
    expected = Schedule.of(build(settings, changes), len(steps))
    assert expected.warmup == 2
    assert [step.learning_rate for step in steps] == [expected(step) for step in range(6)]
