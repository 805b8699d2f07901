"""Many jobs in one process: what it holds does not grow with them.

Growth is what is above ALLOWED by four standard errors. The errors come from the readings themselves, so a noisy figure
is judged mildly and a quiet one sharply: the C heap moves by about a kilobyte between rounds, and a leak of 4 KB a job
shows there within sixty jobs. Physical memory moves by megabytes, since each thread's heap keeps some free pages, and
says as much only over a thousand jobs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pytest

from tests.soak import readings
from tests.soak.jobs import KINDS, Bench
from tests.soak.readings import Reading, Slope

# Growth a job that is none: a table that is enlarged, a cache's last entries, the about eight numbers torch 2.1 keeps.
ALLOWED = Reading(resident=2048, heap=1024, blocks=12, objects=1, tensors=0.02, threads=0.02, files=0.02)
ERRORS = 4
# Growth a job that has to be found.
LEAKS = {"resident": 4096, "heap": 4096, "threads": 0.1, "files": 0.1}
ROUND = len(KINDS)

pytestmark = pytest.mark.skipif(not readings.available(), reason="needs Linux with glibc 2.33")


def soak(one_round: Callable[[int], object], rounds: int, warm_up: int) -> np.ndarray:
    """A Reading after the last round of the warm-up and each that follows, [readings, fields]."""
    # Made beforehand, so that keeping them is no growth.
    taken = np.zeros((rounds - warm_up + 1, len(Reading._fields)), np.int64)
    with readings.frozen():
        for number in range(rounds):
            one_round(number)
            if number >= warm_up - 1:
                taken[number - warm_up + 1] = readings.take()
    return taken


def slopes(taken: Sequence[Sequence[float]] | np.ndarray) -> dict[str, Slope]:
    """Of each figure of a Reading, a job."""
    jobs = [ROUND * index for index in range(len(taken))]
    return {
        name: readings.slope(jobs, figures)
        for name, figures in zip(Reading._fields, np.transpose(taken).tolist(), strict=True)
    }


def growing(found: Mapping[str, Slope]) -> set[str]:
    return {name for name, slope in found.items() if slope.value > getattr(ALLOWED, name) + ERRORS * slope.error}


def report(found: Mapping[str, Slope]) -> str:
    return "\n".join(f"{name}: {slope.value:+.3f} ± {slope.error:.3f} a job" for name, slope in found.items())


@pytest.fixture
def bench(tmp_path, checkpoint) -> Bench:
    return Bench(tmp_path, checkpoint)


def test_a_hundred_jobs_leave_nothing(bench):
    """So few say nothing of physical memory, least of all where other tests have used this process before."""
    found = slopes(soak(bench.round, rounds=10, warm_up=4))
    if growing(found) - {"resident"}:
        # What still settles does not grow a second time.
        found = slopes(soak(lambda number: bench.round(100 + number), rounds=10, warm_up=2))
    print(report(found))
    assert not growing(found) - {"resident"}, report(found)


@pytest.mark.soak
@pytest.mark.slow
def test_two_thousand_jobs_leave_nothing(bench):
    readings.settle_interned()
    taken = soak(bench.round, rounds=200, warm_up=20)
    found = slopes(taken)
    print(report(found))
    assert not growing(found), report(found)
    # Among these very readings a leak would have been seen.
    for name, leak in LEAKS.items():
        leaking = [Reading(*one)._asdict() for one in taken]
        for index, one in enumerate(leaking):
            one[name] += leak * ROUND * index
        assert name in growing(slopes([tuple(one.values()) for one in leaking])), name


class Leak:
    """Keeps something of each job."""

    def __init__(self) -> None:
        self.kept: list = []
        self.done = threading.Event()

    def heap(self, job: int) -> None:
        self.kept.append(bytearray(4096))

    def blocks(self, job: int) -> None:
        self.kept += [float(job * 1000 + n) for n in range(20)]

    def objects(self, job: int) -> None:
        self.kept += [[job], [job]]

    def threads(self, job: int) -> None:
        if job % 10 == 0:
            threading.Thread(target=self.done.wait, daemon=True).start()

    def files(self, job: int) -> None:
        if job % 10 == 0:
            self.kept.append(os.open(os.devnull, os.O_RDONLY))

    def close(self) -> None:
        self.done.set()
        for kept in self.kept:
            if isinstance(kept, int):
                os.close(kept)


@pytest.fixture
def leak() -> Iterator[Leak]:
    leak = Leak()
    yield leak
    leak.close()


@pytest.mark.parametrize("kind", ["heap", "blocks", "objects", "threads", "files"])
def test_a_leak_is_found(leak, kind):
    """4 KB, twenty numbers or two lists a job, a thread or an open file in ten jobs."""

    def leaking(number: int) -> None:
        for job in range(ROUND):
            getattr(leak, kind)(ROUND * number + job)

    assert kind in growing(slopes(soak(leaking, rounds=10, warm_up=4)))


def test_nothing_is_found_where_nothing_leaks():
    assert not growing(slopes(soak(lambda number: None, rounds=10, warm_up=4)))
