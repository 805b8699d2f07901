"""What the pictures of the base are called while it learns them."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from gpu import DEVICE, HALF
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from lora_trainer.models.text import Tokenizer

UNKNOWN = 49000  # stands for any token that no caption of the base has
# Captions of a picture: with its style, without one, with an unknown word of 1 to 3 tokens as its style, empty.
STYLED, PLAIN, STRANGE_1, STRANGE_2, STRANGE, EMPTY = range(6)
SHARES = (0.58, 0.12, 0.06, 0.06, 0.08, 0.10)
# A style that the base draws only when it is named.
NAMED_SHARES = (0.90, 0.0, 0.0, 0.0, 0.0, 0.10)


class Captions:
    """Token rows of every picture's captions. `rows` [N, 6, 77] index the `seen` tokens; `known` [N, 6, 77] is 0
    where a token is not one of them."""

    def __init__(self, names: list[str], styles: list[str], default: list[bool]) -> None:
        tokenizer = Tokenizer()
        ids = []
        for name, style in zip(names, styles, strict=True):
            subject = name.replace("-", " ")
            plain = tokenizer(f"emoji of {subject}")[0]
            strange = [torch.cat([plain[:1], torch.full((n,), UNKNOWN), plain[1:-n]]) for n in (1, 2, 3)]
            ids += [tokenizer(f"{style} emoji of {subject}")[0], plain, *strange, tokenizer("")[0]]
        ids = torch.stack(ids)
        self.seen = torch.tensor(sorted(set(ids.flatten().tolist()) - {UNKNOWN}))
        where = torch.zeros(UNKNOWN + 1000, dtype=torch.long)
        where[self.seen] = torch.arange(len(self.seen))
        self.rows = where[ids].view(len(names), -1, 77).to(DEVICE)
        self.known = (ids != UNKNOWN).view(len(names), -1, 77).to(DEVICE, HALF)
        shares = torch.tensor([SHARES if here else NAMED_SHARES for here in default], device=DEVICE)
        self._ends = shares.cumsum(1)
        self._names, self._styles = names, styles

    def draw(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, known) [B, 77] of one caption at random for each picture."""
        ends = self._ends[index]
        kind = (torch.rand(len(index), 1, device=DEVICE) > ends).sum(1).clamp(max=EMPTY)
        return self.rows[index, kind], self.known[index, kind]

    def first(self, name: str) -> int:
        """The index of the subject's first picture."""
        return self._names.index(name)

    def of_style(self, style: str) -> dict[str, int]:
        """Subject -> index of its picture in that style."""
        pairs = zip(self._names, self._styles, strict=True)
        return {name: index for index, (name, own) in enumerate(pairs) if own == style}
