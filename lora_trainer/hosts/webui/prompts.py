"""The text encoders of the loaded model, with the WebUI's tokenizer and, where wanted, its reading of prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from modules import devices, shared
from torch import Tensor

from lora_trainer.config import Config
from lora_trainer.errors import DataError
from lora_trainer.hosts.webui.tensors import embedders_of
from lora_trainer.models.families import Family
from lora_trainer.models.single_file import encoders_of
from lora_trainer.models.text import CHUNK, Conditions, TextEncoder


def text_of(sd_model: Any, state: dict[str, Tensor], family: Family, config: Config) -> HostEncoder:
    """Views of the text encoders, heard where the WebUI hears them. Raises ConfigError for a `clip_skip` in a family
    that has none."""
    embedders = tuple(embedders_of(sd_model).values())
    stop = int(shared.opts.CLIP_stop_at_last_layers)
    clip = getattr(embedders[0].wrapped, "transformer", None)
    views = encoders_of(state, family, config.clip_skip, config=getattr(clip, "config", None))
    moved = len(views) > 1 and getattr(shared.opts, "sdxl_clip_l_skip", False)
    heard = stop if moved or family.clip_skip else family.text[0].layer
    if config.clip_skip is None:
        views = (replace(views[0], clip_skip=heard), *views[1:])
    own_layer = views[0].clip_skip != heard
    if config.caption_syntax == "literal":
        return HostEncoder(literal(embedders[0]), views, embedders, own_layer)
    return PromptEncoder(literal(embedders[0]), views, embedders, own_layer, shared.opts.emphasis)


@dataclass(frozen=True)
class HostEncoder(TextEncoder):
    """Frozen captions are encoded by the WebUI's own encoders, one chunk after the other as it does it: the views round
    otherwise where an attention is packed. `own_layer`: by the views after all, since they are to be heard at another
    layer than the WebUI hears its own at."""

    embedders: tuple[Any, ...] = ()
    own_layer: bool = False

    @property
    def told(self) -> tuple[str, ...]:
        """What the user should know of how captions are heard."""
        return ()

    def read(self, caption: str) -> Conditions:
        if self.own_layer:
            told = {name: t.to(next(self.module.parameters()).device) for name, t in self.tokens(caption).items()}
            with torch.no_grad():
                return self.conditions(told["ids"], told.get("emphasis"))
        with torch.no_grad(), devices.autocast():
            said = [self._say(embedder, caption) for embedder in self.embedders]
        pooled = next((vector for _, vector in said if vector is not None), None)
        return Conditions(torch.cat([hidden for hidden, _ in said], dim=-1), pooled)

    def _say(self, embedder: Any, caption: str) -> tuple[Tensor, Tensor | None]:
        """What one encoder says of each token, and of the whole caption where it does that."""
        chunks = [embedder.process_tokens([ids], [[1.0] * len(ids)]) for ids in self.tokenize(caption).tolist()]
        return torch.hstack(chunks), getattr(chunks[0], "pooled", None)


@dataclass(frozen=True)
class PromptEncoder(HostEncoder):
    """Captions read as prompts: emphasis, textual inversions and BREAK.

    One caption at a time: the "Original" emphasis normalizes over the whole batch. `emphasis` is the WebUI's setting.
    """

    emphasis: str = "Original"

    def _say(self, embedder: Any, caption: str) -> tuple[Tensor, Tensor | None]:
        said = embedder([caption])
        return said if isinstance(said, tuple) else (said, None)

    def tokens(self, caption: str) -> dict[str, Tensor]:
        """Raises DataError for a caption with a textual inversion, whose vectors are no token's."""
        chunks, _ = self.embedders[0].tokenize_line(caption)
        names = [fix.embedding.name for chunk in chunks for fix in chunk.fixes]
        if names:
            raise DataError(
                f"caption_syntax: the caption {caption!r} names the embedding {names[0]!r}, which has no tokens that a "
                "step could encode (it does with train_text_encoder, and where captions change too often to be encoded "
                "ahead); expected captions without embeddings, or caption_syntax literal"
            )
        return {
            "ids": torch.tensor([chunk.tokens for chunk in chunks]),
            "emphasis": torch.tensor([chunk.multipliers for chunk in chunks]),
        }

    def weigh(self, embedded: Tensor, weights: Tensor) -> Tensor:
        if self.emphasis in ("None", "Ignore"):
            return embedded
        if self.emphasis == "No norm":
            return (embedded * weights.unsqueeze(-1)).to(embedded.dtype)
        return super().weigh(embedded, weights)


def literal(encoder: Any) -> Callable[[str], Tensor]:
    """The host's tokenizer, in chunks of 75, with nothing of the prompt's syntax."""

    def tokenize(caption: str) -> Tensor:
        (ids,) = encoder.tokenize([caption])
        chunks = [ids[i : i + CHUNK] for i in range(0, len(ids), CHUNK)] or [[]]
        framed = [[encoder.id_start, *chunk] + [encoder.id_end] * (CHUNK + 1 - len(chunk)) for chunk in chunks]
        return torch.tensor(framed)

    return tokenize
