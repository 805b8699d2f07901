"""How `lora-trainer sample` draws."""

from __future__ import annotations

import msgspec


class SampleOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`size` in pixels; None is the model's own."""

    weight: float = 1.0
    out: str = "./output/samples"
    seed: int = 42
    steps: int = 25
    guidance: float = 5.0
    size: int | None = None
    negative: str = ""
