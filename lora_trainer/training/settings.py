"""Torch's process-wide settings, held for one run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_settings(cpu_threads: int | None) -> Iterator[None]:
    """`cpu_threads` for the run (None leaves them); restored afterwards."""
    before = torch.get_num_threads()
    try:
        if cpu_threads is not None:
            torch.set_num_threads(cpu_threads)
        yield
    finally:
        torch.set_num_threads(before)
