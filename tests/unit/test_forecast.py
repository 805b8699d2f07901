"""What a run will need, told before its steps: with an imagined GPU, whose memory and times are given."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lora_trainer.dataset.buckets import Bucket
from lora_trainer.dataset.items import Item
from lora_trainer.dataset.rules import Rules
from lora_trainer.dataset.samples import Captions, Sample
from lora_trainer.events import Finished, Forecast, Notice, Progress, StepDone
from lora_trainer.hosts.standalone import AloneLease
from lora_trainer.jobs.fold import Told, fold
from lora_trainer.jobs.view import JobView
from lora_trainer.logs import sentences
from lora_trainer.training import planning, results
from lora_trainer.training.capture import Captures
from lora_trainer.training.feed import Feed
from lora_trainer.training.forecast import FromFirstSteps, Need
from lora_trainer.training.results import Results
from lora_trainer.training.spill import REPORTS, Spill
from lora_trainer.training.step import ForwardBackward
from tests.unit.test_run import of, train

GB = 1024**3


class FakeGpu:
    """8 GB, of which plan after plan needs the next of `peaks`; each part takes `seconds`."""

    def __init__(self, *peaks: float, seconds: float = 0.5, spills: bool = False, scarce: bool = False) -> None:
        self.peaks, self.seconds, self.spills, self.is_scarce = list(peaks), seconds, spills, scarce
        self.begun = 0

    def begin(self) -> int:
        self.begun += 1
        return 8 * GB

    def peak(self) -> int:
        return int(self.peaks.pop(0) * GB)

    def time(self, work) -> float:
        work()
        return self.seconds

    def scarce(self) -> bool:
        return self.is_scarce


class Leaving(AloneLease):
    """The model is gone at the `nth` time that the GPU is offered to others from the first rehearsal on."""

    def __init__(self, gpu: FakeGpu, nth: int) -> None:
        self.gpu, self.nth, self.offered = gpu, nth, 0

    def hand_over(self, make_room=lambda: None) -> bool:
        self.offered += self.gpu.begun > 0
        return self.offered != self.nth


@pytest.fixture
def imagine(monkeypatch):
    def put(gpu: FakeGpu) -> FakeGpu:
        monkeypatch.setattr(planning, "gpu_of", lambda device: gpu)
        return gpu

    return put


@pytest.fixture
def expected(settings, tmp_path) -> bytes:
    return weights(train(settings, output_dir=str(tmp_path / "undisturbed"))[1])


def weights(data: bytes) -> bytes:
    return data[8 + int.from_bytes(data[:8], "little") :]


def told(events, words: str) -> list[str]:
    return [notice.text for notice in of(events, Notice) if words in notice.text]


def test_a_forecast_comes_before_the_first_step_and_changes_nothing(settings, imagine, expected):
    imagine(FakeGpu(5.1))
    events, got = train(settings)
    assert weights(got) == expected
    (forecast,) = of(events, Forecast)
    steps = of(events, StepDone)
    assert events.index(forecast) < events.index(steps[0])
    # Three batches an epoch, no accumulation, each part half a second: a second a step.
    assert forecast == Forecast(seconds=len(steps), memory=int(5.1 * GB), available=8 * GB)
    assert list(sentences(forecast)) == ["needs 5.1 of 8.0 GB, about 6 s"]


def test_the_largest_comes_first_and_all_are_warm_before_the_first_is_captured(settings, imagine, monkeypatch):
    imagine(FakeGpu(5))
    ran, run = [], Captures.run

    def record(self, part, body):
        ran.append(part)
        run(self, part, body)

    monkeypatch.setattr(Captures, "run", record)
    events, _ = train(settings)
    large, small = (2, 8, 16, 77), (2, 8, 8, 77)
    once = [large, small, "update"]
    assert ran[:6] == once * 2
    assert ran[6:9] == once
    assert [(p.done, p.total) for p in of(events, Progress) if p.stage == "warming up"] == [(1, 2), (2, 2)]


def test_a_plan_that_does_not_fit_is_left_before_the_first_step(settings, imagine):
    gpu = imagine(FakeGpu(9.06, 8.8, 8.5, 5))
    events, _ = train(settings)
    down = told(events, "goes on with")
    assert down == [
        "step 1: needs 9.1 of 8.0 GB, goes on with gradient checkpointing",
        "step 1: needs 8.8 of 8.0 GB, goes on with gradient checkpointing of all blocks",
        "step 1: needs 8.5 of 8.0 GB, goes on with gradient checkpointing of all blocks, batches in 2 parts",
    ]
    assert gpu.begun == 4
    assert [forecast.memory for forecast in of(events, Forecast)] == [5 * GB]
    assert [event.step for event in of(events, StepDone)] == [1, 2, 3, 4, 5, 6]
    assert of(events, Finished)[0].state == "done"


def test_auto_fit_may_be_switched_off(settings, imagine, expected):
    gpu = imagine(FakeGpu(9.06))
    events, got = train(settings, auto_fit=False)
    assert weights(got) == expected
    assert gpu.begun == 1
    (warning,) = told(events, "steps will be slow")
    assert re.match(r"needs 9.1 of 8.0 GB: .*with gradient checkpointing it is likely to fit.*auto_fit: true", warning)


def test_with_everything_given_up_it_warns_and_trains(settings, imagine):
    imagine(FakeGpu(9, 9, 9, 9))
    events, got = train(settings)
    assert got
    assert "close what else uses the GPU" in told(events, "steps will be slow")[0]


def test_memory_that_runs_out_in_a_rehearsal_costs_no_step(settings, imagine, expected, monkeypatch):
    """In the second segment of a run: it goes on from where the first one ended, not from a state before."""
    gpu = imagine(FakeGpu(5, 5))
    compute = ForwardBackward._compute

    def short(self, batch):
        if gpu.begun == 2:
            gpu.begun += 1
            raise torch.cuda.OutOfMemoryError("by the test")
        compute(self, batch)

    monkeypatch.setattr(ForwardBackward, "_compute", short)
    events, got = train(settings, lease=Leaving(gpu, 5))
    assert told(events, "goes on with") == ["step 4: out of memory, goes on with gradient checkpointing"]
    assert [event.step for event in of(events, StepDone)] == [1, 2, 3, 4, 5, 6]
    assert weights(got) == expected


def test_a_stop_in_a_rehearsal_publishes_nothing(settings, imagine):
    gpu = imagine(FakeGpu(5))
    events, got = train(settings, stop=lambda: gpu.begun > 0)
    assert got is None
    assert of(events, Finished)[0].state == "stopped"
    assert not of(events, StepDone)


def test_others_are_let_in_between_warm_ups(settings, imagine, expected):
    """The model is no longer ours in the middle of a rehearsal: the next segment rehearses, and nothing is lost."""
    gpu = imagine(FakeGpu(5, 5))
    _, got = train(settings, lease=Leaving(gpu, 2))
    assert weights(got) == expected
    assert gpu.begun == 2


def test_a_trial_tells_the_memory_too(settings, imagine):
    imagine(FakeGpu(5.1))
    events, _ = train(settings, trial=True)
    assert not of(events, Forecast)
    (text,) = told(events, "trial passed")
    assert re.search(r"6 steps, needs 5.1 of 8.0 GB and will take about", text)


def test_without_a_gpu_the_first_steps_tell_the_time(settings, expected):
    events, got = train(settings)
    assert weights(got) == expected
    (forecast,) = of(events, Forecast)
    assert (forecast.memory, forecast.available) == (None, None)
    assert [event.step for event in events[: events.index(forecast)] if isinstance(event, StepDone)] == [1, 2, 3]


def test_the_quickest_of_the_first_steps_counts():
    events: list = []
    sink = FromFirstSteps(events.append)
    for step, seconds in enumerate([30.0, 4.0, 2.0, 1.0], start=1):
        sink(StepDone(step=step, steps=103, epoch=1, loss=1, learning_rate=1, grad_norm=1, seconds=seconds))
    assert of(events, Forecast) == [Forecast(seconds=200)]
    assert list(sentences(of(events, Forecast)[0])) == ["about 3 min 20 s"]


def test_a_job_shows_its_forecast():
    view = JobView("1", "style", "training", 0.0, {})
    view = fold(view, Told(1.0, Forecast(seconds=200, memory=5 * GB, available=8 * GB)))
    assert (view.eta, view.memory, view.available) == (200, 5 * GB, 8 * GB)
    assert view.log == ("needs 5.0 of 8.0 GB, about 3 min 20 s",)


def feed(shapes: dict[tuple[int, int], int], **changes) -> Feed:
    """`shapes`: (width, height) in pixels to the number of pictures."""
    text, item = {"context": torch.randn(77, 768)}, Item(Path("a.png"), "a cat", "metadata.csv")
    samples = [
        Sample(item, Bucket(w, h), torch.randn(1, 4, h // 8, w // 8), torch.zeros(1, 6), text, 77)
        for (w, h), count in shapes.items()
        for _ in range(count)
    ]
    return Feed(
        samples,
        Captions(Rules(), lambda caption: text),
        **{"batch_size": 4, "accumulation": 1, "seed": 0, "timesteps": 1000} | changes,
    )


def test_examples_are_one_a_shape_with_its_share_of_an_epoch():
    given = feed({(256, 256): 9, (512, 512): 4, (512, 448): 1})
    assert [(e.batch.shape, e.count) for e in given.examples()] == [
        ((4, 64, 64, 77), 1),
        ((4, 56, 64, 77), 1),
        ((4, 32, 32, 77), 3),
    ]
    assert sum(example.count for example in given.examples()) == given.batches_per_epoch
    split = feed({(256, 256): 9}, parts=2).examples()
    assert [(e.batch.shape, e.count) for e in split] == [((2, 32, 32, 77), 6)]


def test_need_is_said_in_words():
    assert str(Need(int(5.14 * GB), 8 * GB, 1, 1)) == "needs 5.1 of 8.0 GB"
    assert Need(8, 8, 1, 1).fits
    assert not Need(9, 8, 1, 1).fits


def test_only_several_slow_reports_without_free_memory_are_a_spill():
    scarce = [True]
    watch = Spill(0.1, lambda: scarce[0])
    assert not any(watch(0.29) for _ in range(10))
    assert [watch(0.5), watch(0.5), watch(0.1), watch(0.5), watch(0.5)] == [False] * 5
    assert watch(0.5)
    scarce[0] = False
    assert not any(watch(0.5) for _ in range(10))


class Ticking:
    """A clock that is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_others_did_meanwhile_is_no_slow_step():
    clock, seen = Ticking(), []
    source = torch.zeros(3)
    reports: list = []
    report = Results(source, 9, reports.append, 9, watch=lambda seconds: bool(seen.append(seconds)), clock=clock)
    for step, (mine, theirs) in enumerate([(1.0, 0.0), (1.5, 20.0), (4.0, 2**-7)], start=1):
        clock.now += mine + theirs
        report.shared(theirs)
        report.add(step, 0, 1e-4)
    assert seen == [1.0, 4 + 2**-7]
    assert [event.seconds for event in reports] == [1.0, 1.5, 4 + 2**-7]
    assert report.fastest == 1.0


@pytest.mark.parametrize(("spills", "scarce"), [(True, True), (True, False), (False, True)])
def test_memory_that_was_moved_away_is_out_of_memory(settings, imagine, expected, monkeypatch, spills, scarce):
    imagine(FakeGpu(5, 5, 5, seconds=1e-9, spills=spills, scarce=scarce))
    monkeypatch.setattr(results, "READ_EVERY_SECONDS", 0)
    events, got = train(settings)
    down = told(events, "has moved GPU memory")
    if not (spills and scarce):
        assert down == []
        assert weights(got) == expected
        return
    # Each plan is given a chance; the last one is kept, however slow.
    assert [text[:7] for text in down] == [f"step {1 + REPORTS}:"]
    assert [event.step for event in of(events, StepDone)] == [1, 2, 3, 4, 5, 6]
    assert of(events, Finished)[0].state == "done"
