"""Values of single blocks of a UNet: `IN04=16`, `MID=8`, `OUT=0.5`.

The numbers are those of the checkpoint's own blocks (`input_blocks.4`), as kohya's trainer counts them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lora_trainer.errors import shown

_ENTRY = re.compile(r"\s*(IN|MID|OUT)([0-9]{1,2})?\s*=\s*([0-9.eE+-]+)\s*")
MAX_RANK = 1024


class BlockProblem(ValueError):
    """One line about one entry."""


def block_values(entries: Sequence[str]) -> dict[str, float]:
    """Values by block (IN04) or side (OUT). Raises BlockProblem."""
    values: dict[str, float] = {}
    for entry in entries:
        found = _ENTRY.fullmatch(entry)
        try:
            value = float(found[3]) if found else -1.0
        except ValueError:
            value = -1.0
        if found is None or not 0 <= value < 1e6:
            raise BlockProblem(f"expected IN04=16, MID=8 or OUT=0, found {shown(entry)}")
        block = found[1] + (f"{int(found[2]):02}" if found[2] else "")
        if values.setdefault(block, value) != value:
            raise BlockProblem(f"expected each block once, found {block} with {values[block]:g} and {value:g}")
    return values


def ranks(entries: Sequence[str]) -> dict[str, int]:
    """The same for whole numbers up to MAX_RANK. Raises BlockProblem."""
    values = block_values(entries)
    for block, value in values.items():
        if not value.is_integer() or value > MAX_RANK:
            raise BlockProblem(f"expected whole numbers from 0 to {MAX_RANK}, found {block}={value:g}")
    return {block: int(value) for block, value in values.items()}


def value_of(values: Mapping[str, float], block: str, otherwise: float) -> float:
    """The value of `block` (IN04): its own, its side's, or `otherwise`."""
    return values.get(block, values.get(block.rstrip("0123456789"), otherwise))
