"""How many cases run, how long one may take, and what a refusal may look like.

`make test` runs a few, always the same; `make fuzz` (FUZZ_TIMES=72) that many times as many, at random.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

from hypothesis import HealthCheck, example, given, settings
from hypothesis.strategies import SearchStrategy

from lora_trainer.errors import MAX_LINE, MAX_LINES, UserError
from tests.fuzz.watch import ARENA

TIMES = int(os.environ.get("FUZZ_TIMES", "0"))
SECONDS, STUCK = 2, 30
COUNTS: Counter[str] = Counter()
WORKED: Counter[str] = Counter()
REFUSED: Counter[str] = Counter()
_TARGET = [""]
_UNSEEN = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def fuzz(
    target: str,
    cases: int,
    known: Sequence[Mapping[str, object]] = (),
    many: bool = False,
    **strategies: SearchStrategy,
) -> Callable[[Callable], Callable]:
    """A property over `strategies`; `cases` of it run in CI, and the `known` ones always. Every case is watched, timed
    and counted. One that tries `many` inputs times each by itself."""
    clock = nullcontext if many else quick
    profile = settings(
        max_examples=cases * (TIMES or 1),
        derandomize=not TIMES,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )

    def decorate(check: Callable[..., None]) -> Callable:
        @functools.wraps(check)
        def case(**drawn: object) -> None:
            COUNTS[target] += 1
            with _ends(), clock(), ARENA.watched():
                _TARGET[0] = target
                check(**drawn)

        for one in known:
            case = example(**one)(case)
        return profile(given(**strategies)(case))

    return decorate


@contextmanager
def quick() -> Iterator[None]:
    """At most 2 s of computing, which no other program on a busy machine makes longer."""
    start = time.process_time()
    yield
    assert time.process_time() - start <= SECONDS


@contextmanager
def _ends() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError(f"still running after {STUCK} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, STUCK)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def works_or_refuses() -> Iterator[None]:
    """What runs in it may raise a UserError, of which the user can read every line; nothing else."""
    try:
        yield
    except UserError as error:
        REFUSED[_TARGET[0]] += 1
        readable(str(error))
    else:
        WORKED[_TARGET[0]] += 1


def readable(text: str) -> None:
    """Of bounded length, without a traceback, and harmless on a terminal."""
    lines = text.split("\n")
    assert text.strip()
    assert len(lines) <= MAX_LINES + 1
    assert max(map(len, lines)) <= MAX_LINE + 10
    assert "Traceback (most recent call last)" not in text
    assert not re.search(r'File ".*", line \d+, in ', text)
    assert not _UNSEEN.search(text)
