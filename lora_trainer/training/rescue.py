"""A finished LoRA is worth more than its place: what cannot be put there is put elsewhere."""

from __future__ import annotations

import tempfile
from pathlib import Path

from lora_trainer.errors import OutputError
from lora_trainer.files import publish


def rescued(file: str, data: bytes, error: OutputError) -> OutputError:
    """After `error` kept `data` from being published: the error to raise, which says where it is instead."""
    if not isinstance(error.__cause__, OSError):
        return error  # it is written, but not where it was wanted
    try:
        kept = Path(tempfile.mkdtemp(prefix="lora-trainer-")) / file
        publish(data, kept)
    except (OutputError, OSError):
        return OutputError(f"{error}. Make room and go on with the run (--resume): it only has to be saved")
    return OutputError(
        f"{error}. What was learned is in {kept}; make room and go on with the run (--resume) to save it"
    )
