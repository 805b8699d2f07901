"""The learning-rate finder: the sweep on a tiny model, the suggestion on known curves, and what it leaves behind."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_trainer.cli import main
from lora_trainer.config import build
from lora_trainer.errors import ConfigError, DataError
from lora_trainer.events import Notice, StepDone
from lora_trainer.hosts.ports import Host
from lora_trainer.hosts.standalone import AloneLease, FileModels, FolderStore
from lora_trainer.lineplot import line_plot
from lora_trainer.training import finder
from lora_trainer.training.control import StopOnly
from lora_trainer.training.finder import BLOWN, HIGHEST, LOWEST, STEPS, find_rate, judged, rate_at
from lora_trainer.training.run import run
from tests.unit.test_run import of


@pytest.fixture
def short(monkeypatch):
    """A sweep of 24 steps: its factors are larger, all else is as it is."""
    monkeypatch.setattr(finder, "STEPS", 24)


def swept(settings, *, stop=lambda: False, **changes):
    config = build(settings, {"resolution": 64, "lora_dropout": 0.0}, changes)
    models = FileModels(Path(config.base_model), torch.device("cpu"), torch.float32)
    host = Host(models, AloneLease(), FolderStore(Path(config.output_dir), overwrite=True))
    events: list = []
    return find_rate(config, host, events.append, StopOnly(stop)), events, models


def test_the_rate_rises_by_the_same_factor():
    assert rate_at(0) == LOWEST
    assert rate_at(STEPS - 1) == pytest.approx(HIGHEST)
    assert {round(rate_at(step + 1) / rate_at(step), 9) for step in range(STEPS - 1)} == {
        round((HIGHEST / LOWEST) ** (1 / (STEPS - 1)), 9)
    }


def test_a_sweep_measures_the_same_draws_and_leaves_nothing_behind(settings, short):
    finding, events, models = swept(settings)
    again, _, _ = swept(settings)
    assert finding == again
    rates, losses = zip(*finding.points, strict=True)
    assert rates[0] == LOWEST
    assert list(rates[1:]) == [pytest.approx(rate_at(step - 1)) for step in range(4, 4 * len(rates), 4)]
    # The first is the base's: a run of one step has the same one at its start, however it is seeded.
    held = {"validation_data_dir": settings["train_data_dir"], "resolution": 64, "max_train_steps": 1, "seed": 9}
    config = build(settings, held, {"output_dir": settings["output_dir"] + "-run"})
    host = Host(models, AloneLease(), FolderStore(Path(config.output_dir), overwrite=True))
    assert losses[0] == pytest.approx(run(config, host, lambda event: None).validation_base, rel=1e-3)
    assert min(losses) < losses[0]
    assert not Path(settings["output_dir"]).exists()
    assert not of(events, StepDone)
    assert any("no pictures are held out" in event.text for event in of(events, Notice))


def test_it_ends_where_the_loss_blows_up(settings, short, monkeypatch):
    monkeypatch.setattr(finder, "HIGHEST", 1e4)
    finding, _, _ = swept(settings, loraplus_lr_ratio=1)
    assert len(finding.points) < 1 + 24 // 4
    base, last = finding.points[0][1], finding.points[-1][1]
    assert not last < BLOWN * base


def test_a_stop_judges_what_there_is(settings, short):
    # Six pictures twice, the start, and so many steps.
    asked = iter(range(1000))
    finding, _, _ = swept(settings, stop=lambda: next(asked) > 12 + 9)
    assert 2 <= len(finding.points) < 6
    with pytest.raises(DataError, match="stopped before anything was measured"):
        swept(settings, stop=lambda: True)


def curve(least, depth=0.3, wide=1.0):
    """Flat, a smooth fall to `least`, then a steep rise; by the logarithm of the rate."""
    points = []
    for step in range(0, STEPS, 4):
        off = math.log10(rate_at(step) / least)
        points.append((rate_at(step), 1 - depth * math.exp(-((off / wide) ** 2)) + (10 * off**2 if off > 0.5 else 0)))
    return points


@pytest.mark.parametrize("least", [3e-4, 3e-3])
def test_the_suggestion_lies_between_the_steepest_fall_and_the_least_loss(least):
    finding = judged(curve(least))
    # The inflection of this bell: 1 / sqrt(2) of its width below.
    steep = least * 10**-0.707
    assert steep < finding.rate * 1.3
    assert finding.rate <= least / 3 * 1.3
    assert f"least at {min(curve(least), key=lambda point: point[1])[0]:.1e}" in finding.why
    assert f"learning_rate={finding.rate:g}" == finding.summary


def test_nothing_is_suggested_where_nothing_was_learned():
    finding = judged([(rate_at(step), 1.0 + step / 100) for step in range(0, 40, 4)])
    assert finding.rate is None
    assert "did not fall" in finding.why
    assert finding.summary == "no learning rate found"
    falling = judged([(rate_at(step), 1.0 - step / 1000) for step in range(0, 40, 4)] + [(1.0, math.nan)])
    assert "still falling" in falling.why


def test_the_command_writes_a_curve_and_a_table(settings, short, capsys):
    given = [f"{key}={value}" for key, value in settings.items()]
    assert main(["find-lr", *given, "resolution=64", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    out = Path(settings["output_dir"])
    assert sorted(path.name for path in out.iterdir()) == ["find-lr.csv", "find-lr.png"]
    head, *rows = csv.reader((out / "find-lr.csv").read_text().splitlines())
    assert head == ["learning_rate", "loss"]
    assert [[float(cell) for cell in row] for row in rows] == [pytest.approx(p, rel=1e-4) for p in said["points"]]
    with Image.open(out / "find-lr.png") as picture:
        assert len(picture.convert("RGB").getcolors(picture.width * picture.height)) > 3


def test_an_optimizer_that_finds_its_own_rate_needs_none(settings):
    with pytest.raises(ConfigError, match="prodigy finds the learning rate by itself"):
        swept(settings, optimizer="prodigy")


def test_a_plot_takes_whatever_was_measured():
    words = {"title": "t", "axis": "x"}
    blank = line_plot([(1e-3, math.nan)], **words)
    assert line_plot([], **words).tobytes() == blank.tobytes()
    one = line_plot([(1e-3, 0.5)], mark=1e-3, **words)
    assert one.tobytes() != blank.tobytes()
    clipped = line_plot([(1e-4, 0.5), (1e-3, 9.0)], most=1.0, **words)
    assert clipped.tobytes() == line_plot([(1e-4, 0.5), (1e-3, 1.0)], **words).tobytes()
