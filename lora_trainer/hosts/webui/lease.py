"""The WebUI's queue: one at a time uses the GPU, and whoever waits gets in at a step boundary."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from modules import devices, shared
from modules.call_queue import queue_lock

JOB = "LoRA training"
_GRACE, _KNOWN_WAITER, _POLL = 0.02, 0.25, 0.0002


@dataclass
class QueueLease:
    """`queue_lock` as a GpuLease. `still_ours` is asked after somebody else has had the lock, `give_back` at the end.

    The lock wakes who waits but does not hand itself over: who releases can take it again first, and whoever was
    woken then waits unlisted. So after a release we wait until another holder is seen, and when none was seen in time
    we let go at the next boundary too.
    """

    still_ours: Callable[[], bool]
    give_back: Callable[[], None]
    held: bool = field(default=False, init=False)
    _owed: bool = field(default=False, init=False)
    _disturbed: bool = field(default=False, init=False)

    @contextmanager
    def hold(self) -> Iterator[None]:
        with queue_lock:
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
        waiting = _waiting()
        if not waiting and not self._owed:
            return self._undisturbed()
        make_room()
        mirrored = _Mirror.of(shared.state)
        queue_lock.release()
        try:
            seen = _another_holder(_KNOWN_WAITER if waiting else _GRACE)
        finally:
            queue_lock.acquire()
        self._owed = waiting and not seen
        # What was interrupted was theirs: `begin` forgets it.
        shared.state.begin(job=JOB)
        mirrored.put(shared.state)
        self._disturbed = True
        return self._undisturbed()

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


def _waiting() -> bool:
    return bool(queue_lock._pending_threads)


def _another_holder(seconds: float) -> bool:
    """Whether somebody took the lock within `seconds` of our release."""
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        if queue_lock._lock.locked():
            return True
        time.sleep(_POLL)
    return False
