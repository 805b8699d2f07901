"""A caption as tags between commas. A caption's lines are captions of their own, and each is edited alike.

Every edit keeps the words of the tags it does not name, in their order; what ends a tag is `clean` and a comma.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from lora_trainer.dataset.captions import clean

# Chinese and Japanese write these commas too.
_COMMAS = str.maketrans("，、", ",,")


def tags_of(caption: str) -> list[str]:
    """The tags of all lines, as written."""
    return [tag for line in caption.split("\n") for tag in split(line)]


def split(text: str) -> list[str]:
    return [tag for piece in text.split(",") if (tag := clean(piece))]


def typed(text: str) -> list[str]:
    """The tags that someone typed into a field for them, each once."""
    return list({same(tag): tag for tag in reversed(split(text.translate(_COMMAS)))}.values())[::-1]


def same(tag: str) -> str:
    """Equal for the ways to write one tag in upper and lower case: text encoders do not tell them apart."""
    return clean(tag).casefold()


def with_tags(caption: str, new: Sequence[str], *, front: bool = False) -> str:
    """`caption` with each of the tags `new` that it lacks, at its end or at its front."""

    def edit(line: str) -> str:
        tags = split(line)
        there = set(map(same, tags))
        fresh = [tag for tag in new if same(tag) not in there]
        if not fresh:
            return line
        return ", ".join([*fresh, *tags] if front else [*tags, *fresh])

    return _each_line(caption, edit)


def without_tags(caption: str, unwanted: Iterable[str]) -> str:
    """`caption` without these tags."""
    gone = set(map(same, unwanted))

    def edit(line: str) -> str:
        tags = split(line)
        kept = [tag for tag in tags if same(tag) not in gone]
        return line if len(kept) == len(tags) else ", ".join(kept)

    return _each_line(caption, edit)


def with_tag_replaced(caption: str, old: str, new: Sequence[str]) -> str:
    """`caption` with the tags `new` in the place of the tag `old`; those that it has elsewhere stay where they are."""
    wanted = same(old)

    def edit(line: str) -> str:
        tags = split(line)
        if wanted not in map(same, tags):
            return line
        there = {same(tag) for tag in tags if same(tag) != wanted}
        fresh = [tag for tag in new if same(tag) not in there]
        at = [same(tag) for tag in tags].index(wanted)
        kept = [[tag] if same(tag) != wanted else fresh if place == at else [] for place, tag in enumerate(tags)]
        return ", ".join(tag for some in kept for tag in some)

    return _each_line(caption, edit)


def with_text_replaced(caption: str, old: str, new: str) -> str:
    """`caption` with `new` for each `old`, letter by letter as written."""
    return _each_line(caption, lambda line: clean(line.replace(old, new)) if old in line else line)


def _each_line(caption: str, edit: Callable[[str], str]) -> str:
    """A line that loses its last word is gone."""
    lines = caption.split("\n")
    edited = [edit(line) for line in lines]
    kept = [after for before, after in zip(lines, edited, strict=True) if after or not before]
    return "\n".join(kept)
