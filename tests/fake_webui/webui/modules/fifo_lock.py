import collections
import threading


class FIFOLock:
    """Release wakes who has waited longest, but whoever asks first after it gets the lock: also who has released it.

    The woken one then waits for `_lock` itself, no longer listed in `_pending_threads`.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._inner_lock = threading.Lock()
        self._pending_threads = collections.deque()

    def acquire(self, blocking=True):
        with self._inner_lock:
            taken = self._lock.acquire(blocking=False)
            if taken or not blocking:
                return taken
            turn = threading.Event()
            self._pending_threads.append(turn)
        turn.wait()
        return self._lock.acquire()

    def release(self):
        with self._inner_lock:
            if self._pending_threads:
                self._pending_threads.popleft().set()
            self._lock.release()

    __enter__ = acquire

    def __exit__(self, t, v, tb):
        self.release()
