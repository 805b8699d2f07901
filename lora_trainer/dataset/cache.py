"""Encoded pictures and captions on disk, for the next run.

One .safetensors file an entry, named by a hash of all that its content depends on, so that runs and processes may
share a folder, and one that is interrupted leaves whole entries or none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from lora_trainer.adapters.writer import in_parts
from lora_trainer.errors import OutputError
from lora_trainer.files import publish, sweep_folder, trim

# About 30,000 pictures of 512 px.
MAX_BYTES = 8 * 1024**3


def key_of(*facts: object) -> str:
    """The name of what depends on `facts` and on nothing else."""
    return hashlib.sha256(repr(facts).encode("utf-8", "backslashreplace")).hexdigest()


@dataclass(frozen=True)
class Cache:
    """In `folder`; without one it keeps nothing. A disk that does not take an entry costs only time."""

    folder: Path | None

    def get(self, key: str) -> dict[str, Tensor] | None:
        if self.folder is None:
            return None
        path = self._path(key)
        with suppress(OSError, ValueError, safetensors.SafetensorError):
            tensors = safetensors.torch.load(path.read_bytes())
            # What was used last is kept longest.
            path.touch()
            return tensors
        return None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        if self.folder is not None:
            with suppress(OutputError):
                publish(in_parts(tensors, {}), self._path(key))

    def trim(self, limit: int = MAX_BYTES) -> None:
        """Remove the entries that were used longest ago, until the rest takes at most `limit` bytes."""
        if self.folder is None:
            return
        trim(self.folder.glob("*/*.safetensors"), limit)
        for folder in self.folder.glob("*/"):
            sweep_folder(folder)

    def _path(self, key: str) -> Path:
        # File systems slow down with very many files in one folder.
        return self.folder / key[:2] / f"{key[2:]}.safetensors"
