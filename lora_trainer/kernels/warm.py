"""Which kernels are in Triton's cache on disk: a small file for each thing that was compiled whole.

The files lie inside that cache, so that they go when it goes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_trainer.errors import OutputError
from lora_trainer.files import publish

FOLDER = "lora_trainer"


@dataclass(frozen=True)
class Warm:
    """`folder`: Triton's cache. `facts`: what compiled kernels depend on beside what a run computes."""

    folder: Path
    facts: Mapping[str, str]

    @classmethod
    def of(cls, device: torch.device) -> Warm:
        """Of this machine. Raises whatever a missing Triton or CUDA does."""
        import triton

        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")()
        facts = {
            "card": torch.cuda.get_device_name(device),
            "capability": capability,
            "driver": str(driver),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "kernels": sources(),
        }
        return cls(triton_cache(), facts)

    def __contains__(self, work: object) -> bool:
        return self._file(work).exists()

    def add(self, work: object) -> None:
        """All kernels of `work` are compiled. Where that cannot be written, the next run finds out anew."""
        with suppress(OutputError):
            told = json.dumps({"work": str(work), **self.facts}, indent=1)
            publish(told.encode(), self._file(work))

    def _file(self, work: object) -> Path:
        key = hashlib.sha256(repr((sorted(self.facts.items()), work)).encode()).hexdigest()
        return self.folder / FOLDER / f"{key[:32]}.json"


def sources() -> str:
    """A hash of the files that the kernels are made from."""
    whole = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("triton_*.py")):
        whole.update(path.read_bytes())
    return whole.hexdigest()[:16]


def triton_cache() -> Path:
    """Triton's folder: newer releases say so themselves."""
    given = os.environ.get("TRITON_CACHE_DIR")
    with suppress(ImportError, AttributeError):
        from triton import knobs

        given = given or knobs.cache.dir
    return Path(given) if given else Path.home() / ".triton" / "cache"
