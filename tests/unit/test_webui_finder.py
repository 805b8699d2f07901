"""A search for a learning rate on a stand-in for the WebUI: through the extension, and what others do meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from lora_trainer.config import build
from lora_trainer.errors import ConfigError
from lora_trainer.events import Finished, Notice, RateFound, RateTried, StepDone
from lora_trainer.jobs.states import ENDED
from lora_trainer.training import finder
from lora_trainer.training.control import StopOnly
from tests.unit.test_jobs import until
from tests.unit.test_webui_jobs import Meanwhile, of, ui, webui_settings  # noqa: F401

STEPS = 8
SETTINGS = {"lora_dropout": 0.0}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """A sweep of few steps, whose factors are larger, judged by two pictures; all else is as it is."""
    monkeypatch.setattr(finder, "STEPS", STEPS)
    monkeypatch.setattr(finder, "pick", lambda items: tuple(items[:2]))


class Control:
    """What a test asks for; `waited` counts pauses."""

    def __init__(self) -> None:
        self.stop = self.pause = False
        self.waited = 0

    def stopping(self) -> bool:
        return self.stop

    def pausing(self) -> bool:
        return self.pause

    def wait(self) -> None:
        self.waited += 1
        self.pause = False


def find(ui, settings, at=lambda event: None, control=None) -> list:  # noqa: F811
    """The events of a search; `at` is called with each on its thread, while it holds the queue."""
    events: list = []

    def sink(event) -> None:
        events.append(event)
        at(event)

    finished = ui.host("train").find(build(settings, SETTINGS), sink, control or StopOnly())
    assert finished == events[-1]
    assert not ui.lock._lock.locked()
    return events


def points(events) -> list[tuple[float, float]]:
    """Of the last sweep."""
    tried = of(events, RateTried)
    first = max(number for number, event in enumerate(tried) if event.step == 0)
    return [(event.learning_rate, event.loss) for event in tried[first:]]


def test_a_search_suggests_a_rate_and_leaves_all_as_it_was(ui, webui_settings):  # noqa: F811
    before, picture = ui.digest(), ui.picture()
    events = find(ui, webui_settings)
    assert ui.digest() == before
    assert ui.picture() == picture
    (found,) = of(events, RateFound)
    assert found.learning_rate is not None
    assert [event.step for event in of(events, RateTried)] == [0, 4, 8]
    assert of(events, StepDone) == []
    assert (events[-1].state, events[-1].output, events[-1].steps) == ("done", [], STEPS)
    assert sorted(p.name for p in Path(webui_settings["output_dir"]).iterdir()) == ["find-lr.csv", "find-lr.png"]
    assert [p.name for p in ui.loras.iterdir()] == ["style.safetensors"]


def test_others_may_draw_and_even_change_the_checkpoint_meanwhile(ui, webui_settings):  # noqa: F811
    undisturbed = find(ui, webui_settings)
    before = ui.digest()
    drawn = ui.picture()
    meanwhile = Meanwhile(ui, lambda: ui.picture(), lambda: ui.choose("other"))

    def each(event) -> None:
        if isinstance(event, RateTried):
            meanwhile("step", event.step)

    disturbed = find(ui, webui_settings, at=each)
    assert meanwhile.wait()[0] == drawn
    # It began again on its own checkpoint, and came to the same.
    assert any("will begin again" in notice.text for notice in of(disturbed, Notice))
    assert points(disturbed) == points(undisturbed)
    assert of(disturbed, RateFound) == of(undisturbed, RateFound)
    ui.choose("tiny")
    assert ui.digest() == before


def test_a_pause_gives_the_model_back_and_then_it_begins_again(ui, webui_settings):  # noqa: F811
    undisturbed, control = find(ui, webui_settings), Control()
    free = []

    def wait() -> None:
        Control.wait(control)
        free.append(not ui.lock._lock.locked())

    control.wait = wait

    def each(event) -> None:
        control.pause = control.pause or (isinstance(event, RateTried) and event.step == 4 and not control.waited)

    paused = find(ui, webui_settings, at=each, control=control)
    assert free == [True]
    assert points(paused) == points(undisturbed)
    assert [event.step for event in of(paused, RateTried)] == [0, 4, 0, 4, 8]


@pytest.mark.parametrize("by", ["stop", "interrupt", "stop in a pause"])
def test_a_stop_judges_what_there_is(ui, webui_settings, by):  # noqa: F811
    control = Control()
    if by == "stop in a pause":

        def wait() -> None:
            control.stop = True

        control.wait = wait

    def each(event) -> None:
        if isinstance(event, RateTried) and event.step == 4:
            if by == "interrupt":
                ui.state.interrupt()
            control.stop = by == "stop"
            control.pause = by == "stop in a pause"

    events = find(ui, webui_settings, at=each, control=control)
    assert events[-1].state == "stopped"
    assert len(points(events)) == 2
    assert len(of(events, RateFound)) == 1
    # The next picture is whole.
    assert ui.draw() is not None


def test_a_stop_before_anything_is_measured_is_no_failure(ui, webui_settings):  # noqa: F811
    events = find(ui, webui_settings, control=StopOnly(lambda: True))
    assert (events[-1].state, events[-1].steps, of(events, RateFound)) == ("stopped", 0, [])


def test_the_extension_queues_it_and_the_next_process_knows_what_was_found(ui, pictures):  # noqa: F811
    host = ui.host("extension")
    extension = host.Extension()
    given = {"train_data_dir": str(pictures), "resolution": 64, "batch_size": 2, "mixed_precision": "no"}
    with pytest.raises(ConfigError, match="prodigy finds the learning rate by itself"):
        extension.find_rate({**given, "optimizer": "prodigy"})
    with pytest.raises(ConfigError, match="batch_size: expected"):
        extension.find_rate({**given, "batch_size": 0})
    assert extension.jobs.jobs() == []
    job = extension.find_rate({**given, **SETTINGS})
    assert job.kind == "find-lr"
    until(lambda: extension.jobs.job(job.id).state in ENDED, timeout=60)
    seen = extension.jobs.job(job.id)
    assert (seen.state, seen.error, seen.step, seen.steps, seen.output) == ("done", None, STEPS, STEPS, ())
    assert [rate for rate, _ in seen.sweep] == pytest.approx([finder.rate_at(n) for n in (0, 3, 7)])
    assert seen.suggested is not None
    assert any(f"learning_rate={seen.suggested:g}" in line for line in seen.log)
    extension.jobs.close()
    again = host.Extension()
    assert again.jobs.job(job.id) == seen
    again.jobs.close()


def test_it_waits_its_turn_behind_a_training(ui, pictures, monkeypatch):  # noqa: F811
    host = ui.host("extension")
    order, go = [], threading.Event()

    def work(kind):
        def run(id, config, sink, control):
            order.append(kind)
            assert go.wait(10)
            return Finished(state="done", output=[], steps=0, loss=None, seconds=0.0)

        return run

    monkeypatch.setattr(host, "work", work("train"))
    monkeypatch.setattr(host, "find", work("find-lr"))
    extension = host.Extension()
    given = {"train_data_dir": str(pictures)}
    jobs = [extension.submit(given), extension.find_rate(given)]
    until(lambda: order)
    assert extension.jobs.job(jobs[1].id).state == "queued"
    go.set()
    until(lambda: extension.jobs.job(jobs[1].id).state in ENDED)
    assert order == ["train", "find-lr"]
    extension.jobs.close()
