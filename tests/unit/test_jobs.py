"""The queue: one after another, states in order, everything found again by the next process."""

from __future__ import annotations

import threading
import time

import pytest

from lora_trainer.config import Config
from lora_trainer.curve import Point
from lora_trainer.errors import DataError, OutputError
from lora_trainer.events import Finished, Notice, Progress, RateFound, RateTried, Saved, StepDone, Validated
from lora_trainer.jobs.fold import MOST_LOSSES, Changed, Told, fold
from lora_trainer.jobs.service import JobService
from lora_trainer.jobs.states import ENDED, FOLLOWS, STATES
from lora_trainer.jobs.store import EVENTS, Head, JobFolder, first_view, read_jobs
from lora_trainer.jobs.view import JobView

CONFIG = Config(base_model="model.safetensors", train_data_dir="pictures", output_dir="out", output_name="style")
SWEEP = ((1e-5, 0.5), (1e-4, 0.4), (1e-3, 0.45))


def step(number: int, steps: int = 10, loss: float = 0.5) -> StepDone:
    return StepDone(step=number, steps=steps, epoch=1, loss=loss, learning_rate=1e-4, grad_norm=1.0, seconds=2.0)


def finished(state="done", steps=10) -> Finished:
    return Finished(state=state, output=["out/style.safetensors"], steps=steps, loss=0.25, seconds=3.0)


class Work:
    """Work that a test holds in its hands: it takes steps while it is let go, and ends when told."""

    def __init__(self) -> None:
        self.began, self.go = threading.Event(), threading.Event()
        self.names: list[str] = []
        self.raises: Exception | None = None

    def __call__(self, id, config, sink, control):
        self.names.append(config.output_name)
        sink(Progress(stage="encoding images", done=1, total=2))
        sink(step(1))
        self.began.set()
        while not self.go.wait(0.005):
            if control.stopping():
                return finished("stopped", 1)
            if control.pausing():
                control.wait()
        if self.raises:
            raise self.raises
        sink(step(2, loss=0.3))
        sink(Saved(path="out/style.safetensors", step=2, kind="lora"))
        return finished(steps=2)


@pytest.fixture
def work():
    return Work()


@pytest.fixture
def service(tmp_path, work):
    service = JobService(tmp_path / "jobs", work)
    yield service
    service.close()


def until(what, timeout=60.0):
    deadline = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


def named(name: str) -> Config:
    return Config(base_model="m", train_data_dir="p", output_dir="o", output_name=name)


def ended(service, job) -> JobView:
    until(lambda: service.job(job.id).state in ENDED)
    return service.job(job.id)


def test_a_job_runs_and_its_view_says_everything(service, work):
    job = service.submit(CONFIG)
    assert (job.state, job.name) == ("queued", "style")
    assert work.began.wait(5)
    seen = service.job(job.id)
    assert (seen.state, seen.step, seen.steps, seen.loss, seen.eta) == ("training", 1, 10, 0.5, 18.0)
    work.go.set()
    seen = ended(service, job)
    assert (seen.state, seen.step, seen.loss, seen.eta) == ("done", 2, 0.3, None)
    assert seen.losses == ((1, 0.5), (2, 0.3))
    assert seen.output == ("out/style.safetensors",)
    assert seen.created <= seen.started <= seen.finished


def test_jobs_run_one_after_another_in_order(service, work):
    first, second = service.submit(named("one")), service.submit(named("two"))
    assert work.began.wait(5)
    assert service.job(second.id).state == "queued"
    assert [view.id for view in service.jobs()] == [second.id, first.id]
    work.go.set()
    ended(service, second)
    assert work.names == ["one", "two"]


def test_a_running_job_stops_at_its_next_step_and_a_waiting_one_at_once(service, work):
    first, second = service.submit(named("one")), service.submit(named("two"))
    assert work.began.wait(5)
    assert service.stop(second.id).state == "stopped"
    service.stop(first.id)
    assert ended(service, first).state == "stopped"
    assert work.names == ["one"]


@pytest.mark.parametrize(
    ("error", "said"),
    [(DataError("pictures: it has no pictures"), "pictures: it has no pictures"), (ZeroDivisionError("x"), "ZeroDivi")],
)
def test_a_failure_is_told_and_the_next_job_runs(service, work, error, said):
    work.raises = error
    job = service.submit(CONFIG)
    assert work.began.wait(5)
    work.go.set()
    seen = ended(service, job)
    assert seen.state == "failed"
    assert said in seen.error
    # What an issue about it needs, without where things are kept.
    assert all(words in seen.details for words in (type(error).__name__, "LoRA Trainer", "Python", "Traceback"))
    assert "output_name: 'style'" in seen.details
    work.raises = None
    assert ended(service, service.submit(CONFIG)).state == "done"


def test_the_next_process_sees_the_same(tmp_path, service, work):
    job = service.submit(CONFIG)
    assert work.began.wait(5)
    work.go.set()
    seen = ended(service, job)
    service.close()
    again = JobService(tmp_path / "jobs", work)
    try:
        assert again.job(job.id) == seen
    finally:
        again.close()


