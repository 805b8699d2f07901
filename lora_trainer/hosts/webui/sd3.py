"""Stable Diffusion 3's text encoders in the WebUI (modules/models/sd3/sd3_cond.py): both CLIPs in one wrapper that
reads prompts, and T5-XXL beside them where the setting Enable T5 was on when the model was loaded, and still is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from modules import devices, shared
from torch import Tensor

from lora_trainer.config import Config
from lora_trainer.errors import DataError
from lora_trainer.hosts.webui.prompts import HostEncoder, PromptEncoder, literal
from lora_trainer.models.families import Family
from lora_trainer.models.single_file import NO_T5, encoders_of
from lora_trainer.models.text import Conditions, side_by_side

T5_ON = (
    "base model: captions are heard by its two CLIP text encoders and by T5-XXL, which is on in the WebUI; the LoRA is "
    "best drawn with it on"
)


def text_of(sd_model: Any, state: dict[str, Tensor], family: Family, config: Config) -> HostEncoder:
    """Raises ConfigError for a `clip_skip`."""
    clips, t5 = sd_model.text_encoders.model_lg, sd_model.text_encoders.model_t5
    heard = t5 if t5.t5xxl and shared.opts.sd3_enable_t5 else None
    views = encoders_of(state, family, config.clip_skip)
    parts = {"tokenizer": literal(clips), "encoders": views, "embedders": (clips,), "t5": heard}
    if config.caption_syntax == "literal":
        return Sd3Encoder(**parts)
    return Sd3PromptEncoder(**parts, emphasis=shared.opts.emphasis)


@dataclass(frozen=True)
class Sd3Encoder(HostEncoder):
    """`t5`: the WebUI's, where it is heard. It is never a view, so what is encoded by views is encoded without it, and
    refused where it is on."""

    t5: Any = None

    @property
    def told(self) -> tuple[str, ...]:
        return (T5_ON if self.t5 else NO_T5,)

    @property
    def hearing(self) -> str:
        return super().hearing + (" T5" if self.t5 else "")

    def read(self, caption: str) -> Conditions:
        """CLIP's [1, 77 × chunks, width] alone, or whole with as many tokens of T5's."""
        with torch.no_grad(), devices.without_autocast():
            clip, pooled = self._say(self.embedders[0], caption)
            if self.t5 is None:
                # The WebUI has filled it up with zeros, as the network does it here.
                return Conditions(clip[..., : pooled.shape[-1]], pooled)
            return Conditions(torch.cat([clip, self._t5_says(caption, clip.shape[1])], dim=1), pooled)

    def _t5_says(self, caption: str, count: int) -> Tensor:
        """[1, count, width] of a caption that is no prompt."""
        (ids,) = self.t5.tokenize([caption])
        ids = [*ids, self.t5.id_end][:count]
        said, _ = self.t5.t5xxl([ids + [self.t5.id_pad] * (count - len(ids))])
        return said

    def joined(self, parts: list[Tensor], weights: Tensor | None) -> Tensor:
        """Emphasis restores the mean of both CLIPs together."""
        embedded = side_by_side(parts)
        return embedded if weights is None else self.weigh(embedded, weights)

    def conditions(self, ids: Tensor, weights: Tensor | None = None) -> Conditions:
        self._require_clip_alone()
        return super().conditions(ids, weights)

    def tokens(self, caption: str) -> dict[str, Tensor]:
        self._require_clip_alone()
        return super().tokens(caption)

    def _require_clip_alone(self) -> None:
        """Raises DataError."""
        if self.t5 is not None:
            raise DataError(
                "Enable T5: expected the WebUI's setting off, and the checkpoint loaded again, where captions change "
                "too often to be encoded ahead, and where a slider's pictures are drawn: T5-XXL is not heard there"
            )


@dataclass(frozen=True)
class Sd3PromptEncoder(Sd3Encoder, PromptEncoder):
    """Captions read as prompts by all of them."""

    def _t5_says(self, caption: str, count: int) -> Tensor:
        return self.t5([caption], token_count=count)
