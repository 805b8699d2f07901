"""Torch's process-wide settings, held for one run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_settings(cpu_threads: int | None, *, deterministic: bool = False) -> Iterator[None]:
    """`cpu_threads` for the run (None leaves them), cuDNN's fastest or its repeatable algorithms; then as before."""
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    try:
        cudnn.benchmark, cudnn.deterministic = not deterministic, deterministic
        if cpu_threads is not None:
            torch.set_num_threads(cpu_threads)
        yield
    finally:
        torch.set_num_threads(threads)
        cudnn.benchmark, cudnn.deterministic = before
