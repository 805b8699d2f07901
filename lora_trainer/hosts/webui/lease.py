"""The WebUI's queue: one at a time uses the GPU, and whoever waits gets in at a step boundary."""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event
from weakref import WeakSet

from modules import devices, shared
from modules.call_queue import queue_lock

JOB = "LoRA training"
# Seconds in which a woken thread takes a free lock, one that was late before, and between two looks.
_PATIENCE, _OVERDUE, _POLL = 0.25, 0.02, 0.0002


@dataclass
class QueueLease:
    """`queue_lock` as a GpuLease. `still_ours` is asked after somebody else has had the lock, `give_back` at the end.

    The lock wakes who waits but does not hand itself over: who comes by, or releases it, can take it first, and
    whoever was woken then waits unlisted. So everybody is noted when listed, and at a boundary the lock is let go until
    each of those has had it. Who does not take it in time stays noted for the next boundary.
    """

    still_ours: Callable[[], bool]
    give_back: Callable[[], None]
    held: bool = field(default=False, init=False)
    # The event a thread waits for is its own, and is gone as soon as the thread has the lock.
    _waiting: WeakSet[Event] = field(default_factory=WeakSet, init=False)
    _disturbed: bool = field(default=False, init=False)

    @contextmanager
    def hold(self) -> Iterator[None]:
        with _noted(self._waiting), queue_lock:
            shared.state.begin(job=JOB)
            self.held = True
            try:
                yield
            finally:
                self.held = False
                try:
                    self.give_back()
                finally:
                    shared.state.end()
                    # What an error left behind lies in cycles that hold GPU memory.
                    gc.collect()
                    devices.torch_gc()

    def hand_over(self, make_room: Callable[[], object] = lambda: None) -> bool:
        if not self._waiting:
            return self._undisturbed()
        make_room()
        mirrored = _Mirror.of(shared.state)
        self._let_in()
        # What was interrupted was theirs: `begin` forgets it.
        shared.state.begin(job=JOB)
        mirrored.put(shared.state)
        self._disturbed = True
        return self._undisturbed()

    def _let_in(self) -> None:
        """Those who wait now; who comes meanwhile is let in at the next boundary, or training would never go on."""
        with queue_lock._inner_lock:
            waiting = WeakSet(self._waiting)
            patience = _PATIENCE if queue_lock._pending_threads else _OVERDUE
        while waiting and _let_one_in(waiting, patience):
            pass

    def disturb(self) -> None:
        """Somebody has used the model: at the next boundary it is looked at."""
        self._disturbed = True

    def _undisturbed(self) -> bool:
        disturbed, self._disturbed = self._disturbed, False
        return not disturbed or self.still_ours()


@dataclass(frozen=True)
class _Mirror:
    """What the progress bar shows of the job."""

    job_no: int
    job_count: int
    textinfo: str | None

    @classmethod
    def of(cls, state: shared.State) -> _Mirror:
        return cls(state.job_no, state.job_count, state.textinfo)

    def put(self, state: shared.State) -> None:
        state.job_no, state.job_count, state.textinfo = self.job_no, self.job_count, self.textinfo


@contextmanager
def _noted(waiting: WeakSet[Event]) -> Iterator[None]:
    """Whoever the lock lists is in `waiting` too. The lock looks at its list only under its inner lock."""
    before, listed = queue_lock._pending_threads, _Listed(waiting)
    _move(before, listed)
    try:
        yield
    finally:
        _move(listed, before)


def _move(before: deque[Event], after: deque[Event]) -> None:
    """`after` as the lock's list in place of `before`."""
    with queue_lock._inner_lock:
        while before:
            after.append(before.popleft())
        queue_lock._pending_threads = after


class _Listed(deque[Event]):
    """The lock's list of who waits."""

    def __init__(self, waiting: WeakSet[Event]) -> None:
        super().__init__()
        self._waiting = waiting

    def append(self, event: Event) -> None:
        self._waiting.add(event)
        super().append(event)


def _let_one_in(waiting: WeakSet[Event], patience: float) -> bool:
    """Let go of the lock once. Whether somebody took it within `patience` seconds."""
    count, taken = len(waiting), False
    deadline = time.perf_counter() + patience
    queue_lock.release()
    try:
        while not taken and time.perf_counter() < deadline:
            taken = queue_lock._lock.locked() or len(waiting) < count
            if not taken:
                time.sleep(_POLL)
    finally:
        # Behind those who are listed, and for as long as they need.
        queue_lock.acquire()
    return taken
