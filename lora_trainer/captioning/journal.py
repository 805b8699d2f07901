"""What an interrupted run has done, so that the next one does only the rest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import msgspec

from lora_trainer.captioning.options import CaptionOptions
from lora_trainer.files import publish, remove

NAME = ".lora-trainer-captioning.json"


class Journal:
    """A hidden file beside the captions for as long as a run over them has not ended: its pictures are those done.

    Only for runs that touch pictures with captions: in others, having one means done. It is written after the
    captions, so after a crash a few pictures are done twice, which changes nothing.
    """

    def __init__(self, place: Path, captioner: str, options: CaptionOptions) -> None:
        self._path = (place if place.is_dir() else place.parent) / NAME
        told = repr((str(place.resolve()), captioner, msgspec.structs.astuple(options)))
        self._run = hashlib.sha256(told.encode()).hexdigest()
        self._active = options.existing != "skip"
        self.done = set(self._read()) if self._active else set()

    def publish(self) -> None:
        """Raises OutputError."""
        if self._active and self.done:
            publish(json.dumps({"run": self._run, "done": sorted(self.done)}).encode(), self._path)

    def close(self) -> None:
        """The run has ended with every picture seen."""
        if self._active:
            remove(self._path)

    def _read(self) -> list[str]:
        """Nothing of another run, nor of a file that cannot be read."""
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            return [str(name) for name in found["done"]] if found["run"] == self._run else []
        except (OSError, ValueError, KeyError, TypeError):
            return []
