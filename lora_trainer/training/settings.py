"""Torch's process-wide settings, held for one run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch

# Of cuBLAS (https://docs.nvidia.com/cuda/cublas, "Results reproducibility").
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


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
def fast_or_repeatable(*, deterministic: bool) -> Iterator[None]:
    """Torch's fastest algorithms, or only those that repeat bit by bit: cuDNN's, and the backward pass of attention,
    which otherwise adds up in any order. Restored afterwards, so that others draw as they always do.

    An operation that has no repeatable form raises RuntimeError where `deterministic`.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    try:
        cudnn.benchmark, cudnn.deterministic = not deterministic, deterministic
        with _repeatable() if deterministic else nullcontext():
            yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


@contextmanager
def _repeatable() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # Torch 2.1 fills nothing and has no such setting.
    memory = getattr(torch.utils, "deterministic", SimpleNamespace(fill_uninitialized_memory=False))
    filled = memory.fill_uninitialized_memory
    workspace = os.environ.get(WORKSPACE)
    try:
        # Else torch refuses matrix products.
        os.environ.setdefault(WORKSPACE, ":4096:8")
        memory.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True)
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled
        if workspace is None:
            os.environ.pop(WORKSPACE, None)
