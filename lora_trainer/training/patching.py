"""Methods of single modules replaced for a while."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn


def patch(stack: ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    """`forward` in place of `module.forward`, until `stack` closes; patches nest."""
    before = module.__dict__.get("forward")
    module.forward = forward

    def restore() -> None:
        if before is None:
            del module.forward
        else:
            module.forward = before

    stack.callback(restore)
