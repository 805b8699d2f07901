"""The WebUI's queue between a job and whoever else wants the GPU."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import pytest

STEP = 0.002


@pytest.fixture
def lease(fake_webui):
    return fake_webui.host("lease").QueueLease(lambda: True, lambda: None)


class Turns:
    """`threading` as the lock sees it: it notes after how many steps each thread was listed."""

    def __init__(self, job) -> None:
        self.job, self.at = job, threading.local()

    def Event(self) -> threading.Event:
        self.at.steps = self.job["steps"]
        return threading.Event()


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
            listed = self.job["turns"].at
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
    job["turns"] = fake_webui("fifo_lock").threading = Turns(job)
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


@pytest.mark.parametrize("count", [2, 5])
def test_all_who_wait_get_in_at_the_first_boundary(fake_webui, lease, count):
    """Also while those who have had their turn come back at once and are faster than who was woken."""
    job = new_job(fake_webui)
    visitors = [Visitor(fake_webui.lock, job, 50).start() for _ in range(count)]
    train_until(lease, job, visitors)
    assert [len(visitor.waited) for visitor in visitors] == [50] * count
    assert max(n for visitor in visitors for n in visitor.waited) <= 1


def test_who_was_woken_too_late_is_let_in_at_the_next_boundary(fake_webui, lease, monkeypatch):
    """Woken, but the job took the lock again first: the waiter is no longer listed, so it is remembered."""
    monkeypatch.setattr(fake_webui.host("lease"), "_PATIENCE", 0.0)
    job = new_job(fake_webui)
    visitor = Visitor(fake_webui.lock, job, 20).start()
    train_until(lease, job, [visitor])
    assert len(visitor.waited) == 20
    assert max(visitor.waited) <= 3


def test_who_holds_the_lock_for_long_is_waited_for(fake_webui, lease):
    visitors = [threading.Thread(target=hold, args=(fake_webui.lock, 0.4), daemon=True) for _ in range(2)]
    with lease.hold():
        for visitor in visitors:
            visitor.start()
        while len(fake_webui.lock._pending_threads) < 2:
            time.sleep(STEP / 4)
        lease.hand_over()
        assert lease.held
        assert fake_webui.lock._lock.locked()
        for visitor in visitors:
            visitor.join(0.2)
            assert not visitor.is_alive()


def hold(lock, seconds) -> None:
    with lock:
        time.sleep(seconds)


def test_who_waits_no_longer_is_not_waited_for(fake_webui, lease):
    """A listed thread that died; the second one's event lives on, as in a debugger."""
    kept = threading.Event()
    fake_webui.lock._pending_threads.extend([threading.Event(), kept])
    with lease.hold():
        began = time.perf_counter()
        assert all(lease.hand_over() for _ in range(5))
        assert time.perf_counter() - began < 2
        del kept
        began = time.perf_counter()
        assert all(lease.hand_over() for _ in range(1000))
        assert time.perf_counter() - began < 2
    assert not fake_webui.lock._lock.locked()


def test_nobody_waits_nothing_is_released(fake_webui, lease):
    released = []
    release = fake_webui.lock.release
    with lease.hold():
        fake_webui.lock.release = lambda: (released.append(1), release())
        began = time.perf_counter()
        assert all(lease.hand_over() for _ in range(1000))
        assert time.perf_counter() - began < 2
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
