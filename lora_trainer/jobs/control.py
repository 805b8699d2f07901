"""What the user asks of a job, as the job sees it (hosts.ports.Control)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class JobControl:
    """Set from any thread. `entered(paused)` is told when the run really pauses and goes on."""

    entered: Callable[[bool], object] = lambda paused: None
    _changed: threading.Condition = field(default_factory=threading.Condition, init=False)
    _stop: bool = field(default=False, init=False)
    _pause: bool = field(default=False, init=False)

    def stop(self) -> None:
        self._set(stop=True, pause=False)

    def pause(self) -> None:
        self._set(stop=self._stop, pause=not self._stop)

    def go_on(self) -> None:
        self._set(stop=False, pause=False)

    def stopping(self) -> bool:
        return self._stop

    def pausing(self) -> bool:
        return self._pause

    def wait(self) -> None:
        self.entered(True)
        with self._changed:
            self._changed.wait_for(lambda: not self._pause)
        self.entered(False)

    def _set(self, *, stop: bool, pause: bool) -> None:
        with self._changed:
            self._stop, self._pause = stop, pause
            self._changed.notify_all()
