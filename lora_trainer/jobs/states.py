"""The states of a job, and which may follow which."""

from __future__ import annotations

from typing import Literal, get_args

State = Literal["queued", "preparing", "training", "paused", "saving", "done", "stopped", "failed"]
STATES: tuple[State, ...] = get_args(State)
ENDED: frozenset[State] = frozenset({"done", "stopped", "failed"})

FOLLOWS: dict[State, frozenset[State]] = {
    "queued": frozenset({"preparing", "stopped", "failed"}),
    "preparing": frozenset({"training", "stopped", "failed", "done"}),
    "training": frozenset({"paused", "saving", "done", "stopped", "failed"}),
    "paused": frozenset({"training", "saving", "stopped", "failed"}),
    "saving": frozenset({"training", "done", "stopped", "failed"}),
    "done": frozenset(),
    "stopped": frozenset(),
    "failed": frozenset(),
}
