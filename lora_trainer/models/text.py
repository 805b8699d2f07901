"""Captions to text embeddings: token ids in chunks of 75, then CLIP.

As in the WebUI, a caption longer than 75 tokens is cut into chunks that are encoded one by one and joined, so
every embedding has 77 tokens a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizerFast

CHUNK = 75
TOKENIZER_FOLDER = Path(__file__).parent / "clip"


class Tokenizer:
    """CLIP's byte-pair tokenizer with SD1's padding (end-of-text)."""

    def __init__(self, folder: Path = TOKENIZER_FOLDER) -> None:
        self._clip = CLIPTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        self.begin, self.end = self._clip.bos_token_id, self._clip.eos_token_id

    def __call__(self, caption: str) -> Tensor:
        """[chunks, 77] int64; the empty caption has one chunk."""
        ids = self._clip(caption, add_special_tokens=False, truncation=False, verbose=False).input_ids
        chunks = [ids[i : i + CHUNK] for i in range(0, len(ids), CHUNK)] or [[]]
        return torch.tensor([self._framed(chunk) for chunk in chunks])

    def _framed(self, chunk: Sequence[int]) -> list[int]:
        return [self.begin, *chunk, self.end] + [self.end] * (CHUNK - len(chunk))


@dataclass(frozen=True)
class TextEncoder:
    """The text side of a model: its modules, and a pure function of token ids.

    `encode` does not decide about gradients, so one object serves frozen and trained encoders.
    """

    tokenizer: Tokenizer
    module: CLIPTextModel

    def tokenize(self, caption: str) -> Tensor:
        """[chunks, 77] int64 on the CPU."""
        return self.tokenizer(caption)

    def encode(self, ids: Tensor, weights: Tensor | None = None) -> Tensor:
        """[chunks, 77] token ids (and optional emphasis of the same shape) to [1, 77 × chunks, width].

        Emphasis multiplies each token's embedding and restores the mean, as the WebUI's "Original" mode does for
        one caption.
        """
        embedded = self.module(input_ids=ids).last_hidden_state
        if weights is not None:
            mean = embedded.mean()
            embedded = embedded * weights.unsqueeze(-1)
            embedded = embedded * (mean / embedded.mean())
        return embedded.reshape(1, -1, embedded.shape[-1])
