"""No caption rule loses or invents a tag."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from lora_trainer.captioning.options import CaptionOptions
from lora_trainer.captioning.rules import compose, same, same_tags
from lora_trainer.captioning.words import CHARACTER, GENERAL, Tag, Words

names = st.text("abcAB_()<>^.0猫", min_size=1, max_size=8).filter(lambda name: name.strip("_ ") and same(name))
tags = st.builds(Tag, names, st.floats(0, 1), st.sampled_from([GENERAL, CHARACTER]))
written = st.lists(names, max_size=6).map(", ".join)
sentences = st.lists(names, max_size=3).map(", ".join)
options = st.builds(
    CaptionOptions,
    existing=st.sampled_from(["append", "prepend", "replace"]),
    trigger_words=st.sampled_from(["", "sks", "my style"]),
    threshold=st.floats(0, 1),
    character_threshold=st.none() | st.floats(0, 1),
    blacklist=written,
    spaces=st.booleans(),
    escape=st.booleans(),
)


def scored(words: Words, options: CaptionOptions) -> set[str]:
    """What has to be said, worked out tag by tag."""
    found = set()
    for tag in words.tags:
        least = options.threshold
        if tag.kind == CHARACTER and options.character_threshold is not None:
            least = options.character_threshold
        if tag.score >= least and same(tag.name) not in same_tags(options.blacklist):
            found.add(same(tag.name))
    return found


@given(st.builds(Words, sentences, st.lists(tags, max_size=8).map(tuple)), written, options)
def test_what_is_written_is_what_was_there_and_what_was_said(words, before, options):
    caption = compose(words, before, options)
    kept = set() if options.existing == "replace" else same_tags(before)
    wanted = kept | same_tags(words.sentence) | scored(words, options)
    found = same_tags(caption)
    trigger = {options.trigger_words} - {""}
    assert wanted <= found <= wanted | trigger
    if trigger:
        assert re.search(rf"(?<!\w){options.trigger_words}(?!\w)", caption)


@given(st.builds(Words, sentences, st.lists(tags, max_size=8).map(tuple)), written, options)
def test_nothing_is_said_twice_and_a_second_time_changes_nothing(words, before, options):
    caption = compose(words, before, options)
    again = compose(words, caption, options)
    assert again == caption
    new = compose(words, "", CaptionOptions(spaces=options.spaces, threshold=options.threshold))
    alone = [same(part) for part in new.split(",") if part.strip()]
    own = [same(part) for part in words.sentence.split(",") if part.strip()]
    assert len(alone) - len(set(alone)) <= len(own)


@given(st.builds(Words, sentences, st.lists(tags, max_size=8).map(tuple)), written, options)
def test_the_words_that_were_there_stay_as_they_were(words, before, options):
    caption = compose(words, before, options)
    stays = before.strip(" ,")
    if options.existing == "append":
        assert stays in caption
        assert caption.removeprefix(f"{options.trigger_words}, ").startswith(stays)
    elif options.existing == "prepend":
        assert caption.endswith(stays)
