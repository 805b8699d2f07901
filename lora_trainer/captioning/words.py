"""What a captioner says about a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image

GENERAL, CHARACTER = "general", "character"


@dataclass(frozen=True)
class Tag:
    """A tag as its model names it, with underscores (`long_hair`), and its score from 0 to 1."""

    name: str
    score: float
    kind: Literal["general", "character"] = GENERAL


@dataclass(frozen=True)
class Words:
    """A sentence, or tags, or both."""

    sentence: str = ""
    tags: tuple[Tag, ...] = ()


class Captioner(Protocol):
    """A model that captions pictures. It is loaded when the first picture comes."""

    name: str

    def caption(self, image: Image) -> Words:
        """What `image`, upright RGB, shows. Raises UserError when the model cannot be used."""
        ...

    def rest(self) -> None:
        """Give back what is held of the accelerator, until the next picture."""
        ...
