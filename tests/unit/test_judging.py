"""What is measured on the way: training pictures beside held-out ones, the best step that is saved, the early end."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lora_trainer.config import build
from lora_trainer.curve import Point, best, risen
from lora_trainer.dataset.items import Item
from lora_trainer.dataset.samples import Prepared, Sample
from lora_trainer.errors import ConfigError
from lora_trainer.events import Finished, Notice, Saved, StepDone, Validated
from lora_trainer.hosts.standalone import train as train_here
from lora_trainer.training import judging
from lora_trainer.training.judging import LEAST, MOST, SHARE, interval, watched
from lora_trainer.training.validation import TIMESTEPS, Validator
from tests.unit.test_resume import Run, at_step
from tests.unit.test_run import of, train

MEASURED = {"validation_split": 0.4, "validate_every": 2, "epochs": 6, "checkpoint_every": 2}
# Two held-out pictures, four to train on: two steps an epoch.
STEPS = 12


def test_training_pictures_are_measured_beside_held_out_ones(settings):
    events, _ = train(settings, **MEASURED, learning_rate=5e-3)
    points = [Point(e.step, e.base, e.lora, e.train, e.train_base) for e in of(events, Validated)]
    assert [point.step for point in points] == list(range(0, STEPS + 1, 2))
    assert points[0].lora == points[0].base
    assert points[0].train == points[0].train_base
    assert {(point.base, point.train_base) for point in points} == {(points[0].base, points[0].train_base)}
    assert len({point.train for point in points}) == len({point.lora for point in points}) == len(points)
    assert points[0].train != points[0].lora
    assert of(events, Finished)[0].validation_train is not None


def test_the_logs_have_both_curves(settings, tmp_path):
    pytest.importorskip("tensorboard")
    train_here(build(settings, MEASURED, {"log_with": "tensorboard"}), lambda event: None)
    with (tmp_path / "out" / "logs" / "validation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == [str(step) for step in range(0, STEPS + 1, 2)]
    assert all(float(row["train"]) > 0 < float(row["train_base"]) for row in rows)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "out" / "logs")).Reload()
    assert len(board.Scalars("validation/train")) == len(rows)


def test_the_draws_are_spread_evenly_and_all_of_them_are_all_pairs():
    def pairs(samples: int, most: int | None = None) -> list[tuple[int, int]]:
        return list(Validator([None] * samples, most=most)._draws())

    assert sorted(pairs(3)) == sorted(pairs(3, 1000)) == [(i, k) for i in range(3) for k in range(TIMESTEPS)]
    assert len(set(pairs(10, 64))) == 64
    for samples, most in ((64, 64), (16, 64), (32, 64), (200, 64)):
        found = pairs(samples, most)
        assert len(set(found)) == most
        assert {sum(k == one for _, k in found) for one in range(TIMESTEPS)} == {most // TIMESTEPS}
        assert len({i for i, _ in found}) == min(samples, most)
    assert max(i for i, _ in pairs(200, 64)) > 190


def test_the_handful_is_chosen_by_name_in_its_plainest_form():
    def sample(name: str, size: int) -> Sample:
        ids = {"ids": torch.zeros(2, 77)}
        return Sample(Item(Path(name), "", "test"), size, torch.zeros(1), torch.zeros(1), ids, tokens=308)

    pictures = [sample(f"{n}.png", size) for n in range(9) for size in (64, 128)]
    chosen = watched(Prepared(tuple(pictures), ()), 4, seed=1)
    assert len({one.item.path for one in chosen}) == 4
    assert {one.bucket for one in chosen} == {64}
    assert {one.tokens for one in chosen} == {154}
    fewer = watched(Prepared(tuple(pictures[2:]), ()), 4, seed=1)
    assert len({one.item.path for one in chosen} & {one.item.path for one in fewer}) >= 3
    assert len(watched(Prepared(tuple(pictures), ()), 100, seed=1)) == 9
    others = watched(Prepared(tuple(pictures), ()), 4, seed=2)
    assert {one.item.path for one in others} != {one.item.path for one in chosen}


@pytest.fixture
def losses(monkeypatch):
    """Held-out losses from a list, the base's first, in place of measured ones."""

    def given(*values: float) -> None:
        def both(self, network):
            # By the step, so that a run that goes on gets what an undisturbed one gets.
            at = 0 if not self.curve else self.curve[-1].step // 2 + 1
            return values[min(at, len(values) - 1)], 0.1

        monkeypatch.setattr(judging.Validation, "_losses", both)

    return given


