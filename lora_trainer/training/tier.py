"""How fast a step can be on this device: which operations, which memory layout, captured or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_trainer.config import Config
from lora_trainer.kernels.choose import choose
from lora_trainer.kernels.plain import PlainOps
from lora_trainer.models.model import Model
from lora_trainer.training.precision import Precision

# Copies of the convolutions' weights are made where they take at most this share of the free memory.
SHARE = 0.25


@dataclass(frozen=True)
class Tier:
    """`kernels`: the weights of k×k convolutions in `memory_format`, copies where the model has them otherwise."""

    ops: PlainOps
    captured: bool
    memory_format: torch.memory_format
    kernels: Mapping[nn.Module, Tensor]
    notices: tuple[str, ...]


def choose_tier(config: Config, model: Model, precision: Precision) -> Tier:
    """Probe the device of `model`."""
    device = model.facts.device
    ops, reason = choose(device, precision.compute, deterministic=config.deterministic)
    if device.type != "cuda":
        return Tier(ops, False, torch.contiguous_format, {}, ())
    convs = [m for m in model.unet.modules() if type(m) is nn.Conv2d and max(m.kernel_size) > 1]
    size = copied(convs, precision.compute)
    last = size <= SHARE * torch.cuda.mem_get_info(device)[0]
    layout = torch.channels_last if last else torch.contiguous_format
    kernels = {conv: conv.weight.detach().to(precision.compute, memory_format=layout) for conv in convs if last}
    words = f"channels-last, {size / 1e9:.2f} GB of weights copied for it" if last else "no copies of weights (NCHW)"
    compiled = "" if ops.collects else "; its kernels are compiled at their first use, about a minute, and kept"
    told = [f"step: {ops.name}, captured as a CUDA graph, {words}{compiled}"]
    return Tier(ops, True, layout, kernels, tuple(told + ([reason] if reason else [])))


def copied(convs: Sequence[nn.Conv2d], dtype: torch.dtype) -> int:
    """Bytes of copies that it takes to have the convolutions' weights channels-last in `dtype`."""
    there = {"memory_format": torch.channels_last}
    missing = [conv.weight for conv in convs if conv.weight.dtype != dtype or not conv.weight.is_contiguous(**there)]
    return sum(weight.numel() for weight in missing) * torch.finfo(dtype).bits // 8
