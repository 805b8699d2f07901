"""What happens between two updates: intermediate saves, validations, previews."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Action = Callable[[int], object]


@dataclass(frozen=True)
class Boundaries:
    """Each action with how often it is due, in steps (0: never). The end of the run is the caller's."""

    actions: Sequence[tuple[int, Action]]
    steps: int

    def due(self, step: int) -> bool:
        return step < self.steps and any(every and step % every == 0 for every, _ in self.actions)

    def __call__(self, step: int) -> None:
        for every, action in self.actions:
            if every and step % every == 0:
                action(step)
