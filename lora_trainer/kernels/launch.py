"""The one door to Triton's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., object]:
    """`kernel[grid]`. On meta tensors nothing runs: as torch only works out shapes there, Triton only compiles, for the
    current device, and keeps the result in its cache on disk."""

    def go(*args: object, **options: object) -> object:
        if any(isinstance(arg, Tensor) and arg.is_meta for arg in args):
            return kernel.warmup(*args, grid=grid, **options)
        return kernel[grid](*args, **options)

    return go
