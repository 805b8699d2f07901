"""Triton kernels compiled in the background, while plain torch computes a run, for the next one.

What a step asks of its operations is noted as it asks, and asked once more of the Triton operations on meta tensors,
where nothing is launched and no memory taken (`launch`): so exactly the kernels of this card, model and data are
compiled. Their tile sizes follow from the sizes of the tensors, not from measurements, so there is nothing else to
keep than Triton's own cache.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from lora_trainer.kernels.plain import PlainOps
from lora_trainer.kernels.site import Draw, Site

NICE = 10
# Triton compiles a kernel for whole numbers that are multiples of this, and one for all others.
MULTIPLE = 16


@dataclass(frozen=True)
class Shape:
    """All of a tensor that a kernel is compiled for."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Shape:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad)

    def empty(self) -> Tensor:
        """Such a tensor without memory."""
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="meta", requires_grad=self.grad)


@dataclass(frozen=True)
class NormShape:
    """A GroupNorm or LayerNorm."""

    weight: Shape
    bias: Shape
    eps: float
    num_groups: int | None
    normalized_shape: tuple[int, ...] | None

    @classmethod
    def of(cls, norm: nn.Module) -> NormShape:
        groups, shape = getattr(norm, "num_groups", None), getattr(norm, "normalized_shape", None)
        return cls(Shape.of(norm.weight), Shape.of(norm.bias), norm.eps, groups, shape and tuple(shape))

    def empty(self) -> SimpleNamespace:
        return SimpleNamespace(**vars(self) | {"weight": self.weight.empty(), "bias": self.bias.empty()})


@dataclass(frozen=True)
class SiteShape:
    """A LoRA's site in a product of so many rows, as Triton's has it: gradients go to the fp32 buffers."""

    down: Shape
    up: Shape
    scale: float
    keys: Shape | None
    dropout: float
    divides: bool
    grad: bool

    @classmethod
    def of(cls, site: Site, rows: int) -> SiteShape:
        draw = site.draw(rows)
        dropout = (None, 0.0, True) if draw is None else (Shape.of(draw.keys), draw.dropout, not draw.offset % MULTIPLE)
        return cls(Shape.of(site.down), Shape.of(site.up), site.scale(), *dropout, torch.is_grad_enabled())

    def empty(self) -> Site:
        down, up = self.down.empty(), self.up.empty()
        offset = MULTIPLE if self.divides else MULTIPLE + 1
        draw = self.keys and Draw(self.keys.empty(), offset, self.dropout, lambda: down.new_empty(()))
        return Site(
            down=down,
            up=up,
            grad_down=torch.empty_like(down, dtype=torch.float32),
            grad_up=torch.empty_like(up, dtype=torch.float32),
            parameters=tuple(torch.empty_like(factor).requires_grad_(self.grad) for factor in (down, up)),
            scale=lambda: self.scale,
            draw=lambda rows: draw,
        )


@dataclass(frozen=True)
class Call:
    """One operation on tensors of these sizes."""

    name: str
    args: tuple[Hashable, ...]
    options: tuple[tuple[str, Hashable], ...] = ()

    @classmethod
    def of(cls, name: str, *args: object, **options: object) -> Call:
        rows = args[0].shape[0]
        return cls(
            name,
            tuple(_noted(arg, rows) for arg in args),
            tuple((key, _noted(value, rows)) for key, value in options.items()),
        )

    def compile(self, ops: PlainOps) -> None:
        """Ask `ops` the same on meta tensors, forwards and backwards."""
        for both in (False, True):
            options = {key: _empty(value) for key, value in self.options}
            out = getattr(ops, self.name)(*map(_empty, self.args), **options)
            # A norm also hands its input on; whether a gradient comes back that way is another kernel.
            outputs = out if both and isinstance(out, tuple) else (out[0] if isinstance(out, tuple) else out,)
            needed = [output for output in outputs if output.requires_grad]
            if needed:
                torch.autograd.backward(needed, [torch.empty_like(output) for output in needed])
            if not isinstance(out, tuple):
                return


def _noted(value: object, rows: int) -> Hashable:
    if isinstance(value, Tensor):
        return Shape.of(value)
    if isinstance(value, Site):
        return SiteShape.of(value, rows)
    return NormShape.of(value) if isinstance(value, nn.Module) else value


def _empty(value: object) -> object:
    return value.empty() if isinstance(value, (Shape, NormShape, SiteShape)) else value


class NotingOps(PlainOps):
    """Plain torch that tells `note` of each call."""

    def __init__(self, note: Callable[[Call], object]) -> None:
        self.note = note

    def lora_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, site: Site, residual: Tensor | None = None
    ) -> Tensor:
        self.note(Call.of("lora_linear", x, weight, bias, site, residual))
        return super().lora_linear(x, weight, bias, site, residual)

    def group_norm(
        self, x: Tensor, norm: nn.GroupNorm, *, silu: bool, shift: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self.note(Call.of("group_norm", x, norm, silu=silu, shift=shift))
        return super().group_norm(x, norm, silu=silu, shift=shift)

    def layer_norm(self, x: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        self.note(Call.of("layer_norm", x, norm))
        return super().layer_norm(x, norm)

    def geglu(self, x: Tensor) -> Tensor:
        self.note(Call.of("geglu", x))
        return super().geglu(x)

    def add(self, x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        self.note(Call.of("add", x, bias, residual))
        return super().add(x, bias, residual)


@dataclass
class Ahead:
    """Compiles what is noted with `ops`, inside `device()`, in one thread of low priority and in the order it came.

    It ends with the run, after the kernel at hand: what is compiled stays, and the next run takes up there. Whatever
    goes wrong is kept in `failure` and never reaches the run.
    """

    ops: PlainOps
    device: Callable[[], AbstractContextManager]
    done: int = 0
    failure: str | None = None
    _seen: set[Call] = field(default_factory=set, init=False)
    _waiting: SimpleQueue = field(default_factory=SimpleQueue, init=False)
    _stop: threading.Event = field(default_factory=threading.Event, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)

    @property
    def noted(self) -> int:
        return len(self._seen)

    def note(self, call: Call) -> None:
        if call not in self._seen:
            self._seen.add(call)
            self.then(lambda: self._compile(call))

    def then(self, work: Callable[[], object]) -> None:
        """Do `work` after all that was noted before, unless something failed or the run has ended."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="kernels")
            self._thread.start()
        self._waiting.put(work)

    def close(self) -> None:
        """Ask the thread to end; does not wait for it."""
        self._stop.set()
        self._waiting.put(lambda: None)

    def join(self) -> None:
        """Wait for all that was noted. For tests and benchmarks."""
        idle = threading.Event()
        self.then(idle.set)
        while self._thread.is_alive() and not idle.wait(0.05):
            pass

    def _compile(self, call: Call) -> None:
        call.compile(self.ops)
        self.done += 1

    def _work(self) -> None:
        with suppress(OSError, AttributeError):
            # Of this thread alone, on Linux.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        try:
            with self.device():
                # Nobody keeps a process from ending that forgets to close.
                while not self._stop.is_set() and threading.main_thread().is_alive():
                    with suppress(Empty):
                        self._waiting.get(timeout=1)()
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            self.failure = f"{type(error).__name__}: {reason}"