def died(folder, *jobs: tuple[str, tuple[str, ...]]) -> None:
    """What a killed process leaves: jobs with their states."""
    for id, states in jobs:
        settings = {"base_model": "m", "train_data_dir": "p", "output_name": id}
        job = JobFolder.create(folder, Head(id, "style", 1.0, settings))
        for state in states:
            job.append(Changed(2.0, state), durable=True)
        job.close()


def test_the_queue_survives_its_process_and_what_ran_waits_to_go_on(tmp_path, work):
    folder = tmp_path / "jobs"
    died(folder, ("a", ("preparing", "training")), ("b", ()), ("c", ("preparing", "training", "done")))
    # The crash cut a line in the middle.
    with (folder / "a" / EVENTS).open("ab") as file:
        file.write(b'{"type":"told","at":3.0,"ev')
    (folder / "not-a-job").mkdir()
    service = JobService(folder, work)
    try:
        states = {"a": "paused", "b": "queued", "c": "done"}
        assert {view.id: view.state for view in service.jobs()} == states
        assert "Continue" in service.job("a").stage
        # And that is on disk too.
        assert {view.id: view.state for view in read_jobs(folder)} == states
        assert not work.began.wait(0.1)
        work.go.set()
        service.go_on("a")
        assert ended(service, service.job("b")).state == "done"
        assert service.job("a").state == "done"
        assert work.names == ["a", "b"]
    finally:
        service.close()


def test_the_order_of_the_queue_survives_too(tmp_path, work):
    for id, created in (("20261124-1-b", 1.1), ("20261124-1-a", 1.2)):
        settings = {"base_model": "m", "train_data_dir": "p", "output_name": id}
        JobFolder.create(tmp_path, Head(id, "style", created, settings))
    work.go.set()
    service = JobService(tmp_path, work)
    try:
        ended(service, service.job("20261124-1-a"))
        assert work.names == ["20261124-1-b", "20261124-1-a"]
    finally:
        service.close()


def test_an_interrupted_job_that_is_stopped_runs_once_more_to_save(tmp_path, work):
    died(tmp_path, ("a", ("preparing", "training", "saving")))
    service = JobService(tmp_path, work)
    try:
        service.stop("a")
        assert ended(service, service.job("a")).state == "stopped"
        assert work.names == ["a"]
    finally:
        service.close()


def test_a_pause_waits_for_continue_and_holds_back_who_waits(service, work):
    first, second = service.submit(named("one")), service.submit(named("two"))
    assert work.began.wait(5)
    service.pause(first.id)
    until(lambda: service.job(first.id).state == "paused")
    assert service.job(second.id).state == "queued"
    service.go_on(first.id)
    until(lambda: service.job(first.id).state != "paused")
    work.go.set()
    assert ended(service, second).state == "done"
    assert work.names == ["one", "two"]


def test_a_paused_job_can_be_stopped(service, work):
    job = service.submit(CONFIG)
    assert work.began.wait(5)
    service.pause(job.id)
    until(lambda: service.job(job.id).state == "paused")
    service.stop(job.id)
    assert ended(service, job).state == "stopped"


def test_a_waiting_job_can_be_paused(service, work):
    first, second = service.submit(named("one")), service.submit(named("two"))
    assert service.pause(second.id).state == "paused"
    work.go.set()
    ended(service, first)
    assert service.job(second.id).state == "paused"
    service.go_on(second.id)
    assert ended(service, second).state == "done"


@pytest.mark.parametrize("ends", ["stopped", "failed"])
def test_what_was_not_finished_goes_on(service, work, ends):
    work.raises = DataError("the disk is full") if ends == "failed" else None
    job = service.submit(CONFIG)
    assert work.began.wait(5)
    if ends == "stopped":
        service.stop(job.id)
    else:
        work.go.set()
    assert ended(service, job).state == ends
    work.raises = None
    work.go.set()
    assert service.go_on(job.id).state in ("queued", "preparing")
    until(lambda: service.job(job.id).state == "done")
    assert service.job(job.id).error is None
    assert service.go_on(job.id).state == "done"


def test_a_line_cut_by_a_crash_does_not_swallow_what_follows(tmp_path):
    job = JobFolder.create(tmp_path, Head("a", "style", 1.0, {}))
    job.append(Changed(2.0, "preparing"), durable=True)
    job.close()
    with (tmp_path / "a" / EVENTS).open("ab") as file:
        file.write(b'{"type":"told","at":3.0,"ev')
    job.append(Changed(4.0, "failed", "closed"), durable=True)
    job.close()
    (view,) = read_jobs(tmp_path)
    assert (view.state, view.error) == ("failed", "closed")


def test_what_cannot_be_written_is_not_queued(tmp_path, work):
    (tmp_path / "jobs").write_text("a file")
    service = JobService(tmp_path / "jobs", work)
    try:
        with pytest.raises(OutputError, match="jobs"):
            service.submit(CONFIG)
        assert service.jobs() == []
    finally:
        service.close()


