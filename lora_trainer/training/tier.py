"""How fast a step can be on this device: which operations, which memory layout, captured or not."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_trainer.config import Config
from lora_trainer.kernels.choose import Kernels
from lora_trainer.kernels.plain import PlainOps
from lora_trainer.models.model import Model
from lora_trainer.models.stored import told_of
from lora_trainer.training.precision import Precision

# Copies of the convolutions' weights are made where they take at most this share of the free memory.
SHARE = 0.25
# `kernels.choose.Kernels.ops`.
ChooseOps = Callable[..., "tuple[PlainOps, str | None]"]


@dataclass(frozen=True)
class Tier:
    """`kernels`: the weights of k×k convolutions in `memory_format`, copies where the model has them otherwise."""

    ops: PlainOps
    captured: bool
    memory_format: torch.memory_format
    kernels: Mapping[nn.Module, Tensor]
    notices: tuple[str, ...]


def choose_tier(config: Config, model: Model, precision: Precision, choose: ChooseOps | None = None) -> Tier:
    """Probe the device of `model`, in which the LoRAs are already."""
    device, compute = model.facts.device, precision.compute
    choose = choose or Kernels(config.kernels).ops
    if device.type != "cuda":
        return Tier(choose(device, compute)[0], False, torch.contiguous_format, {}, tuple(told_of(model.unet)))
    convs = [m for m in model.unet.modules() if type(m) is nn.Conv2d and max(m.kernel_size) > 1]
    size = copied(convs, compute)
    last = size <= SHARE * torch.cuda.mem_get_info(device)[0]
    layout = torch.channels_last if last else torch.contiguous_format
    kernels = {conv: conv.weight.detach().to(compute, memory_format=layout) for conv in convs if last}
    words = f"channels-last, {size / 1e9:.2f} GB of weights copied for it" if last else "no copies of weights (NCHW)"
    work = work_of(config, model, compute, layout)
    ops, told = choose(device, compute, deterministic=config.deterministic, work=work)
    notices = [*told_of(model.unet), f"step: {ops.name}, captured as a CUDA graph, {words}", *filter(None, [told])]
    return Tier(ops, True, layout, kernels, tuple(notices))


def work_of(config: Config, model: Model, compute: torch.dtype, layout: torch.memory_format) -> str:
    """All but the batches' shapes that decides which kernels a step needs, as a hash: the networks and their LoRAs, the
    number formats, the layout, dropout."""
    networks = [model.unet] + (model.text.modules if config.train_text_encoder else [])
    weights = [(n, tuple(p.shape), str(p.dtype)) for network in networks for n, p in network.named_parameters()]
    whole = [share for share in (config.rank_dropout, config.module_dropout) if share]
    facts = (weights, str(compute), str(layout), config.lora_dropout, *whole)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def copied(convs: Sequence[nn.Conv2d], dtype: torch.dtype) -> int:
    """Bytes of copies that it takes to have the convolutions' weights channels-last in `dtype`."""
    there = {"memory_format": torch.channels_last}
    missing = [conv.weight for conv in convs if conv.weight.dtype != dtype or not conv.weight.is_contiguous(**there)]
    return sum(weight.numel() for weight in missing) * torch.finfo(dtype).bits // 8
