"""What a caption becomes when its picture is seen. Every choice is made by whoever asks, so that equal choices give
equal captions, and all that can come out can be listed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

# As in kohya's trainer: tags before the first one and after the second one stay where they are.
SEPARATOR = "|||"
_OPTIONS = re.compile(r"\{([^{}]+)\}")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_ESCAPED = (("{{", "\ue000"), ("}}", "\ue001"))


class Choices(Protocol):
    """What is left to chance."""

    def one_of(self, count: int) -> int:
        """A number from 0 to count - 1, each as likely."""
        ...

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        ...


class First:
    """The choices that leave everything as it is written: the first of several, nothing left out."""

    def one_of(self, count: int) -> int:
        return 0

    def chance(self, probability: float) -> bool:
        return False


@dataclass(frozen=True)
class Rules:
    """How captions change from visit to visit. A caption's lines are captions of which one is chosen.

    `trigger_words` are the run's and its concepts'. A tag ends at a comma. With `prompts` captions are the WebUI's
    prompts: a comma inside brackets ends no tag, and nothing moves across a BREAK. With `preserved` each drawn caption
    has a fellow that `without_trigger` gives.
    """

    prefix: str = ""
    suffix: str = ""
    trigger_words: tuple[str, ...] = ()
    shuffle: bool = False
    keep_tokens: int = 0
    tag_dropout: float = 0.0
    caption_dropout: float = 0.0
    wildcards: bool = False
    prompts: bool = False
    preserved: bool = False
    preservation_prompt: str = ""

    def drawn(self, caption: str, choices: Choices) -> str:
        """The caption of one visit."""
        if choices.chance(self.caption_dropout):
            return ""
        lines = caption.split("\n")
        text = lines[choices.one_of(len(lines))]
        filled = self._filled(text, lambda options: options[choices.one_of(len(options))])
        parts = _BREAK.split(filled) if self.prompts else [filled]
        mixed = [self._mixed(part, choices, first=at == 0, tidy=filled != text) for at, part in enumerate(parts)]
        return self._framed(" BREAK ".join(mixed) if len(parts) > 1 else mixed[0])

    def plain(self, caption: str) -> str:
        """As it is written: its first line, the first of each choice, in order and whole."""
        return self.drawn(caption, First())

    def without_trigger(self, drawn: str) -> str:
        """`drawn` with `preservation_prompt` in place of its trigger words; left out where that is empty. Without any
        trigger words in the run the prompt alone."""
        words = [text for entry in self.trigger_words if (text := entry.strip(" ,"))]
        if not words:
            return self.preservation_prompt
        # The longer first: one may be in another. Tags that were mixed may be apart: the first stands for all.
        for text in sorted(words, key=len, reverse=True):
            whole = _phrase(text)
            if whole.search(drawn):
                drawn = whole.sub(lambda found: self.preservation_prompt, drawn)
            elif len(tags := self._tags(text)) > 1 and all(_phrase(tag).search(drawn) for tag in tags):
                drawn = _phrase(tags[0]).sub(lambda found: self.preservation_prompt, drawn)
                for tag in tags[1:]:
                    drawn = _phrase(tag).sub("", drawn)
        return _tidy(drawn)

    def vocabulary(self, caption: str) -> str:
        """All that any drawn caption can hold, as one."""
        options = self._filled(caption, ", ".join)
        return self._framed(options.replace("\n", ", ").replace(SEPARATOR, ", "))

    def _framed(self, text: str) -> str:
        return " ".join(part for part in (self.prefix, text, self.suffix) if part)

    def _filled(self, text: str, choose: Callable[[list[str]], str]) -> str:
        """With one of each {a|b}; {{ and }} are braces."""
        if not self.wildcards:
            return text
        for escaped, mark in _ESCAPED:
            text = text.replace(escaped, mark)
        text = _OPTIONS.sub(lambda found: choose(found[1].split("|")), text)
        for escaped, mark in _ESCAPED:
            text = text.replace(mark, escaped[0])
        return text

    def _mixed(self, text: str, choices: Choices, *, first: bool, tidy: bool) -> str:
        """The tags in their new order, without those that are dropped; `first`: the caption begins here."""
        head, *rest = text.split(SEPARATOR, 2)
        if not (rest or tidy or self.shuffle or self.tag_dropout):
            return text
        if rest:
            kept, free, last = self._tags(head), self._tags(rest[0]), self._tags("".join(rest[1:]))
        else:
            tags = self._tags(head)
            count = self._kept(tags) if first else 0
            kept, free, last = tags[:count], tags[count:], []
        if self.shuffle:
            left = list(free)
            free = [left.pop(choices.one_of(len(left))) for _ in free]
        free = [tag for tag in free if not choices.chance(self.tag_dropout)]
        return ", ".join([*kept, *free, *last])

    def _kept(self, tags: Sequence[str]) -> int:
        """How many tags stay first: those asked for, and trigger words that the caption begins with."""
        folded = [tag.casefold() for tag in tags]
        triggers = [[tag.casefold() for tag in self._tags(words)] for words in self.trigger_words]
        return max(self.keep_tokens, *(len(words) for words in triggers if folded[: len(words)] == words), 0)

    def _tags(self, text: str) -> list[str]:
        pieces = _outside_brackets(text) if self.prompts else text.split(",")
        return [piece.strip() for piece in pieces if piece.strip()]


def _phrase(words: str) -> re.Pattern[str]:
    """`words` as they are put in front of captions, whatever their case."""
    return re.compile(rf"(?<!\w){re.escape(words)}(?!\w)", re.IGNORECASE)


def _tidy(text: str) -> str:
    """Without the commas and spaces around what was taken out."""
    return re.sub(r"\s*,(?:\s*,)+", ",", re.sub(r"[ \t]{2,}", " ", text)).strip(" ,")


def variants(rules: Rules, caption: str, most: int) -> tuple[str, ...] | None:
    """All that can be drawn of `caption`, what is written first; None when there are more than `most` ways."""
    found: dict[str, None] = {}
    paths: list[tuple[int, ...]] = [()]
    walked = 0
    while paths:
        walk = _Walk(paths.pop(0))
        found[rules.drawn(caption, walk)] = None
        walked += 1
        free = range(len(walk.given), len(walk.counts))
        if walked + len(paths) + sum(walk.counts[at] - 1 for at in free) > most:
            return None
        paths += [(*walk.taken[:at], other) for at in free for other in range(1, walk.counts[at])]
    return tuple(found)


class _Walk:
    """The choices `given`, then the first of each; it remembers between how many it chose."""

    def __init__(self, given: tuple[int, ...]) -> None:
        self.given = given
        self.taken: list[int] = []
        self.counts: list[int] = []

    def one_of(self, count: int) -> int:
        at = len(self.taken)
        self.taken.append(self.given[at] if at < len(self.given) else 0)
        self.counts.append(count)
        return self.taken[at]

    def chance(self, probability: float) -> bool:
        if probability in (0, 1):
            return probability == 1
        return self.one_of(2) == 1


def _outside_brackets(text: str) -> list[str]:
    """`text` at the commas that no round or square bracket holds; a backslash takes a bracket's meaning away."""
    pieces, depth, start, at = [], 0, 0, 0
    while at < len(text):
        character = text[at]
        if character == "\\":
            at += 1
        elif character in "([":
            depth += 1
        elif character in ")]":
            depth = max(0, depth - 1)
        elif character == "," and depth == 0:
            pieces.append(text[start:at])
            start = at + 1
        at += 1
    return [*pieces, text[start:]]
