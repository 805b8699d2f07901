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


@contextmanager
def cudnn_settings(*, deterministic: bool) -> Iterator[None]:
    """cuDNN's fastest or its repeatable algorithms; restored afterwards, so that others draw as they always do."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    try:
        cudnn.benchmark, cudnn.deterministic = not deterministic, deterministic
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
