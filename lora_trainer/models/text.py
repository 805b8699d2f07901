"""Captions to text embeddings: token ids in chunks of 75, then CLIP, once or twice.

As in the WebUI, a caption longer than 75 tokens is cut into chunks that are encoded one by one and joined, so
every embedding has 77 tokens a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizerFast

CHUNK = 75
# End-of-text, of every CLIP.
END = 49407
TOKENIZER_FOLDER = Path(__file__).parent / "clip"
# diffusers' names of a model's first and second text encoder.
NETWORKS = ("text_encoder", "text_encoder_2")


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
    """CLIP's own, read once a process: it never changes, and each reading leaves about a kilobyte in its library."""
    return Tokenizer()


class Conditions(NamedTuple):
    """What a UNet is told of captions: context [B, 77 × chunks, width], and pooled [B, width] in the families that have
    one vector a caption."""

    context: Tensor
    pooled: Tensor | None = None


@dataclass(frozen=True)
class ClipEncoder:
    """One CLIP: what it says of token ids is a layer's output.

    `clip_skip` 1 takes the last layer's, 2 that of the layer before, after the final norm if `normed`. The token `pad`
    fills chunks up behind the end of the text; None leaves end-of-text there. With `pooled` it has a second voice: the
    last layer's output at the end of the text, normed and, where the module has a projection, projected. `network` is
    diffusers' name of it.
    """

    module: CLIPTextModel | CLIPTextModelWithProjection
    clip_skip: int = 1
    normed: bool = True
    pad: int | None = None
    pooled: bool = False
    network: str = NETWORKS[0]

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """[chunks, 77] token ids to [chunks, 77, width], and to [chunks, projection] where it is `pooled`."""
        if self.clip_skip == 1 and self.normed and not self.pooled:
            return self.module(input_ids=ids).last_hidden_state, None
        layers = self.inner(input_ids=self.padded(ids), output_hidden_states=True).hidden_states
        hidden = layers[-self.clip_skip]
        return self.inner.final_layer_norm(hidden) if self.normed else hidden, self.pool(layers[-1], ids)

    def pool(self, last: Tensor, ids: Tensor) -> Tensor | None:
        """[chunks, projection] of the last layer's output [chunks, 77, width]; None where it is not `pooled`."""
        if not self.pooled:
            return None
        at_end = last[torch.arange(len(ids), device=ids.device), ends(ids)]
        normed = self.inner.final_layer_norm(at_end)
        return normed if self.projection is None else self.projection(normed)

    @property
    def projection(self) -> nn.Module | None:
        """Of what is pooled."""
        return getattr(self.module, "text_projection", None)

    def padded(self, ids: Tensor) -> Tensor:
        """[chunks, 77] with its own padding."""
        if self.pad is None:
            return ids
        behind = torch.arange(ids.shape[1], device=ids.device) > ends(ids).unsqueeze(1)
        return ids.masked_fill(behind, self.pad)

    @property
    def inner(self) -> nn.Module:
        """CLIP's embeddings, encoder and final norm; transformers 5 dropped the `text_model` level around them."""
        return getattr(self.module, "text_model", self.module)

    @property
    def layers(self) -> int:
        """How many of its layers are heard."""
        count = len(self.inner.encoder.layers)
        return count if self.pooled else count + 1 - self.clip_skip


def side_by_side(parts: Sequence[Tensor]) -> Tensor | None:
    """One tensor of all widths; None of none."""
    return (parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)) if parts else None


def ends(ids: Tensor) -> Tensor:
    """[chunks]: where the text of each chunk [77] ends."""
    return (ids == END).int().argmax(-1)


@dataclass(frozen=True)
class TextEncoder:
    """The text side of a model: its encoders, side by side, and a pure function of token ids.

    `encode` does not decide about gradients. `context` is what a batch holds of a caption that is encoded ahead,
    `tokens` of one that is encoded in the step.
    """

    tokenizer: Callable[[str], Tensor]
    encoders: tuple[ClipEncoder, ...]

    @property
    def networks(self) -> dict[str, ClipEncoder]:
        """The encoders by diffusers' names of them."""
        return {encoder.network: encoder for encoder in self.encoders}

    @property
    def modules(self) -> list[nn.Module]:
        return [encoder.module for encoder in self.encoders]

    @property
    def module(self) -> nn.Module:
        """The first encoder's: the only one before SDXL."""
        return self.encoders[0].module

    @property
    def clip_skip(self) -> int:
        return self.encoders[0].clip_skip

    @property
    def hearing(self) -> str:
        """What decides, beside the encoders' weights, how a caption is heard: for caches."""
        return str(self.clip_skip)

    def tokenize(self, caption: str) -> Tensor:
        """[chunks, 77] int64 on the CPU."""
        return self.tokenizer(caption)

    def conditions(self, ids: Tensor, weights: Tensor | None = None) -> Conditions:
        """One caption's [chunks, 77] token ids (and optional emphasis of the same shape). What is pooled is the first
        chunk."""
        said = [encoder(ids) for encoder in self.encoders]
        embedded = self.joined([hidden for hidden, _ in said], weights)
        pooled = side_by_side([pooled[:1] for _, pooled in said if pooled is not None])
        return Conditions(embedded.reshape(1, -1, embedded.shape[-1]), pooled)

    def encode(self, ids: Tensor, weights: Tensor | None = None) -> Tensor:
        """The context alone: [1, 77 × chunks, width]."""
        return self.conditions(ids, weights).context

    def joined(self, parts: Sequence[Tensor], weights: Tensor | None) -> Tensor:
        """What each encoder says of the same chunks, [chunks, 77, width], side by side; with emphasis [chunks, 77]."""
        return side_by_side(parts if weights is None else [self.weigh(part, weights) for part in parts])

    def weigh(self, embedded: Tensor, weights: Tensor) -> Tensor:
        """Emphasis [chunks, 77] on one encoder's [chunks, 77, width]: it multiplies each token's embedding and restores
        each chunk's mean, as the WebUI's "Original" mode does for one caption."""
        plain = embedded.float()
        weighed = plain * weights.unsqueeze(-1)
        mean, new_mean = (x.mean(dim=(1, 2), keepdim=True) for x in (plain, weighed))
        return (weighed * (mean / new_mean)).to(embedded.dtype)

    def read(self, caption: str) -> Conditions:
        """One caption, frozen."""
        with torch.no_grad():
            return self.conditions(self.tokenize(caption).to(next(self.module.parameters()).device))

    def embed(self, caption: str) -> Tensor:
        """[1, 77 × chunks, width] of one caption, frozen."""
        return self.read(caption).context

    def context(self, caption: str) -> dict[str, Tensor]:
        """`context`: the frozen encoders' embedding, [77 × chunks, width], and `pooled` [width] where there is one;
        float32 on the CPU."""
        said = self.read(caption)._asdict()
        return {name: part[0].float().cpu() for name, part in said.items() if part is not None}

    def tokens(self, caption: str) -> dict[str, Tensor]:
        """`ids`: [chunks, 77] int64 on the CPU; and `emphasis` of that shape where captions have it."""
        return {"ids": self.tokenize(caption)}
