"""Findings about the folder as a whole: how many pictures there are, of how many concepts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from lora_trainer.doctor.findings import Finding
from lora_trainer.doctor.subject import Subject

# The guide asks for 50 to 200 pictures; 10 to 20 do for one face or thing.
FEW, GOOD, LARGE = 10, 50, 200
# Each picture is seen equally often, so a concept of three times the pictures is learned three times as much.
UNEQUAL = 3.0
# Fewer pictures than these are no concept of their own.
_CONCEPT = 2
_CONCEPTS = 12


def count(subject: Subject) -> Iterator[Finding]:
    if len(subject.pictures) < len(subject.contents.images):
        return
    usable = len(
        {measures.pixels for file, measures in subject.measured() if not isinstance(subject.placed[file], str)}
    )
    if not usable:
        return
    found = f"{usable} different picture{'s' * (usable != 1)} can be used"
    if usable < FEW:
        mend = "Add pictures: 50 to 200 for a style, at least 10 to 20 for one face or thing."
        yield Finding("count", "warning", (), f"{found}, which it learns by heart", mend)
    elif usable < GOOD:
        mend = "Enough for one face or thing; for a style add some, up to 50 to 200."
        yield Finding("count", "advice", (), found, mend)
    elif usable > LARGE:
        mend = "Keep the best 200 if there are weak ones among them, or train fewer epochs."
        yield Finding("count", "advice", (), f"{found}; 50 to 200 good ones are enough", mend)


def imbalance(subject: Subject) -> Iterator[Finding]:
    """Concepts are folders; without them, what the captions begin with when that is one of a few things. Repeats
    count."""
    by, sizes, repeated = _concepts(subject)
    if len(sizes) < 2 or max(sizes.values()) < UNEQUAL * min(sizes.values()):
        return
    listed = ", ".join(f"{name} {size}" for name, size in sizes.most_common(_CONCEPTS))
    mend = "Add pictures to the small ones, or repeat them; or take some out of the large ones."
    what = "visits an epoch" if repeated else "pictures"
    yield Finding("imbalance", "warning", (), f"{what} by {by}: {listed}", mend)


def _concepts(subject: Subject) -> tuple[str, Counter[str], bool]:
    """By what they are told apart, how large they are, and whether pictures of some are repeated."""
    images, layout = subject.contents.images, subject.contents.layout
    folders: Counter[str] = Counter()
    for image in images:
        home = layout.home(image) or image.parent
        name = "(the folder itself)" if home == subject.folder else home.name
        folders[name] += layout.concept(image).repeats
    if len(folders) > 1:
        return "folder", folders, sum(folders.values()) > len(images)
    openings = Counter(caption.lower().split(",")[0].strip() for caption in subject.captions.values() if "," in caption)
    few = len(openings) <= _CONCEPTS and all(size >= _CONCEPT for size in openings.values())
    return "first tag", openings if few and sum(openings.values()) == len(subject.captions) else Counter(), False


CHECKS = (count, imbalance)
