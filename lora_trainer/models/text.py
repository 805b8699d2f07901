"""Captions to text embeddings: token ids in chunks of 75, then CLIP.

As in the WebUI, a caption longer than 75 tokens is cut into chunks that are encoded one by one and joined, so
every embedding has 77 tokens a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
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


@cache
def bundled() -> Tokenizer:
    """CLIP's own, read once a process: it never changes, and each reading leaves about a kilobyte in the library."""
    return Tokenizer()


@dataclass(frozen=True)
class TextEncoder:
    """The text side of a model: its modules, and a pure function of token ids.

    `encode` does not decide about gradients. `clip_skip` 1 takes the last layer's output, 2 that of the layer before.
    `context` is what a batch holds of a caption that is encoded ahead, `tokens` of one that is encoded in the step.
    """

    tokenizer: Callable[[str], Tensor]
    module: CLIPTextModel
    clip_skip: int = 1

    def tokenize(self, caption: str) -> Tensor:
        """[chunks, 77] int64 on the CPU."""
        return self.tokenizer(caption)

    def encode(self, ids: Tensor, weights: Tensor | None = None) -> Tensor:
        """[chunks, 77] token ids (and optional emphasis of the same shape) to [1, 77 × chunks, width]."""
        embedded = self._hidden(ids)
        if weights is not None:
            embedded = self.weigh(embedded, weights)
        return embedded.reshape(1, -1, embedded.shape[-1])

    def weigh(self, embedded: Tensor, weights: Tensor) -> Tensor:
        """Emphasis [chunks, 77] on [chunks, 77, width]: it multiplies each token's embedding and restores each chunk's
        mean, as the WebUI's "Original" mode does for one caption."""
        plain = embedded.float()
        weighed = plain * weights.unsqueeze(-1)
        mean, new_mean = (x.mean(dim=(1, 2), keepdim=True) for x in (plain, weighed))
        return (weighed * (mean / new_mean)).to(embedded.dtype)

    def embed(self, caption: str) -> Tensor:
        """[1, 77 × chunks, width] of one caption, frozen."""
        with torch.no_grad():
            return self.encode(self.tokenize(caption).to(next(self.module.parameters()).device))

    def context(self, caption: str) -> dict[str, Tensor]:
        """`context`: the frozen encoder's embedding, [77 × chunks, width] float32 on the CPU."""
        return {"context": self.embed(caption)[0].float().cpu()}

    def tokens(self, caption: str) -> dict[str, Tensor]:
        """`ids`: [chunks, 77] int64 on the CPU; and `emphasis` of that shape where captions have it."""
        return {"ids": self.tokenize(caption)}

    @property
    def inner(self) -> nn.Module:
        """CLIP's embeddings, encoder and final norm; transformers 5 dropped the `text_model` level around them."""
        return getattr(self.module, "text_model", self.module)

    @property
    def layers(self) -> int:
        """How many of the encoder's layers are heard."""
        return len(self.inner.encoder.layers) + 1 - self.clip_skip

    def _hidden(self, ids: Tensor) -> Tensor:
        if self.clip_skip == 1:
            return self.module(input_ids=ids).last_hidden_state
        hidden = self.module(input_ids=ids, output_hidden_states=True).hidden_states[-self.clip_skip]
        return self.inner.final_layer_norm(hidden)
