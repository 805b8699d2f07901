"""The settings of what a run learns from: pictures, two prompts, or pairs of pictures."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from lora_trainer.config.declare import about

MODES = "Sliders and differences"


class Modes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Part of `schema.Config`."""

    mode: Annotated[
        Literal["images", "slider", "difference"],
        about(MODES, "What is learned: the pictures; what parts two prompts; or what parts two folders of pictures."),
    ] = "images"
    slider_positive: Annotated[
        str, about(MODES, "For mode slider: the prompt that a weight above 0 leads to: a very old person.")
    ] = ""
    slider_negative: Annotated[
        str, about(MODES, "The prompt that it leads away from, and a weight below 0 to: a very young person.")
    ] = ""
    slider_target: Annotated[str, about(MODES, "What the slider acts on: a person; on every picture when empty.")] = ""
    slider_attributes: Annotated[
        list[str],
        about(MODES, "What it should leave alone: male, female; each stands before the three prompts in turn."),
    ] = msgspec.field(default_factory=list)
    slider_guidance: Annotated[
        float, about(MODES, "How far a weight of 1 leads, in differences of the two prompts: 1 to 4.", gt=0, le=100)
    ] = 3.0
    slider_pictures: Annotated[
        int,
        about(
            MODES,
            "So many pictures of the target the base draws for itself, where train_data_dir is empty.",
            ge=1,
            le=1000,
        ),
    ] = 32
    original_data_dir: (
        Annotated[
            str,
            about(MODES, "For mode difference: the pictures before the change, named as those of train_data_dir."),
        ]
        | None
    ) = None
