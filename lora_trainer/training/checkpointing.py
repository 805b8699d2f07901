"""Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174): recompute blocks instead of keeping them.

diffusers' own switch stores the RNG state at each block, which a CUDA graph cannot capture; our dropout does not
need it, so the blocks' forwards are wrapped here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_trainer.models.mmdit import JointBlock
from lora_trainer.training.patching import patch

BLOCKS = (BasicTransformerBlock, JointBlock, ResnetBlock2D)
# Of the widest transformer blocks one in so many keeps its activations: there they cost the most to recompute for the
# memory that they take.
KEEPS = 4


@contextmanager
def checkpointed(network: nn.Module, *, every: bool = True) -> Iterator[int]:
    """Inside, the transformer and resnet blocks of `network` recompute their activations, all or most of them; yields
    their number."""
    blocks = [module for module in network.modules() if isinstance(module, BLOCKS)]
    if not every:
        kept = _widest(blocks)[KEEPS - 1 :: KEEPS]
        blocks = [block for block in blocks if block not in kept]
    with ExitStack() as stack:
        for block in blocks:
            patch(stack, block, partial(recomputed, block.forward))
        yield len(blocks)


def _widest(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    widths = {block: block.norm1.weight.numel() for block in blocks if isinstance(block, BasicTransformerBlock)}
    # All of an MMDiT's are equally wide.
    joint = [block for block in blocks if isinstance(block, JointBlock)]
    return joint + [block for block, width in widths.items() if width == max(widths.values())]


def recomputed(forward: Callable, *args: Any, **kwargs: Any) -> Any:
    """`forward` of these arguments, computed again in the backward pass instead of kept."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
