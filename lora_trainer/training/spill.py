"""Memory that ran out without a word."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

SLOWER = 3
REPORTS = 3


@dataclass
class Spill:
    """Whether the driver has moved GPU memory into the system's instead of saying that there is none left.

    Steps then take many times as long. Asked with the seconds a step of each report in which nobody else had the GPU,
    it says so when several in a row are SLOWER times what the slowest step took in the rehearsal, and next to no memory
    is free: smaller or larger pictures, other users of the GPU or a hot one do not explain that.
    """

    slowest: float
    scarce: Callable[[], bool]
    in_a_row: int = 0

    def __call__(self, seconds: float) -> bool:
        slow = seconds > SLOWER * self.slowest and self.scarce()
        self.in_a_row = self.in_a_row + 1 if slow else 0
        return self.in_a_row >= REPORTS
