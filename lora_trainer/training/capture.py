"""Parts of the train step as CUDA graphs: recorded once, then replayed without Python or kernel launches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable

import torch

from lora_trainer.training.settings import fast_or_repeatable


class Captures:
    """Runs parts of a step. Off a CUDA device, or switched off, each part just runs.

    The first run of a part is a real one, eagerly: it warms libraries and caches up and its result counts. The second
    is captured, and replayed from then on; a part's tensors therefore stay where they are. All graphs share one
    memory pool, which `release` gives back; afterwards every part is captured anew, at once, since one that just runs
    would need as much memory again beside those that are captured. `reason` says why nothing is captured where that
    was tried and failed.
    """

    def __init__(self, device: torch.device, *, enabled: bool = True, deterministic: bool = False) -> None:
        self.device, self.deterministic = device, deterministic
        self.enabled = enabled and device.type == "cuda"
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._warm: set[Hashable] = set()
        self._pool = None
        self.reason: str | None = None

    @property
    def count(self) -> int:
        return len(self._graphs)

    def run(self, part: Hashable, body: Callable[[], None]) -> None:
        """Do what `body` does, on the same memory as always for this `part`."""
        if part not in self._graphs:
            with fast_or_repeatable(deterministic=self.deterministic):
                if not (self.enabled and part in self._warm and self._capture(part, body)):
                    body()
                    self._warm.add(part)
                    return
        self._graphs[part].replay()

    def release(self) -> None:
        """Free the graphs, the memory they hold and that of cuBLAS; what they computed stays."""
        if self.device.type != "cuda":
            return
        torch.cuda.synchronize(self.device)
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()
        self._pool = None
        # One workspace for each stream that ever multiplied matrices; made again when needed.
        getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
        torch.cuda.empty_cache()

    def _capture(self, part: Hashable, body: Callable[[], None]) -> bool:
        """Whether `part` is captured now. Raises torch's OutOfMemoryError; after any other failure parts just run."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads of a WebUI use CUDA meanwhile: only this one must hold still.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                body()
        except RuntimeError as error:
            if out_of_memory(error):
                raise torch.cuda.OutOfMemoryError(str(error)) from error
            self.enabled, self.reason = False, str(error).splitlines()[0]
            return False
        self._pool = self._pool or graph.pool()
        self._graphs[part] = graph
        return True


def out_of_memory(error: BaseException | None) -> bool:
    """Whether `error`, or what it arose from, is that memory ran out: ending a capture can fail because of it."""
    while error is not None:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


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
