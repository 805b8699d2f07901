"""What a run needs from where it runs: small Protocols, one of which is `events.EventSink`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from PIL.Image import Image

    from lora_trainer.models.model import Model
    from lora_trainer.sampling import Recipe


class ModelSource(Protocol):
    """Where the base model comes from."""

    def borrow(self, storage: str | None = None) -> AbstractContextManager[Model]:
        """The model for one training segment; given back, unchanged, on exit. `storage` of its UNet: a
        `base_precision` that the host offers as lighter, else as the host has it."""
        ...


class GpuLease(Protocol):
    """The right to use the GPU; always taken outside `ModelSource.borrow`."""

    def hold(self) -> AbstractContextManager[None]: ...

    def hand_over(self, make_room: Callable[[], object] = ...) -> bool:
        """Let whoever waits use the GPU, at a step boundary, after `make_room()`.

        False when the model is no longer ours.
        """
        ...


class LoraStore(Protocol):
    """Where results go."""

    def free(self, name: str) -> bool:
        """Whether publishing under `name` overwrites nothing, or nothing but what may be. Raises ConfigError."""
        ...

    def publish(self, file: str, data: bytes, *, final: bool) -> Path:
        """Write `data` whole under `file` (a relative name). Raises OutputError, leaving nothing half-written."""
        ...


class Painter(Protocol):
    """Draws previews as the host draws pictures; only while its lease is held."""

    def draw(self, lora: bytes, prompts: Sequence[str], recipe: Recipe) -> Iterator[Image]:
        """A picture a prompt with `lora`, a file's bytes in the WebUI's form, at weight 1. Raises UserError."""
        ...


class Control(Protocol):
    """What is asked of a run from outside; it looks at every step boundary."""

    def stopping(self) -> bool:
        """Save what was learned and end."""
        ...

    def pausing(self) -> bool: ...

    def wait(self) -> None:
        """The run has paused: return when it is to go on or to stop."""
        ...


def nothing(storage: str) -> Sequence[str]:
    return ()


@dataclass(frozen=True)
class Host:
    """The place where a run happens. Without a painter the trainer draws previews itself. `lighter`: in which storages
    it can place the base that take less than the one given, the nearest first."""

    models: ModelSource
    lease: GpuLease
    store: LoraStore
    painter: Painter | None = None
    lighter: Callable[[str], Sequence[str]] = nothing
