"""The rules of a run's captions, and whether they are encoded ahead or in each step."""

from __future__ import annotations

from collections.abc import Sequence

from lora_trainer.config import Config
from lora_trainer.dataset.items import Item
from lora_trainer.dataset.prepare import MOST_VARIANTS
from lora_trainer.dataset.rules import Rules, variants
from lora_trainer.events import EventSink, Notice
from lora_trainer.models.text import TextEncoder

# Of embeddings in memory: about 4,500 of SD 1.x.
MOST_BYTES = 1024**3


def rules_of(config: Config) -> Rules:
    """How the captions of a run change from visit to visit."""
    return Rules(
        prefix=config.caption_prefix.strip(),
        suffix=config.caption_suffix.strip(),
        trigger_words=(config.trigger_words, *(concept.trigger_words or "" for concept in config.concepts)),
        shuffle=config.shuffle_captions,
        keep_tokens=config.keep_tokens,
        tag_dropout=config.tag_dropout,
        caption_dropout=config.caption_dropout,
        wildcards=config.wildcards,
        prompts=config.caption_syntax == "webui",
        preserved=config.preservation_weight > 0,
        preservation_prompt=(config.preservation_prompt or "").strip(),
    )


def read_live(items: Sequence[Item], config: Config, text: TextEncoder, sink: EventSink) -> bool:
    """Whether captions are read when they are drawn, because there are too many to keep; says which it is.

    Raises DataError for a caption that cannot be read then.
    """
    rules = rules_of(config)
    found = [variants(rules, item.caption, MOST_VARIANTS) for item in items]
    if all(captions is not None and len(captions) == 1 for captions in found):
        return False
    known = {caption for captions in found for caption in captions or ()}
    if rules.preserved:
        known |= set(map(rules.without_trigger, known))
    many = f"a picture has more than {MOST_VARIANTS} captions" if None in found else _too_large(known, text)
    if config.train_text_encoder:
        return many is not None
    if many is not None:
        if rules.prompts:
            # Now, not in the middle of the run.
            for item in items:
                text.tokens(rules.vocabulary(item.caption))
            text.tokens(rules.preservation_prompt)
        sink(Notice(text=f"captions: {many}, so the text encoder runs in each step"))
        return True
    sink(Notice(text=f"captions: all {len(known)} of {len(items)} pictures are encoded once, before the first step"))
    return False


def _too_large(captions: set[str], text: TextEncoder) -> str | None:
    size = len(captions) * text.context("")["context"].numel() * 4
    return f"there are {len(captions):,} of them, {size / 1024**3:.1f} GiB encoded" if size > MOST_BYTES else None
