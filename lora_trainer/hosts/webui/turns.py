"""Captioning and whoever else wants the GPU take turns."""

from __future__ import annotations

import time
from collections.abc import Callable

from modules import devices, shared
from modules.call_queue import queue_lock
from PIL.Image import Image

from lora_trainer.captioning.words import Captioner, Words
from lora_trainer.hosts.webui.interrupt import interrupted

JOB = "Captioning"
# A turn lasts this many seconds: to let somebody in costs a training the memory of its graphs, so single pictures
# would slow it down. If somebody waits, they then have this many times as long.
TURN, OTHERS = 3.0, 2.0
# Whoever was woken needs a moment to take the lock.
_YIELD = 0.01


class InTurns:
    """A captioner that works under the WebUI's queue lock, and rests between its turns.

    The WebUI's Interrupt during a turn means stop, as `asked` does.
    """

    def __init__(self, captioner: Captioner, asked: Callable[[], bool]) -> None:
        self._captioner, self._asked = captioner, asked
        self.name = captioner.name
        self._interrupted = False
        self._began: float | None = None
        self._free_at = 0.0

    def stopping(self) -> bool:
        return self._asked() or self._interrupted

    def caption(self, image: Image) -> Words:
        """Raises UserError; the lock is then free."""
        if self._began is None:
            self._enter()
        try:
            words = self._captioner.caption(image)
        except BaseException:
            self.rest()
            raise
        self._interrupted = self._interrupted or interrupted()
        if time.monotonic() - self._began >= TURN:
            self.rest()
        return words

    def rest(self) -> None:
        """The end of a turn: memory and lock are given back."""
        if self._began is None:
            return
        now = time.monotonic()
        taken, self._began = now - self._began, None
        waits = bool(queue_lock._pending_threads)
        self._free_at = now + (OTHERS * taken if waits else _YIELD)
        try:
            self._captioner.rest()
        finally:
            shared.state.end()
            devices.torch_gc()
            queue_lock.release()

    def _enter(self) -> None:
        while time.monotonic() < self._free_at and not self.stopping():
            time.sleep(_YIELD)
        queue_lock.acquire()
        self._began = time.monotonic()
        shared.state.begin(job=JOB)
