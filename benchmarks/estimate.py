"""What a step might take on consumer cards, reckoned from one measured on another card. Nothing here is measured.

A step is cut into work that waits for matrix units and work that waits for memory, as a profile of it shows. The first
part is scaled by what the cards multiply, the second by what they move (the makers' figures). How much of its matrix
units a card then really uses is not known: a large card is hard to fill with such small products, and a small one is
not, hence a range from the share of the measured card to twice that share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Card:
    """tflops: dense fp16 products with fp32 sums, 10¹² operations a second; bandwidth in GB/s; memory in GiB."""

    name: str
    memory: int
    tflops: float
    bandwidth: float


# The makers' data sheets.
MEASURED = (Card("H100", 80, 989.0, 3350), Card("H200", 141, 989.0, 4800))
CARDS = (
    Card("RTX 4090", 24, 165.2, 1008),
    Card("RTX 3090", 24, 71.0, 936),
    Card("RTX 3070", 8, 40.6, 448),
    Card("RTX 4060", 8, 30.2, 272),
)
# Of a step of SD1.5 with batch 4 on the measured card: norms and gates, 3.2 + 1.1 + 0.65 of 29.6 ms.
MEMORY_BOUND = 0.17
FILLED = 2.0
# Held by CUDA itself and by a desktop, GiB.
TAKEN = 1.0


def scaled(ms: float, measured: Card, card: Card) -> tuple[float, float]:
    """The least and the most that a step of `ms` on the measured card might take on `card`, in milliseconds."""
    products = ms * (1 - MEMORY_BOUND) * measured.tflops / card.tflops
    moved = ms * MEMORY_BOUND * measured.bandwidth / card.bandwidth
    return products / FILLED + moved, products + moved


def estimates(lines: Sequence[dict[str, Any]]) -> str:
    """A table for SD1.5 with batch 4: at the defaults, with checkpointing, and in plain torch where those are known."""
    ours = [line for line in lines if line["what"] == "ours" and not line.get("train_text_encoder")]
    known = [line for line in ours if (line["family"], line["batch"], line["resolution"]) == ("sd15", 4, 512)]
    default = next(line for line in known if line["dropout"] and not line["checkpointing"] and _fastest(line))
    lighter = next((line for line in known if line["checkpointing"]), None)
    measured = next(card for card in MEASURED if card.name in default["card"])
    rows = ["| card | estimate, ms a step of 4 | 2,500 steps, minutes | memory |", "|---|---|---|---|"]
    for card in CARDS:
        least, most = scaled(default["median_ms"], measured, card)
        minutes = [ms * 2500 / 6e4 for ms in (least, most)]
        rows.append(
            f"| {card.name}, {card.memory} GB | {_round(least)} to {_round(most)} | {minutes[0]:.0f} to "
            f"{minutes[1]:.0f} | {_fits(card, default, lighter)} |"
        )
    return "\n".join(rows) + "\n"


def _fastest(line: dict[str, Any]) -> bool:
    return line.get("kernels", "auto") != "plain" and not line.get("deterministic")


def _fits(card: Card, default: dict[str, Any], lighter: dict[str, Any] | None) -> str:
    size = default["peak_reserved_bytes"] / 2**30
    room = card.memory - TAKEN
    words = f"{size:.1f} of about {room:.0f} GiB"
    if size < 0.8 * room or lighter is None:
        return words
    return f"{words}: tight; {lighter['peak_reserved_bytes'] / 2**30:.1f} with gradient checkpointing"


def _round(ms: float) -> int:
    """To two digits, as befits an estimate."""
    return int(float(f"{ms:.1e}"))