def test_a_search_for_a_learning_rate_is_a_job_of_another_kind(tmp_path, work):
    def find(id, config, sink, control):
        for step, (rate, loss) in enumerate(SWEEP):
            sink(RateTried(step=4 * step, steps=8, learning_rate=rate, loss=loss, eta=5.0))
        sink(RateFound(learning_rate=1e-4, why="it fell"))
        return Finished(state="done", output=[], steps=8, loss=None, seconds=1.0)

    service = JobService(tmp_path, work, find=find)
    try:
        work.go.set()
        searched, trained = service.submit(CONFIG, "find-lr"), service.submit(CONFIG)
        seen = ended(service, searched)
        assert (seen.kind, seen.sweep, seen.suggested, seen.why) == ("find-lr", SWEEP, 1e-4, "it fell")
        assert (seen.step, seen.steps, seen.losses, seen.output) == (8, 8, (), ())
        assert "learning_rate=0.0001: it fell" in seen.log
        other = ended(service, trained)
        assert (other.kind, other.sweep, other.step) == ("train", (), 2)
    finally:
        service.close()
    assert seen in list(read_jobs(tmp_path))


def test_a_sweep_that_begins_again_takes_the_place_of_the_one_before():
    view = first_view(Head("a", "style", 1.0, {}, "find-lr"))
    for number, (rate, loss) in enumerate(SWEEP):
        view = fold(view, Told(1.0, RateTried(step=number, steps=2, learning_rate=rate, loss=loss)))
    view = fold(view, Told(1.0, RateFound(learning_rate=1e-4, why="it fell")))
    view = fold(view, Told(1.0, RateTried(step=0, steps=2, learning_rate=1e-5, loss=0.6)))
    assert (view.sweep, view.suggested, view.why, view.step) == (((1e-5, 0.6),), None, None, 0)


def test_an_interrupted_search_says_that_it_begins_again(tmp_path, work):
    JobFolder.create(tmp_path, Head("a", "style", 1.0, {"base_model": "m", "train_data_dir": "p"}, "find-lr"))
    job = JobFolder(tmp_path / "a")
    for state in ("preparing", "training"):
        job.append(Changed(2.0, state), durable=True)
    job.close()
    service = JobService(tmp_path, work, find=work)
    try:
        assert (service.job("a").state, "begins again" in service.job("a").stage) == ("paused", True)
    finally:
        service.close()


def test_unknown_jobs(service):
    for ask in (service.job, service.stop, service.pause, service.go_on, service.folder_of):
        with pytest.raises(DataError, match="no job 'x'"):
            ask("x")


def test_every_state_ends_somewhere_and_what_is_done_stays():
    assert set(FOLLOWS) == set(STATES)
    assert FOLLOWS["done"] == set()
    assert all(following == {"queued"} for state, following in FOLLOWS.items() if state in ENDED - {"done"})
    assert all(following & ENDED for state, following in FOLLOWS.items() if state not in ENDED)


def test_a_step_that_comes_again_takes_the_place_of_what_came_after_it():
    view = first_view(Head("a", "style", 1.0, {}))
    for number in (1, 2, 3, 4):
        view = fold(view, Told(1.0, step(number, loss=number)))
    view = fold(view, Told(1.0, Validated(step=4, base=0.5, lora=0.4)))
    view = fold(view, Told(1.0, Saved(path="a-4", step=4, kind="checkpoint")))
    view = fold(view, Told(1.0, step(3, loss=9)))
    assert view.losses == ((1, 1), (2, 2), (3, 9))
    view = fold(view, Told(1.0, Validated(step=4, base=0.5, lora=0.3)))
    view = fold(view, Told(1.0, Saved(path="a-4", step=4, kind="checkpoint")))
    assert (view.validations, view.output) == ((Point(4, 0.5, 0.3),), ("a-4",))


def test_folding():
    view = first_view(Head("a", "style", 1.0, {}))
    for line in (
        Changed(2.0, "preparing", "waiting for the WebUI"),
        Told(2.5, Progress(stage="encoding images", done=3, total=9)),
        Told(3.0, Notice(text="one picture is broken", level="warning")),
        Told(4.0, Validated(step=0, base=0.5, lora=0.5, train=0.4, train_base=0.4)),
    ):
        view = fold(view, line)
    assert (view.state, view.stage, view.started) == ("preparing", "encoding images 3 of 9", 2.0)
    assert view.log[0] == "warning: one picture is broken"
    assert view.validations == (Point(0, 0.5, 0.5, 0.4, 0.4),)
    for number in range(1, 3 * MOST_LOSSES):
        view = fold(view, Told(5.0, step(number, steps=9999)))
    assert len(view.losses) <= MOST_LOSSES + 1
    assert view.losses[0] == (1, 0.5)
    assert view.losses[-1][0] == 3 * MOST_LOSSES - 1
