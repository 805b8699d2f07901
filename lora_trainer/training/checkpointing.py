"""Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174): recompute blocks instead of keeping them.

diffusers' own switch stores the RNG state at each block, which a CUDA graph cannot capture; our dropout does not
need it, so the blocks' forwards are wrapped here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_trainer.training.patching import patch

BLOCKS = (BasicTransformerBlock, ResnetBlock2D)


@contextmanager
def checkpointed(network: nn.Module) -> Iterator[int]:
    """Inside, each transformer and resnet block of `network` recomputes its activations; yields their number."""
    blocks = [module for module in network.modules() if isinstance(module, BLOCKS)]
    with ExitStack() as stack:
        for block in blocks:
            patch(stack, block, partial(recomputed, block.forward))
        yield len(blocks)


def recomputed(forward: Callable, *args: Any, **kwargs: Any) -> Any:
    """`forward` of these arguments, computed again in the backward pass instead of kept."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
