"""Work done ahead of its use in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

T = TypeVar("T")

_END = object()


@contextmanager
def ahead(items: Iterator[T], depth: int) -> Iterator[Iterator[T]]:
    """`items`, up to `depth` of them made before they are asked for; 0 makes each when it is asked for.

    What making one raises is raised where it is asked for. The thread ends with the block.
    """
    if depth == 0:
        yield items
        return
    made: queue.Queue = queue.Queue(maxsize=depth)
    done = threading.Event()

    def put(item: object) -> None:
        while not done.is_set():
            with suppress(queue.Full):
                made.put(item, timeout=0.1)
                return

    def work() -> None:
        try:
            for item in items:
                put((item, None))
                if done.is_set():
                    return
            put((_END, None))
        except BaseException as error:
            put((_END, error))

    thread = threading.Thread(target=work, name="feed", daemon=True)
    thread.start()
    try:
        yield _taken(made)
    finally:
        done.set()
        thread.join()


def _taken(made: queue.Queue) -> Iterator:
    while True:
        item, error = made.get()
        if error is not None:
            raise error
        if item is _END:
            return
        yield item
