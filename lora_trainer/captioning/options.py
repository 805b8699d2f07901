"""How pictures are captioned: every setting, declared once. Flags of the command line and controls are derived."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from lora_trainer.config.convert import Problem, convert
from lora_trainer.config.options import Option, options_of
from lora_trainer.errors import ConfigError

# The captioner of whoever names none. Like any name on the hub it is downloaded only when asked for.
DEFAULT = "Salesforce/blip-image-captioning-base"


def _about(text: str, **bounds: Any) -> Meta:
    return Meta(description=text, extra={"group": "Captions"}, **bounds)


class CaptionOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Only `build` makes one from outside, since constructing it checks nothing."""

    captioner: Annotated[str, _about("A folder with a captioner or a tagger, or its name on the Hugging Face hub.")] = (
        DEFAULT
    )
    download: Annotated[bool, _about("Let the captioner be downloaded if it is not here.")] = False
    existing: Annotated[
        Literal["skip", "append", "prepend", "replace"],
        _about("What happens to pictures that have a caption: the new words go behind it, before it, in its place."),
    ] = "skip"
    trigger_words: Annotated[str, _about("Words put in front of each caption that lacks them.")] = ""
    threshold: Annotated[float, _about("The score from which on a tag is taken.", ge=0, le=1)] = 0.35
    character_threshold: (
        Annotated[float, _about("The same for names of characters; as the others when left out.", ge=0, le=1)] | None
    ) = None
    blacklist: Annotated[str, _about("Tags to leave out, separated by commas.")] = ""
    spaces: Annotated[bool, _about("Write long_hair as long hair; faces such as >_< stay.")] = True
    escape: Annotated[bool, _about("Write ( as \\( in new words, for caption_syntax webui.")] = False
    device: Annotated[str, _about("Where a transformers captioner runs: auto, cpu, cuda, cuda:1 and so on.")] = "auto"


def caption_options() -> dict[str, Option]:
    """Every option by its key."""
    return options_of(CaptionOptions)


def build(given: Mapping[str, object]) -> CaptionOptions:
    """The options that `given` says. Raises ConfigError with every problem at once."""
    values, problems = {}, []
    for key, value in given.items():
        try:
            values[key] = convert(caption_options()[key], value)
        except Problem as problem:
            problems.append(str(problem))
    if problems:
        raise ConfigError(problems)
    return CaptionOptions(**values)
