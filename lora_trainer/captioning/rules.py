"""From a captioner's words and the caption that is there to the caption that is written."""

from __future__ import annotations

import re
from collections.abc import Iterator

from lora_trainer.captioning.options import CaptionOptions
from lora_trainer.captioning.words import CHARACTER, Tag, Words
from lora_trainer.dataset.captions import clean
from lora_trainer.dataset.items import with_trigger

# As in prompts of the WebUI, where a bare parenthesis is emphasis.
_SPECIAL = re.compile(r"([\\()])")


def compose(words: Words, before: str, options: CaptionOptions) -> str:
    """The caption of a picture that had the caption `before`. What a person wrote stays as it is, unless replaced;
    tags that are there are not added again. Empty when there is nothing to say."""
    new = list(written(words, options))
    before = before.strip(" ,")
    if options.existing == "append":
        pieces = [before, *_fresh(new, before)]
    elif options.existing == "prepend":
        pieces = [*_fresh(new, before), before]
    else:
        pieces = list(_fresh(new, ""))
    return with_trigger(", ".join(filter(None, pieces)), options.trigger_words)


def written(words: Words, options: CaptionOptions) -> Iterator[str]:
    """The sentence, then the tags that score enough and are not on the blacklist, the best first."""
    sentence = clean(words.sentence).strip(" ,")
    if sentence:
        yield _escaped(sentence) if options.escape else sentence
    unwanted = same_tags(options.blacklist)
    for tag in sorted(words.tags, key=lambda tag: -tag.score):
        if tag.score >= _threshold(tag, options) and same(tag.name) not in unwanted:
            name = clean(spaced(tag.name) if options.spaces else tag.name)
            yield _escaped(name) if options.escape else name


def spaced(tag: str) -> str:
    """Spaces for underscores, except in faces (`>_<`, `0_0`, `(o)_(o)`): what has no two letters or digits in a row."""
    return tag.replace("_", " ") if re.search(r"[^\W_]{2}", tag) else tag


def same(tag: str) -> str:
    """Equal for all ways to write one tag: upper and lower case, underscores, escapes."""
    return clean(spaced(re.sub(r"\\([\\()])", r"\1", tag))).casefold()


def same_tags(caption: str) -> set[str]:
    """`same` of each tag in a caption."""
    return {same(part) for part in caption.split(",") if part.strip()}


def _threshold(tag: Tag, options: CaptionOptions) -> float:
    own = options.character_threshold if tag.kind == CHARACTER else None
    return options.threshold if own is None else own


def _escaped(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", text)


def _fresh(pieces: list[str], before: str) -> Iterator[str]:
    """Those that say something which is not there yet. A sentence with commas counts as its parts."""
    there = same_tags(before)
    for piece in pieces:
        parts = same_tags(piece)
        if not parts <= there:
            there |= parts
            yield piece
