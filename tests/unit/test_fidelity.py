"""Fidelity against drift: what is measured, against what, how often, and where it is told."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import pytest
import torch

from lora_trainer.config import build
from lora_trainer.curve import Point
from lora_trainer.errors import ConfigError
from lora_trainer.events import Compared, Notice, Validated
from lora_trainer.hosts.standalone import train as train_here
from lora_trainer.jobs.fold import Told, fold
from lora_trainer.jobs.store import Head, first_view
from lora_trainer.training import fidelity
from lora_trainer.training.fidelity import PROMPTS, STEPS, Base, Fidelity, score
from lora_trainer.training.judging import SHARE
from lora_trainer.ui.judgement import comparison
from tests.unit.test_resume import Run, at_step
from tests.unit.test_run import of, train

OFTEN = {"measure_drift": True, "drift_prompts": ["a dog", "a house"], "validation_split": 0.4, "epochs": 4}


@pytest.fixture
def often(monkeypatch):
    """Measured every four steps, whatever that costs."""
    monkeypatch.setattr(Fidelity, "every", lambda self, steps, validations: 4)
    monkeypatch.setattr(Fidelity, "affordable", lambda self, step, steps: True)
    monkeypatch.setattr(fidelity, "PICTURES", 2)


def test_pictures_are_as_far_as_they_differ_from_the_real_ones_of_their_captions():
    generator = torch.Generator().manual_seed(0)
    real, spread = torch.randn(8, 16, generator=generator), torch.full((16,), 2.0)
    base = Base((), (), real, spread, real + 4, None)
    assert base.far(real) == 0
    assert base.distance == pytest.approx(4)
    assert base.far(real + 2) == pytest.approx(1)
    # Others of the same kind are not the same.
    assert base.far(real.flip(0)) > 0.1


def test_the_score_is_a_mean_of_likeness_held_out_gain_and_what_drift_leaves():
    assert score(0.5, 0.0, None) == 0.5
    assert score(0.5, 0.0, 0.5) == pytest.approx(0.5)
    assert score(0.5, 1 - 0.9**4, None) == pytest.approx(0.45)
    assert score(0.5, 0.0, 0.25) == pytest.approx(0.5 / 2 ** (6 / 7))
    # Drawings that come a tenth nearer are worth what 2 % of the held-out gain are.
    assert score(0.5, 0.1, 0.5) < score(0.5 * 1.1, 0.1, 0.5 * 0.985) < score(0.5, 0.1, 0.5 * 1.01)
    assert score(0.5, 1.5, 0.5) == score(-0.1, 0.1, 0.5) == score(0.5, 0.1, -0.2) == 0


def test_a_run_begins_as_the_base_and_moves(settings, often):
    events, _ = train(settings, **OFTEN, learning_rate=2e-2)
    first, *others = of(events, Compared)
    assert (first.step, first.likeness, first.drift) == (0, 0.0, 0.0)
    assert [event.step for event in others] == [4, 8]
    assert 0 < others[0].drift < others[-1].drift
    assert all(event.likeness <= 1 for event in others)
    gains = {event.step: 1 - event.lora / event.base for event in of(events, Validated)}
    assert gains.keys() == {0, 4, 8}
    assert all(event.score == score(event.likeness, event.drift, gains[event.step]) for event in others)
    assert others[-1].score > 0


def test_measuring_changes_nothing_of_what_is_learned(settings, often):
    _, without = train(settings, validation_split=0.4, epochs=4)
    _, with_it = train(settings, **OFTEN)
    from safetensors.torch import load

    one, other = load(without), load(with_it)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_killed_run_measures_the_same(settings, often, tmp_path):
    undisturbed, job = Run(settings), Run(settings)
    undisturbed(output_dir=str(tmp_path / "undisturbed"), **OFTEN | {"train_text_encoder": True})
    job.killed(at_step(5), **OFTEN | {"train_text_encoder": True})
    job(**OFTEN | {"train_text_encoder": True})
    assert job.of(Compared) == undisturbed.of(Compared)[-len(job.of(Compared)) :]
    assert {event.step for event in job.of(Compared)} >= {8}


def test_it_costs_its_share_of_the_run_at_most(settings):
    config = build(settings, {"measure_drift": True, "batch_size": 4})
    measure = Fidelity(config, print)
    assert measure.every(1000, 10) == 0
    measure._asked, measure._real = ["a caption"] * 8, [SimpleNamespace()] * 24
    assert measure.passes == len(PROMPTS) * STEPS + 8 * (STEPS + 1)
    # Too short for more than the beginning and the end.
    assert measure.every(100, 10) == 0
    for steps in (1000, 5000):
        every = measure.every(steps, 10)
        assert every % 10 == 0
        times = 2 + (steps - 1) // every
        assert times > 2
        assert times * measure.passes + 24 <= SHARE * steps * 4 * 3


def test_on_the_way_the_clock_decides(settings, monkeypatch):
    measure, now, seen = Fidelity(build(settings, {"measure_drift": True}), print), [0.0], []

    def took(segment: object, step: int) -> None:
        now[0] += 1.0
        seen.append(step)

    monkeypatch.setattr(fidelity, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(measure, "_measure", took)
    measure._asked = ["a caption"]
    for seconds_a_step, expected in ((0.01, [0, 1000]), (0.1, [0, 400, 700, 1000])):
        now[0], measure._first, measure._costs = 0.0, None, []
        seen.clear()
        measure(None, 0)
        for step in range(100, 1000, 100):
            now[0] += 100 * seconds_a_step
            measure.between(None, step, 1000)
        measure(None, 1000)
        assert seen == expected
        assert len(seen) <= max(2, SHARE * now[0])


def test_without_held_out_pictures_training_pictures_are_compared(settings, often):
    events, _ = train(settings, measure_drift=True, drift_prompts=["a dog"])
    assert [event.step for event in of(events, Compared)] == [0, 4, 6]


def test_what_does_not_fit_is_said(settings, often, monkeypatch):
    def short(*args):
        raise torch.cuda.OutOfMemoryError("simulated")

    monkeypatch.setattr(fidelity, "drawn", short)
    events, data = train(settings, **OFTEN)
    assert data is not None
    assert of(events, Compared) == []
    assert any("drift not measured" in notice.text for notice in of(events, Notice))


def test_pictures_of_different_shapes_are_not_compared(settings, pictures):
    for name in ("p1.png", "p2.png", "p3.png", "p5.png"):
        (pictures / name).unlink()
    (pictures / "metadata.csv").write_text("p0.png,one\np4.png,another\n")
    events, data = train(settings, measure_drift=True, overwrite=True)
    assert data is not None
    assert of(events, Compared) == []
    assert len([notice for notice in of(events, Notice) if "no two training pictures" in notice.text]) == 1


def test_drift_prompts_want_the_measurement(settings):
    with pytest.raises(ConfigError, match="drift_prompts: expected measure_drift beside them"):
        build(settings, {"drift_prompts": ["a dog"]})


def test_the_log_the_job_and_the_tab_show_it(settings, often, tmp_path):
    events: list = []
    train_here(build(settings, OFTEN), events.append)
    with (tmp_path / "out" / "logs" / "drift.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["step"]), float(row["drift"])) for row in rows] == [
        (e.step, e.drift) for e in of(events, Compared)
    ]
    view = first_view(Head("a", "style", 1.0, {}))
    for event in events:
        view = fold(view, Told(1.0, event))
    assert [row[0] for row in view.comparisons] == [0, 4, 8]
    assert sum("other prompts changed by" in line and ", score 0." in line for line in view.log) == 2
    assert comparison(view).count("<tr") == 1 + 2


def test_the_table_stays_short_and_marks_the_best_step():
    job = SimpleNamespace(
        comparisons=tuple((step, step / 100, step / 1000, step / 200) for step in range(0, 100, 5)),
        validations=(Point(0, 0.5, 0.5), Point(40, 0.5, 0.3), Point(90, 0.5, 0.4)),
    )
    html = comparison(job)
    assert html.count("<tr") <= 8
    assert '<tr class="lt-marked"><td>40</td>' in html
    assert "<td>95</td>" in html
    assert "<td>0.20</td></tr>" in html
    assert "pictures held out" in html
    assert comparison(SimpleNamespace(comparisons=((0, 0.0, 0.0, 0.0),), validations=())) == ""
