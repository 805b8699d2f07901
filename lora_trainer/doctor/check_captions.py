"""Findings about captions."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from lora_trainer.dataset.items import nameless, with_trigger
from lora_trainer.doctor.findings import Finding, few
from lora_trainer.doctor.subject import Subject

# A caption of nothing but these could stand under any picture.
_GENERIC = frozenset(
    """
    a an the this that it its is are my your some one of in on at to for with and or very really so
    nice beautiful pretty cool good great best awesome amazing lovely perfect cute high quality detailed hd 4k 8k
    photo photograph photography picture pic image img file art artwork drawing illustration painting render shot
    thing things something stuff object subject content scene test sample example untitled caption text todo tbd
    none null nan unknown n na new copy final 照片 图片 图像 写真 画像
    """.split()  # noqa: SIM905
)
_WORD = re.compile(r"[^\W_]+")
# Words that many captions begin with by grammar, not by choice.
_ARTICLES = {"a", "an", "the", "this", "photo", "picture", "image", "there", "some", "two"}
# Captions are tags when most have at least this many parts.
_TAGS = 4
# So many pictures, and such a share of all, under one caption are more than chance: icons have plurals.
_SAME, _SAME_SHARE = 3, 0.05
# What nearly all captions share, the others should have.
_NEARLY_ALL = 0.8
_MANY = 10
# Comparing each rare tag with each frequent one takes its time.
_COMPARED = 300


def missing(subject: Subject) -> Iterator[Finding]:
    complained = {file.with_suffix("") for file, _ in subject.problems}
    for image in subject.contents.images:
        if image in subject.contents.empty and (image not in subject.captions or subject.from_names):
            mend = "Write what is in the picture, in a few concrete words."
            yield Finding("caption-empty", "error", (image,), "its caption has no words", mend)
        # What is wrong with its own text file is said already.
        elif image not in subject.captions and not {image, image.with_suffix("")} & complained:
            reason = "no row and no text file names it, which stops the training"
            mend = "Add a row or a .txt file of the same name for each, or take them out of the folder."
            yield Finding("caption-missing", "error", (image,), reason, mend)


def from_names(subject: Subject) -> Iterator[Finding]:
    if subject.from_names:
        first = next(iter(subject.captions))
        reason = f'no captions were found, so {first.name} is "{subject.captions[first]}"'
        mend = 'Write a metadata.csv with a row for each picture: img01.jpg,"a castle at night".'
        yield Finding("caption-name", "warning", (), reason, mend)


def generic(subject: Subject) -> Iterator[Finding]:
    for image, caption in subject.captions.items():
        words = [word.lower() for word in _WORD.findall(caption)]
        if all(word in _GENERIC or word.isdecimal() for word in words) or nameless(caption):
            mend = "Say concretely what is in the picture: subject, what it does, where, in which light."
            yield Finding("caption-generic", "warning", (image,), f'"{caption}" could be any picture', mend)


def identical(subject: Subject) -> Iterator[Finding]:
    groups: dict[str, list[Path]] = defaultdict(list)
    for image, caption in subject.captions.items():
        groups[caption.casefold()].append(image)
    for images in groups.values():
        share = len(images) / len(subject.captions)
        if len(images) >= _SAME and share >= _SAME_SHARE:
            reason = f'{len(images)} pictures ({share:.0%}) have the caption "{subject.captions[images[0]]}"'
            mend = "Say what differs from picture to picture: the words then learn only what stays the same."
            yield Finding("caption-identical", "warning", tuple(images), reason, mend)


def triggers(subject: Subject) -> Iterator[Finding]:
    """Words that call the LoRA: those that were named, else what nearly all captions begin with."""
    layout, words = subject.contents.layout, subject.wanted.trigger_words.strip(" ,")
    # A concept with words of its own gets those.
    captions = {file: text for file, text in subject.captions.items() if layout.concept(file).trigger_words is None}
    if len(captions) < 2:
        return
    if words:
        lacking = [image for image, caption in captions.items() if with_trigger(caption, words) != caption]
        if lacking and len(lacking) < len(captions):
            reason = f'{len(lacking)} of {len(captions)} captions lack "{words}", which training puts in front of them'
            mend = "Nothing to do, unless they have it in another spelling."
            yield Finding("trigger", "advice", tuple(lacking), reason, mend)
        return
    shared, count = _opening(captions)
    if count < _NEARLY_ALL * len(captions):
        mend = "If the LoRA should be called by a word, name it as trigger_words."
        yield Finding("trigger", "advice", (), "no word begins nearly all captions", mend)
    elif count < len(captions):
        lacking = [image for image, caption in captions.items() if shared not in caption.lower()]
        reason = f'{count} of {len(captions)} captions have "{shared}" and these lack it'
        if lacking:
            mend = f'Add it, or name it: trigger_words="{shared}" puts it in front of each that lacks it.'
            yield Finding("trigger", "warning", tuple(lacking), reason, mend)


def _opening(captions: Mapping[Path, str]) -> tuple[str, int]:
    """The first tag or word of most captions, and how many have it anywhere."""
    openings: Counter[str] = Counter()
    for caption in captions.values():
        words = [word for word in caption.lower().split() if word not in _ARTICLES]
        openings[caption.lower().split(",")[0].strip()] += "," in caption
        openings[words[0].strip(",.;:") if words else ""] += 1
    shared, count = max(openings.items(), key=lambda entry: (entry[1], len(entry[0])))
    return shared, sum(shared in caption.lower() for caption in captions.values()) if shared and count > 1 else 0


def rare_tags(subject: Subject) -> Iterator[Finding]:
    tagged = {image: _tags(caption) for image, caption in subject.captions.items()}
    if len(tagged) < _MANY or sum(len(tags) >= _TAGS for tags in tagged.values()) < len(tagged) / 2:
        return
    counts = Counter(tag for tags in tagged.values() for tag in set(tags))
    once = [tag for tag, count in counts.items() if count == 1]
    if not once:
        return
    known = [tag for tag, count in counts.most_common(_COMPARED) if count > 1]
    shown = [_with_neighbour(tag, known) for tag in once[:_COMPARED]]
    # Likely misspellings first.
    shown.sort(key=lambda text: not text.endswith("?)"))
    images = tuple(image for image, tags in tagged.items() if set(tags) & set(once))
    reason = f"{len(once)} of {len(counts)} tags are in one caption only: {few(shown, 8)}"
    mend = "Mend misspellings; a tag is learned from about three pictures on."
    yield Finding("tag-once", "advice", images, reason, mend)


def _tags(caption: str) -> list[str]:
    return [tag for part in caption.lower().split(",") if (tag := part.strip())]


def _with_neighbour(tag: str, known: Sequence[str]) -> str:
    near = get_close_matches(tag, known, n=1, cutoff=0.85)
    return f"{tag} ({near[0]}?)" if near else tag


def written(subject: Subject) -> Iterator[Finding]:
    """What can be said about captions that someone wrote."""
    if not subject.from_names:
        for check in (generic, identical, triggers, rare_tags):
            yield from check(subject)


CHECKS = (missing, from_names, written)