def weights(path: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(path)


def header(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_best_step_is_saved_and_the_last_one_beside_it(settings, tmp_path, losses):
    losses(0.5, 0.4, 0.3, 0.31, 0.312)
    events, _ = train(settings, **MEASURED, save_steps=4)
    out, (finished,) = tmp_path / "out", of(events, Finished)
    assert (finished.steps, finished.best_step, finished.validation_lora, finished.overfit) == (STEPS, 4, 0.3, False)
    assert same(out / "tiny.safetensors", out / "tiny-step00000004.safetensors")
    assert not same(out / "tiny.safetensors", out / "tiny-step00000012.safetensors")
    facts = header(out / "tiny.safetensors")
    assert (facts["ss_steps"], facts["ss_epoch"]) == ("4", "2")
    assert header(out / "tiny-step00000012.safetensors")["ss_steps"] == "12"
    (told,) = [event.text for event in of(events, Notice) if "was best" in event.text]
    assert told.startswith("step 4 of 12 was best on held-out pictures (0.3000; at step 12 0.3120): saved that one")
    assert told.endswith("tiny-step00000012")
    assert [event.step for event in of(events, Saved) if event.kind == "lora"] == [4]


def test_the_last_step_is_saved_when_it_is_the_best_or_was_asked_for(settings, tmp_path, losses):
    losses(0.5, 0.4, 0.3, 0.2, 0.15, 0.14, 0.13)
    train(settings, **MEASURED)
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["tiny.safetensors"]
    losses(0.5, 0.4, 0.3, 0.31)
    events, _ = train(settings, **MEASURED, save_best=False, save_steps=4)
    finished = of(events, Finished)[0]
    assert (finished.best_step, finished.validation_lora) == (4, 0.31)
    assert not same(tmp_path / "out" / "tiny.safetensors", tmp_path / "out" / "tiny-step00000004.safetensors")
    assert header(tmp_path / "out" / "tiny.safetensors")["ss_steps"] == "12"


def test_early_stopping_ends_a_run_as_done(settings, losses):
    losses(0.5, 0.4, 0.3, 0.31, 0.305, 0.2)
    events, _ = train(settings, **MEASURED, early_stopping_patience=2)
    finished = of(events, Finished)[0]
    assert (finished.state, finished.steps, finished.best_step) == ("done", 8, 4)
    assert of(events, StepDone)[-1].step == 8
    (told,) = [event.text for event in of(events, Notice) if "early stopping" in event.text]
    assert "stood still over 2 measurements" in told
    assert [event.step for event in of(events, Validated)] == [0, 2, 4, 6, 8]
    # With more patience the same run gets further.
    events, _ = train(settings, **MEASURED, early_stopping_patience=3)
    assert (of(events, Finished)[0].steps, of(events, Finished)[0].best_step) == (STEPS, 10)


def test_the_warning_comes_once(settings, losses):
    losses(0.5, 0.4, 0.3, 0.32, 0.33, 0.29, 0.35)
    events, _ = train(settings, **MEASURED)
    assert [event.level for event in of(events, Notice) if "overfitting" in event.text] == ["warning"]
    assert of(events, Finished)[0].overfit
    losses(0.5, 0.4, 0.3, 0.3149, 0.31)
    events, _ = train(settings, **MEASURED)
    assert not [event for event in of(events, Notice) if "overfitting" in event.text]
    assert not of(events, Finished)[0].overfit


@pytest.mark.parametrize(("step", "extra"), [(3, {}), (9, {}), (7, {"ema_decay": 0.5})])
def test_a_killed_run_saves_the_same_best_step(settings, tmp_path, losses, step, extra):
    losses(0.5, 0.4, 0.3, 0.32, 0.31, 0.305, 0.303)
    changes = MEASURED | {"early_stopping_patience": 3} | extra
    undisturbed, job = Run(settings), Run(settings)
    expected = undisturbed(output_dir=str(tmp_path / "undisturbed"), **changes)
    job.killed(at_step(step), **changes)
    assert job(**changes) == expected
    assert told(job) == told(undisturbed)
    last = "tiny-step00000010.safetensors"
    assert (job.out / last).read_bytes() == (tmp_path / "undisturbed" / last).read_bytes()
    # What was said before the kill is not said again.
    assert len([1 for notice in job.of(Notice) if "overfitting" in notice.text]) == (step < 6)


def told(run: Run) -> tuple:
    (finished,) = run.of(Finished)
    return finished.steps, finished.loss, finished.validation_lora, finished.best_step, finished.overfit


def test_a_run_killed_after_its_early_end_ends_there_again(settings, losses):
    losses(0.5, 0.4, 0.3, 0.31, 0.305)
    job, changes = Run(settings), MEASURED | {"early_stopping_patience": 2}
    job.killed(lambda event: isinstance(event, Saved) and event.kind == "checkpoint", **changes)
    assert job(**changes) is not None
    assert job.of(StepDone) == []
    assert (job.of(Finished)[0].steps, job.of(Finished)[0].best_step) == (8, 4)


def test_going_back_takes_the_curve_along():
    validation = judging.Validation(SimpleNamespace(early_stopping_patience=0), lambda event: None)
    state = {"best/a": torch.ones(1), "masters/a": torch.zeros(1)}
    points = [Point(step, 0.5, loss) for step, loss in ((0, 0.5), (2, 0.4), (4, 0.3))]
    validation.go_on_from(points, {"best/a": torch.full((1,), 2.0)})
    validation.go_back(2, state)
    assert (validation.curve, validation.weights) == (points[:2], {"best/a": state["best/a"]})
    validation.go_back(0, None)
    assert (validation.curve, validation.weights, validation.earlier(9)) == (points[:1], {}, None)


def test_the_interval_is_ours_only_for_early_stopping_and_stays_cheap(settings):
    held_out = {"validation_split": 0.2}
    assert interval(build(settings, held_out), 128, 1000) == 0
    assert interval(build(settings, held_out, {"validate_every": 7, "early_stopping_patience": 3}), 128, 1000) == 7
    config = build(settings, held_out, {"early_stopping_patience": 3, "batch_size": 4})
    for steps in (10, 200, 1000, 5000, 100_000):
        every = interval(config, 128, steps)
        assert steps / MOST <= every <= math.ceil(max(1, steps / LEAST))
    # A step of four pictures is as much as twelve passes.
    every = interval(config, 128, 5000)
    assert 5000 / every * 128 <= SHARE * 5000 * 4 * 3 * 1.01


def test_what_needs_held_out_pictures_says_so(settings):
    with pytest.raises(ConfigError, match="early_stopping_patience: expected validation_data_dir or validation_split"):
        build(settings, {"early_stopping_patience": 3})


def test_nothing_is_measured_without_held_out_pictures(settings):
    events, _ = train(settings)
    assert of(events, Validated) == []
    assert of(events, Finished)[0].best_step is None


def test_a_real_curve_has_its_lowest_point_saved(settings):
    events, _ = train(settings, **MEASURED, learning_rate=2e-2)
    points = [Point(e.step, e.base, e.lora) for e in of(events, Validated)]
    finished = of(events, Finished)[0]
    assert finished.validation_lora == best(points).lora == min(point.lora for point in points[1:])
    assert finished.overfit == (risen(points) is not None)
