"""What a process holds at one moment, and how fast each of it grows."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch


class Reading(NamedTuple):
    """After everything that can be freed has been."""

    # Bytes of physical memory, and those of them that the C heap (tensors, large objects) has given out.
    resident: int
    heap: int
    # Python's own small allocations, the objects its collector tracks, and the tensors among them.
    blocks: int
    objects: int
    tensors: int
    threads: int
    files: int


class Slope(NamedTuple):
    """Growth a job, and its standard error."""

    value: float
    error: float


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def available() -> bool:
    """Whether this system can be asked: Linux with glibc 2.33 or newer."""
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallinfo2")


@contextmanager
def frozen() -> Iterator[None]:
    """What is there already is left out of the objects, and collecting garbage takes no time for it."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def settle_interned(count: int = 1_000_000) -> None:
    """Python's table of interned strings keeps the places of those that are gone until none is free, and then makes
    itself anew by what is left, once 3.8 MB larger than before: after about 1,500 jobs, or at once here."""
    for _ in range(count):
        sys.intern(uuid.uuid4().hex)


def take() -> Reading:
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    libc.mallinfo2.restype = _Mallinfo2
    given = libc.mallinfo2()
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    objects = gc.get_objects()
    return Reading(
        resident=resident,
        heap=given.uordblks + given.hblkhd,
        blocks=sys.getallocatedblocks(),
        objects=len(objects),
        # Not isinstance, which asks lazy modules for their class.
        tensors=sum(issubclass(type(thing), torch.Tensor) for thing in objects),
        threads=len(os.listdir("/proc/self/task")),
        files=len(os.listdir("/proc/self/fd")),
    )


def slope(jobs: Sequence[int], values: Sequence[float]) -> Slope:
    """Least squares. Neighbouring readings are alike (a cache that grows once shows in all that follow), so the
    standard error is that of as many independent readings as these are worth, by the residuals' correlation."""
    count = len(jobs)
    x0, y0 = sum(jobs) / count, sum(values) / count
    spread = sum((x - x0) ** 2 for x in jobs)
    value = sum((x - x0) * (y - y0) for x, y in zip(jobs, values, strict=True)) / spread
    rest = [y - y0 - value * (x - x0) for x, y in zip(jobs, values, strict=True)]
    squares = sum(r * r for r in rest)
    alike = sum(a * b for a, b in pairwise(rest)) / squares if squares else 0.0
    alike = min(max(alike, 0.0), 0.9)
    return Slope(value, (squares / (count - 2) / spread * (1 + alike) / (1 - alike)) ** 0.5)
