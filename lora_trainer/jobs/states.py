"""The kinds of jobs, their states, and which may follow which."""

from __future__ import annotations

from typing import Literal, get_args

Kind = Literal["train", "find-lr"]
State = Literal["queued", "preparing", "training", "paused", "saving", "done", "stopped", "failed"]
STATES: tuple[State, ...] = get_args(State)
ENDED: frozenset[State] = frozenset({"done", "stopped", "failed"})

FOLLOWS: dict[State, frozenset[State]] = {
    "queued": frozenset({"preparing", "paused", "stopped", "failed"}),
    "preparing": frozenset({"training", "paused", "saving", "stopped", "failed", "done"}),
    "training": frozenset({"paused", "saving", "done", "stopped", "failed"}),
    "paused": frozenset({"preparing", "stopped", "failed"}),
    "saving": frozenset({"training", "paused", "done", "stopped", "failed"}),
    "done": frozenset(),
    # What was not finished can be gone on with.
    "stopped": frozenset({"queued"}),
    "failed": frozenset({"queued"}),
}
