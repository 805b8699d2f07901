"""Which operations this machine can run, found out by trying."""

from __future__ import annotations

import torch

from lora_trainer.kernels.plain import PlainOps


def choose(device: torch.device, dtype: torch.dtype, *, deterministic: bool = False) -> tuple[PlainOps, str | None]:
    """The fastest operations for `device` and compute `dtype`, and why it is not Triton's where one would expect it."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return PlainOps(), None
    if deterministic:
        return PlainOps(), "deterministic: plain torch products, since the fused gradient kernel adds in any order"
    try:
        from lora_trainer.kernels.triton_ops import TritonOps

        ops = TritonOps()
        _try(ops, device, dtype)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        return PlainOps(), f"no Triton kernels here, plain torch instead ({type(error).__name__}: {reason})"
    return ops, None


def _try(ops: PlainOps, device: torch.device, dtype: torch.dtype) -> None:
    """Raise unless a kernel compiles, runs and computes what plain torch does."""
    x = torch.linspace(-2, 2, 64, device=device, dtype=dtype).view(2, 32)
    expected, got = PlainOps().geglu(x), ops.geglu(x)
    if not torch.allclose(expected.float(), got.float(), atol=2e-2):
        raise RuntimeError("a kernel computed something else")
