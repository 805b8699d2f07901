"""Which operations this machine can run, found out by trying."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import torch

from lora_trainer.kernels.ahead import Ahead, NotingOps
from lora_trainer.kernels.plain import PlainOps
from lora_trainer.kernels.warm import Warm

HALVES = (torch.float16, torch.bfloat16)
TRITON = "Triton"


def probe(device: torch.device, dtype: torch.dtype) -> PlainOps:
    """Triton's operations, tried. Raises whatever stands in their way."""
    from lora_trainer.kernels.triton_ops import TritonOps

    ops = TritonOps()
    x = torch.linspace(-2, 2, 64, device=device, dtype=dtype).view(2, 32)
    expected, got = PlainOps().geglu(x), ops.geglu(x)
    if not torch.allclose(expected.float(), got.float(), atol=2e-2):
        raise RuntimeError("a kernel computed something else")
    return ops


@dataclass
class Kernels:
    """The operations of one run, chosen once: a run never changes them.

    `wanted`: auto, triton or plain. `begun_with` is the `name` of those that the run began with in another process,
    and holds for auto. A run for which Triton would have to compile first stays on plain torch, while its kernels are
    compiled for the next one.
    """

    wanted: str = "auto"
    begun_with: str = ""
    probe: Callable[[torch.device, torch.dtype], PlainOps] = probe
    warm_of: Callable[[torch.device], Warm] = Warm.of
    current: Callable[[torch.device], AbstractContextManager] = torch.cuda.device
    _chosen: tuple[PlainOps, str | None] | None = field(default=None, init=False)
    _warm: Warm | None = field(default=None, init=False)
    _ahead: Ahead | None = field(default=None, init=False)
    _work: str = field(default="", init=False)

    def ops(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        deterministic: bool = False,
        work: str = "",
        shapes: Collection[Hashable] = (),
    ) -> tuple[PlainOps, str | None]:
        """The fastest operations for `device` and compute `dtype`, and what there is to say about them.

        `work` stands for all beside the `shapes` of its batches that the kernels of the step depend on; without shapes
        nothing is known to be cold.
        """
        self._work = work
        if self._chosen is None:
            self._chosen = self._choose(device, dtype, deterministic, shapes)
        return self._chosen

    def compiled(self, shapes: Collection[Hashable]) -> None:
        """Steps of all these batch shapes have been computed: what they need is compiled, or was noted."""
        if self._warm is None:
            return
        for shape in shapes:
            add = partial(self._warm.add, (self._work, shape))
            if self._ahead is not None:
                self._ahead.then(add)
            elif (self._work, shape) not in self._warm:
                add()

    def close(self) -> list[str]:
        """At the end of the run; what there is to say about compiling."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return []
        ahead.close()
        if ahead.failure is not None:
            return [
                f"the Triton kernels could not be compiled ({ahead.failure}); kernels: triton compiles them in a run"
            ]
        if ahead.done < ahead.noted:
            return [f"{ahead.done} of {ahead.noted} kernels are compiled; the next run goes on with that"]
        return ["the Triton kernels are compiled: the next run uses them"]

    def _choose(
        self, device: torch.device, dtype: torch.dtype, deterministic: bool, shapes: Collection[Hashable]
    ) -> tuple[PlainOps, str | None]:
        if device.type != "cuda" or dtype not in HALVES:
            return PlainOps(), None
        if deterministic:
            return PlainOps(), "deterministic: plain torch products, since the fused gradient kernel adds in any order"
        if self.wanted == "plain":
            return PlainOps(), None
        try:
            ops = self.probe(device, dtype)
            self._warm = self.warm_of(device)
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            return PlainOps(), f"no Triton kernels here, plain torch instead ({type(error).__name__}: {reason})"
        cold = any((self._work, shape) not in self._warm for shape in shapes)
        began = self.begun_with if self.wanted == "auto" else TRITON
        if began == TRITON or not (began or cold):
            words = "Triton's kernels are compiled before the first step, about a minute, and kept"
            return ops, words if cold else None
        if not cold:
            return PlainOps(), "stays on plain torch, with which this run began"
        self._ahead = Ahead(ops, partial(self.current, device))
        return NotingOps(self._ahead.note), (
            "the Triton kernels are not compiled yet for this card and these sizes: this run stays on plain torch, "
            "while the kernels are being compiled for the next run (kernels: triton waits for them)"
        )
