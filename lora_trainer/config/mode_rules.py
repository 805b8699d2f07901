"""What each mode needs beside it, and which settings say nothing in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lora_trainer.config.options import options
from lora_trainer.config.schema import Config
from lora_trainer.errors import shown

_PROMPTS = ("slider_positive", "slider_negative", "slider_target", "slider_attributes")
_CAPTIONS = ("caption_prefix", "caption_suffix", "shuffle_captions", "tag_dropout", "caption_dropout", "wildcards")
_LOSSES = ("masked_loss", "reg_data_dir", "preservation_weight")
# Without pictures there is nothing that these could be about.
_PICTURES = ("concepts", "validation_data_dir", "extra_resolutions", "allow_upscaling", "flip")
_STRANGE: Mapping[str, tuple[str, ...]] = {
    "images": (*_PROMPTS, "original_data_dir"),
    "slider": ("original_data_dir", "trigger_words", "metadata_path", *_CAPTIONS, *_LOSSES),
    "difference": (*_PROMPTS, *_LOSSES, "validation_data_dir"),
}


def mode_problems(config: Config) -> Iterator[str]:
    for key in _STRANGE[config.mode]:
        if getattr(config, key) != options()[key].default:
            yield f"{key}: says nothing in mode {config.mode}; leave it out, found {shown(getattr(config, key))}"
    if config.mode == "slider":
        yield from _slider(config)
    if config.mode == "difference":
        yield from _difference(config)


def _slider(config: Config) -> Iterator[str]:
    if not config.slider_positive.strip():
        yield "slider_positive: expected the prompt to lead to beside mode slider, found none"
    elif config.slider_positive.strip() == config.slider_negative.strip():
        yield f"slider_negative: expected something else than slider_positive, found {shown(config.slider_negative)}"
    if any(concept.trigger_words or concept.regularization for concept in config.concepts):
        yield "concepts: trigger_words and regularization say nothing in mode slider, which reads no captions"
    if config.train_data_dir.strip():
        return
    if config.max_train_steps is None:
        yield "max_train_steps: expected beside mode slider without train_data_dir, found none"
    for key in _PICTURES:
        if getattr(config, key) != options()[key].default:
            yield f"{key}: expected train_data_dir beside it, found none"


def _difference(config: Config) -> Iterator[str]:
    if not (config.original_data_dir or "").strip():
        yield "original_data_dir: expected the pictures before the change beside mode difference, found none"
    if config.crop == "focus":
        yield "crop: expected center or random in mode difference, whose pairs are cut alike, found focus"
    if any(concept.regularization is not None for concept in config.concepts):
        yield "concepts: regularization says nothing in mode difference; leave it out"
