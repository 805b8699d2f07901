"""Presets: a few settings at once, under the name of what is to be learned. One declaration; change values here.

A preset holds what differs from the defaults, for every model family and beside that for each. What was measured, on
SD1.5: docs/defaults.md. The learning rate of SDXL and Stable Diffusion 3 is the usual one of other trainers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NONE = "none"
# SD2's UNet is SD1.5's, with a wider text encoder in front: what suits one suits the other.
FAMILIES = {"sd15": "SD1.5 and SD2", "sdxl": "SDXL", "sd3": "Stable Diffusion 3"}
Values = Mapping[str, Any]
# Four pictures a step, as by default, in the memory of a card with 12 to 24 GB.
_HALF_BATCHES = {"batch_size": 2, "gradient_accumulation_steps": 2}
_SDXL = {"learning_rate": 2e-4, **_HALF_BATCHES}
_SD3 = {"learning_rate": 1e-4, **_HALF_BATCHES}


@dataclass(frozen=True)
class Preset:
    """`why` is one sentence. `sd15`, `sdxl` and `sd3` come on top of `values`."""

    why: str
    values: Values
    sd15: Values = field(default_factory=dict)
    sdxl: Values = field(default_factory=dict)
    sd3: Values = field(default_factory=dict)

    def of(self, family: str) -> dict[str, Any]:
        """Its settings for a model of `family`, one of FAMILIES."""
        return {**self.values, **getattr(self, family)}


PRESETS = {
    "style": Preset(
        "A style is in every picture and needs no word that the model does not know: a larger rank and more epochs "
        "make it strong.",
        {"lora_rank": 16, "epochs": 15},
        sdxl=_SDXL,
        sd3=_SD3,
    ),
    "character": Preset(
        "A face is small details under a new name, mostly from few pictures, which must be seen often: twice the rank, "
        "four times the epochs, and on SD1.5 and SD2 the text encoder learns the name.",
        {"lora_rank": 16, "epochs": 40},
        sd15={"train_text_encoder": True},
        sdxl=_SDXL,
        sd3=_SD3,
    ),
    "object": Preset(
        "A thing, too, is learned from few pictures that must be seen often: twice the rank, four times the epochs, "
        "and of each picture the crop keeps what is around the most detail.",
        {"lora_rank": 16, "epochs": 40, "crop": "focus"},
        sdxl=_SDXL,
        sd3=_SD3,
    ),
    "trial": Preset(
        "A few steps on a few pictures show whether all works, and how long the whole run will take.",
        {"trial": True},
    ),
    "low-memory": Preset(
        "One picture at a time, whose activations are computed twice, takes the least memory; four of them make one "
        "step, so that as much is learned as by default.",
        {"batch_size": 1, "gradient_accumulation_steps": 4, "gradient_checkpointing": True},
    ),
}


def preset_of(name: object) -> Preset | None:
    """The preset called `name`, in letters of any size; None for `none` and for what is none."""
    return PRESETS.get(name.strip().lower()) if isinstance(name, str) else None


def preset_values(name: object, family: str) -> dict[str, Any]:
    """The settings of the preset `name` for a model of `family`; empty where there is no such preset."""
    preset = preset_of(name)
    return preset.of(family) if preset else {}


def preset_keys() -> tuple[str, ...]:
    """Every setting that some preset holds."""
    return tuple(dict.fromkeys(key for preset in PRESETS.values() for part in FAMILIES for key in preset.of(part)))
