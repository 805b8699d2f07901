"""What the benchmarks measure: step times, time the GPU was busy, and memory."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Sequence

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 10th and 90th percentile of step times in seconds, as milliseconds."""
    times = torch.tensor(seconds, dtype=torch.float64) * 1e3
    low, middle, high = torch.quantile(times, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return {"median_ms": round(middle, 3), "p10": round(low, 3), "p90": round(high, 3), "steps": len(seconds)}


def gaps(stamps: Sequence[float]) -> list[float]:
    """Times between successive moments."""
    return [later - earlier for earlier, later in itertools.pairwise(stamps)]


def profiler() -> profile:
    """Records the GPU's kernels and copies, nothing of the CPU."""
    return profile(activities=[ProfilerActivity.CUDA])


def busy_ms(record: profile) -> float:
    """Milliseconds in which at least one kernel or copy of a finished `record` ran."""
    # Marks such as "Optimizer.step" are laid over the GPU's time line too, gaps included.
    work = [
        (event.time_range.start, event.time_range.end)
        for event in record.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    total, until = 0.0, float("-inf")
    for start, end in sorted(work):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total / 1e3


def fresh_memory() -> None:
    """Forget what earlier work reserved, so that `peak_reserved` is the next work's."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_reserved() -> int | None:
    """Most bytes that torch held at once, graph pools included; None without a GPU."""
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None


def machine() -> dict[str, str]:
    """What the numbers depend on beside the options."""
    cuda = torch.cuda.is_available()
    return {"card": torch.cuda.get_device_name() if cuda else "cpu", "torch": torch.__version__}
