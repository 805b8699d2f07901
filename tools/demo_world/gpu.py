"""What both pretraining stages share: masters with an average, CUDA graphs, the learning rate over time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
HALF = torch.bfloat16 if CUDA else torch.float32


class Masters:
    """fp32 masters, AdamW and a running average for parameters of any dtype; nothing waits for the host."""

    def __init__(self, parameters: Iterable[nn.Parameter], *, weight_decay: float, average: float) -> None:
        self.parameters = list(parameters)
        self.values = [p.detach().float().clone() for p in self.parameters]
        self.average = [value.clone() for value in self.values]
        self.decay = average
        for parameter, value in zip(self.parameters, self.values, strict=True):
            value.grad = torch.zeros_like(value)
            parameter.grad = torch.zeros_like(parameter)
        self.rate = torch.zeros((), device=DEVICE)
        self.adam = torch.optim.AdamW(
            self.values,
            lr=self.rate,
            betas=(0.9, 0.99),
            weight_decay=weight_decay,
            fused=CUDA,
            capturable=CUDA,
        )

    def step(self) -> None:
        """One update from the parameters' gradients, clipped to norm 1; clears them."""
        grads = [value.grad for value in self.values]
        torch._foreach_copy_(grads, [p.grad for p in self.parameters])
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_mul_(grads, (1.0 / (norm + 1e-6)).clamp(max=1.0))
        self.adam.step()
        torch._foreach_copy_([p.data for p in self.parameters], self.values)
        torch._foreach_lerp_(self.average, self.values, 1 - self.decay)
        torch._foreach_zero_([p.grad for p in self.parameters])


def graphed(work: Callable[[], None]) -> Callable[[], None]:
    """`work` as a CUDA graph, after a warm-up that really runs it; on a CPU as it is."""
    if not CUDA:
        return work
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(5):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def train(
    step: Callable[[], None],
    rate: Tensor,
    seconds: float,
    *,
    peak: float,
    report: Callable[[int, float], None],
) -> int:
    """Replay `step` for `seconds`: 300 steps of warm-up, then a cosine; returns the steps."""
    began, count, marked = time.time(), 0, 0.0
    while (elapsed := time.time() - began) < seconds:
        rate.fill_(peak * min(1.0, count / 300) * (0.005 + 0.995 * 0.5 * (1 + math.cos(math.pi * elapsed / seconds))))
        for _ in range(20):
            step()
        count += 20
        if CUDA:
            torch.cuda.synchronize()
        if elapsed - marked > 15:
            marked = elapsed
            report(count, elapsed)
    return count
