"""The trial run: every stage once on a few images, and what the full run will take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lora_trainer.config import Config, output_name_of, replace
from lora_trainer.dataset.items import Item
from lora_trainer.logs import in_words
from lora_trainer.training.data import Items
from lora_trainer.training.forecast import Need
from lora_trainer.training.judging import draws, interval
from lora_trainer.training.validation import draws_of

IMAGES = 8
STEPS = 4


def shorten(config: Config, items: Items) -> tuple[Config, Items]:
    """A run of one epoch and at most STEPS updates over at most IMAGES images, evenly picked from all."""
    short = replace(
        config,
        output_name=output_name_of(config) + "-trial",
        epochs=1,
        max_train_steps=STEPS,
        lr_warmup_steps=0,
        lr_warmup_ratio=0.0,
        save_steps=0,
        validate_every=0,
        early_stopping_patience=0,
        measure_drift=False,
        drift_prompts=[],
        clip_model_dir=None,
        sample_every=0,
        sample_prompts=config.sample_prompts[:1],
    )
    return short, Items(pick(items.train), pick(items.held_out), pick(items.regularization))


def pick(items: Sequence[Item]) -> tuple[Item, ...]:
    """At most IMAGES of them, evenly from all."""
    stride = max(1, math.ceil(len(items) / IMAGES))
    return tuple(items[::stride])


@dataclass
class Measured:
    """Seconds an image for preparing, an update for training, a pair for validating; on a GPU the need."""

    prepare: float = 0.0
    step: float = 0.0
    validate: float = 0.0
    need: Need | None = None


def forecast(config: Config, items: Items, measured: Measured) -> str:
    """One readable line about the full run of `config` on `items`."""
    shown = sum(item.repeats for item in items.shown) * (1 + len(config.extra_resolutions))
    micro_batches = math.ceil(shown / config.batch_size)
    steps = config.max_train_steps or config.epochs * math.ceil(micro_batches / config.gradient_accumulation_steps)
    measured_on = (items.held_out, items.train[: len(items.held_out)])
    pairs = sum(draws_of(len(part), most) for part, most in zip(measured_on, draws(config), strict=True))
    every = interval(config, pairs, steps)
    validations = 2 + (steps // every if every else 0)
    prepare = measured.prepare * (len(items.shown) + len(items.held_out))
    validate = measured.validate * pairs * validations
    train = measured.step * steps
    parts = [f"preparing {in_words(prepare)}", f"training {in_words(train)}"]
    if items.held_out:
        parts.append(f"validating {in_words(validate)}")
    total = in_words(prepare + train + validate)
    need = f", {measured.need}" if measured.need is not None else ""
    return f"trial passed: the full run has {steps} steps{need} and will take about {total} ({', '.join(parts)})"
