"""What may be asked of a run from outside (hosts.ports.Control)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def never() -> bool:
    return False


@dataclass(frozen=True)
class StopOnly:
    """A Control that stops when `stop` says so and never pauses."""

    stop: Callable[[], bool] = never

    def stopping(self) -> bool:
        return self.stop()

    def pausing(self) -> bool:
        return False

    def wait(self) -> None:
        """Never asked to."""
