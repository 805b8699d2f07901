"""What a slider is trained on: its prompts, and pictures at which they are compared.

Concept Sliders (arXiv:2311.12092) and LECO denoise a picture part of the way anew for each step, which costs ten times
as much as the step and has no fixed shape. Here the base draws a set of pictures once; steps then add noise to them as
to any others, so that what the network is shown is still what it meets when it draws the target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lora_trainer.config import Config
from lora_trainer.config.schema import Concept
from lora_trainer.dataset.buckets import Bucket
from lora_trainer.dataset.captions import stop
from lora_trainer.dataset.concepts import layout
from lora_trainer.dataset.folders import files_of
from lora_trainer.dataset.images import is_picture
from lora_trainer.dataset.items import Item
from lora_trainer.dataset.prepare import NO_RULES, Encoded
from lora_trainer.dataset.samples import Captions, Prepared, Sample, Text, length
from lora_trainer.errors import DataError
from lora_trainer.events import EventSink, Progress
from lora_trainer.models.model import Model
from lora_trainer.sampling import Recipe, denoise
from lora_trainer.training import randomness
from lora_trainer.training.precision import resolve

# As Concept Sliders' own trainer draws; in so many steps pictures have settled.
GUIDANCE, STEPS = 3.0, 20
DRAWN = "drawn"


def prompts_of(config: Config) -> dict[str, dict[str, str]]:
    """Of each target prompt the `positive` and the `negative` one: one for each attribute, which stands before all."""
    return {
        _led(words, config.slider_target): {
            "positive": _led(words, config.slider_positive),
            "negative": _led(words, config.slider_negative),
        }
        for words in config.slider_attributes or [""]
    }


def drawn_items(config: Config) -> tuple[Item, ...]:
    """What the base is to draw, for each target prompt in turn; no files yet."""
    targets = list(prompts_of(config))
    places = [Path(DRAWN) / f"{number:04}.png" for number in range(max(config.slider_pictures, len(targets)))]
    return tuple(Item(path, targets[number % len(targets)], DRAWN) for number, path in enumerate(places))


def picture_items(config: Config, folder: Path, concepts: Sequence[Concept] = ()) -> tuple[Item, ...]:
    """The pictures of `folder`, once for every target prompt; captions are not read. Raises DataError."""
    plan = layout(folder, concepts)
    files = dict.fromkeys(file for root in plan.roots for file in files_of(root, stop)[0] if is_picture(file))
    if not files:
        raise DataError(f"{folder}: expected pictures, found none")
    return tuple(
        Item(file, text, "slider_target", repeats=plan.concept(file).repeats)
        for file in files
        for text in prompts_of(config)
    )


def is_drawn(item: Item) -> bool:
    """Whether the base draws it."""
    return item.source == DRAWN


def draw(items: Sequence[Item], config: Config, model: Model, *, sink: EventSink, kept: Encoded) -> Prepared:
    """The pictures of `items` as the base draws them, each from noise of its own, a function of seed and name.

    What `kept.between` raises ends the work, which goes on when `kept` is given again.
    """
    side = config.resolution or model.facts.family.resolution
    precision, _ = resolve(config.mixed_precision, model.facts.device)
    for item in items[kept.count :]:
        kept.between()
        seed = randomness.key(config.seed, f"{DRAWN} {item.path.name}")
        recipe = Recipe((side, side), STEPS, GUIDANCE, "", seed)
        latents = denoise(model, item.caption, recipe, precision).float().cpu()
        sizes = torch.tensor([[side, side, 0, 0, side, side]])
        kept.samples.append(Sample(item, Bucket(side, side), latents, sizes, {}, 0))
        kept.count += 1
        sink(Progress(stage="drawing pictures", done=kept.count, total=len(items)))
    return Prepared(tuple(kept.samples), ())


def directed(prepared: Prepared, config: Config, read: Callable[[str], Text]) -> Prepared:
    """With the prompts, all of one length, in place of captions."""
    prompts = prompts_of(config)
    words = {text for target, ways in prompts.items() for text in (target, *ways.values())}
    texts = {text: read(text) for text in (*words, "")}
    captions = Captions(NO_RULES, texts.__getitem__)
    most = max(map(length, texts.values()))
    known = dict(zip(texts, captions.alike(list(texts.values()), most), strict=True))
    known |= {NO_RULES.plain(text): known[text] for text in prompts}
    samples = tuple(_directed(sample, prompts[sample.item.caption], known) for sample in prepared.samples)
    return replace(prepared, samples=samples, rules=NO_RULES, texts=known)


def _directed(sample: Sample, ways: Mapping[str, str], known: Mapping[str, Text]) -> Sample:
    text = known[sample.item.caption]
    return replace(
        sample, text=text, tokens=length(text), directions={name: known[words] for name, words in ways.items()}
    )


def _led(words: str, prompt: str) -> str:
    return " ".join([*words.split(), *prompt.split()])
