"""Parts of the train step as CUDA graphs: recorded once, then replayed without Python or kernel launches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable

import torch


class Captures:
    """Runs parts of a step. Off a CUDA device, or switched off, each part just runs.

    The first run of a part is a real one, eagerly: it warms libraries and caches up and its result counts. The second
    is captured, and replayed from then on; a part's tensors therefore stay where they are. All graphs share one
    memory pool, which `release` gives back; afterwards every part starts anew.
    """

    def __init__(self, device: torch.device, *, enabled: bool = True) -> None:
        self.device = device
        self.enabled = enabled and device.type == "cuda"
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._warm: set[Hashable] = set()
        self._pool = None

    @property
    def count(self) -> int:
        return len(self._graphs)

    def run(self, part: Hashable, body: Callable[[], None]) -> None:
        """Do what `body` does, on the same memory as always for this `part`."""
        if part in self._graphs:
            self._graphs[part].replay()
        elif self.enabled and part in self._warm:
            self._capture(part, body).replay()
        else:
            body()
            self._warm.add(part)

    def release(self) -> None:
        """Free the graphs and the memory they hold; what they computed stays."""
        if not self._graphs:
            return
        torch.cuda.synchronize(self.device)
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()
        self._warm.clear()
        self._pool = None
        torch.cuda.empty_cache()

    def _capture(self, part: Hashable, body: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Other threads of a WebUI use CUDA meanwhile: only this one must hold still.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            body()
        self._pool = self._pool or graph.pool()
        self._graphs[part] = graph
        return graph


class Pace:
    """Keeps the host at most `ahead` updates in front of the device, without making the device wait."""

    def __init__(self, device: torch.device, ahead: int = 2) -> None:
        self.enabled, self.ahead = device.type == "cuda", ahead
        self._events: deque[torch.cuda.Event] = deque()

    def __call__(self) -> None:
        """After each update."""
        if not self.enabled:
            return
        event = torch.cuda.Event()
        event.record()
        self._events.append(event)
        if len(self._events) > self.ahead:
            self._events.popleft().synchronize()
