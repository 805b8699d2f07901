"""The WebUI's queue between a job and whoever else wants the GPU."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field

import pytest

STEP = 0.002


@pytest.fixture
def lease(fake_webui):
    return fake_webui.host("lease").QueueLease(lambda: True, lambda: None)


class Listed(deque):
    """The lock's list of who waits; it notes after how many steps each was listed."""

    def __init__(self, job) -> None:
        super().__init__()
        self.job, self.at = job, threading.local()

    def append(self, event) -> None:
        self.at.steps = self.job["steps"]
        super().append(event)


@dataclass
class Visitor:
    """Waits in the queue `times` times, from some moment of a step on; how many steps ended before each turn."""

    lock: object
    job: dict
    times: int
    waited: list[int] = field(default_factory=list)

    def start(self) -> Visitor:
        self.thread = threading.Thread(target=self._visit, daemon=True)
        self.thread.start()
        return self

    def _visit(self) -> None:
        for n in range(self.times):
            time.sleep(STEP * (n % 7) / 7)
            listed = self.lock._pending_threads.at
            listed.steps = None
            with self.lock:
                assert not self.job["busy"]
                self.waited.append(0 if listed.steps is None else self.job["steps"] - listed.steps)
                time.sleep(STEP / 2)


def train_until(lease, job, visitors, seconds=30.0) -> None:
    deadline = time.monotonic() + seconds
    with lease.hold():
        while any(visitor.thread.is_alive() for visitor in visitors):
            assert time.monotonic() < deadline, [visitor.waited for visitor in visitors]
            job["busy"] = True
            time.sleep(STEP)
            job["busy"] = False
            job["steps"] += 1
            lease.hand_over()
            assert lease.held


def new_job(fake_webui) -> dict:
    job = {"steps": 0, "busy": False}
    fake_webui.lock._pending_threads = Listed(job)
    return job


def test_who_waits_gets_in_at_the_first_boundary(fake_webui, lease):
    job = new_job(fake_webui)
    visitor = Visitor(fake_webui.lock, job, 50).start()
    train_until(lease, job, [visitor])
    # The step at hand ends, never a second one.
    assert len(visitor.waited) == 50
    assert max(visitor.waited) <= 1
    assert not fake_webui.lock._lock.locked()
    assert not lease.held


@pytest.mark.xfail(
    sys.version_info < (3, 11),
    reason="two waiters beat each other to Python 3.10's locks, up to 6 boundaries",
    strict=False,
)
def test_two_who_wait_both_get_in(fake_webui, lease):
    job = new_job(fake_webui)
    visitors = [Visitor(fake_webui.lock, job, 20).start() for _ in range(2)]
    train_until(lease, job, visitors)
    assert [len(visitor.waited) for visitor in visitors] == [20, 20]
    assert max(visitor.waited[n] for visitor in visitors for n in range(20)) <= 2


def test_who_was_woken_too_late_is_let_in_at_the_next_boundary(fake_webui, lease, monkeypatch):
    """Woken, but the job took the lock again first: the waiter is no longer listed, so it is remembered."""
    monkeypatch.setattr(fake_webui.host("lease"), "_KNOWN_WAITER", 0.0)
    job = new_job(fake_webui)
    visitor = Visitor(fake_webui.lock, job, 20).start()
    train_until(lease, job, [visitor])
    assert len(visitor.waited) == 20
    assert max(visitor.waited) <= 3


def test_nobody_waits_nothing_is_released(fake_webui, lease):
    released = []
    release = fake_webui.lock.release
    with lease.hold():
        fake_webui.lock.release = lambda: (released.append(1), release())
        began = time.perf_counter()
        assert all(lease.hand_over() for _ in range(1000))
        assert time.perf_counter() - began < 0.5
        assert released == []
        del fake_webui.lock.release
    assert not fake_webui.lock._lock.locked()


def test_the_lock_is_free_after_an_error(fake_webui, lease):
    def fail() -> None:
        with lease.hold():
            assert fake_webui.state.job == "LoRA training"
            raise RuntimeError("by the test")

    with pytest.raises(RuntimeError, match="by the test"):
        fail()
    assert not fake_webui.lock._lock.locked()
    assert fake_webui.state.job == ""


def test_the_lock_is_free_when_giving_back_fails(fake_webui):
    def failing() -> None:
        raise OSError("by the test")

    lease = fake_webui.host("lease").QueueLease(lambda: True, failing)
    with pytest.raises(OSError, match="by the test"), lease.hold():
        pass
    assert not fake_webui.lock._lock.locked()
    assert fake_webui.state.job == ""


@pytest.mark.parametrize("mine", [True, False])
def test_after_others_it_is_asked_whether_the_model_is_still_ours(fake_webui, mine):
    asked = []
    lease = fake_webui.host("lease").QueueLease(lambda: bool(asked.append(1)) or mine, lambda: None)
    with lease.hold():
        assert lease.hand_over() is True
        assert asked == []
        visitor = Visitor(fake_webui.lock, new_job(fake_webui), 1).start()
        while not fake_webui.lock._pending_threads:
            time.sleep(STEP / 4)
        assert lease.hand_over() is mine
        assert asked == [1]
        visitor.thread.join(5)
        # Previews are drawn by the WebUI as well.
        lease.disturb()
        assert lease.hand_over() is mine
        assert asked == [1, 1]


def test_what_others_were_interrupted_with_is_not_the_jobs(fake_webui, lease):
    interrupted = fake_webui.host("interrupt").interrupted

    def visit() -> None:
        with fake_webui.lock:
            fake_webui.state.begin(job="theirs")
            fake_webui.state.interrupt()

    with lease.hold():
        fake_webui.state.job_no, fake_webui.state.job_count, fake_webui.state.textinfo = 3, 9, "step 3"
        thread = threading.Thread(target=visit, daemon=True)
        thread.start()
        while not fake_webui.lock._pending_threads:
            time.sleep(STEP / 4)
        lease.hand_over()
        assert not interrupted()
        state = fake_webui.state
        assert (state.job, state.job_no, state.job_count, state.textinfo) == ("LoRA training", 3, 9, "step 3")
        state.interrupt()
        assert interrupted()
    thread.join(5)


def test_reload_ui_is_told_from_interrupt_once(fake_webui):
    interrupt, state = fake_webui.host("interrupt"), fake_webui.state
    interrupt.watch_reloads()
    interrupt.watch_reloads()
    state.request_restart()
    assert state.server_command == "restart"
    assert not interrupt.interrupted()
    state.interrupt()
    assert interrupt.interrupted()
