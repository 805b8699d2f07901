"""What preparing a folder leaves: pictures as latents and captions as tensors, and what one visit of them reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_trainer.dataset.buckets import Bucket
from lora_trainer.dataset.items import Item
from lora_trainer.dataset.rules import Choices, Rules

Text = Mapping[str, Tensor]
"""A caption under the names of a batch's fields: `context` [77 n, width], or `ids` [n, 77] and perhaps `emphasis`."""


@dataclass(frozen=True)
class Sample:
    """One image at one size, ready, on the CPU: the latents of its views, [views, 4, h, w] float32, the plainest first;
    what the UNet is told of each, [views, 6] (`crops.View.sizes`) or as its family has it; and its caption as written.
    `tokens`: what its captions are filled up to. `mask`: how much each part of the latents counts, [views, h, w]
    float32, in a run with masks. `shown`: what an inpainting model is shown beside the noisy latents, [views, holes, 5,
    h, w] float32. `original`: the latents of the picture before the change, as `latents`. `directions`: of a slider's
    picture the prompts `positive` and `negative`, each as long as `text`."""

    item: Item
    bucket: Bucket
    latents: Tensor
    sizes: Tensor
    text: Text
    tokens: int
    mask: Tensor | None = None
    shown: Tensor | None = None
    original: Tensor | None = None
    directions: Mapping[str, Text] = field(default_factory=dict)

    def view(self, choices: Choices) -> dict[str, Tensor]:
        """`latents` [4, h, w] and `sizes` of one visit; with masks, `mask` [1, h, w]; `shown` [5, h, w]; and of a
        pair `original` [4, h, w]."""
        at = choices.one_of(len(self.latents))
        seen = {"latents": self.latents[at], "sizes": self.sizes[at]}
        if self.mask is not None:
            seen["mask"] = self.mask[at : at + 1]
        if self.shown is not None:
            seen["shown"] = self.shown[at, choices.one_of(self.shown.shape[1])]
        if self.original is not None:
            seen["original"] = self.original[at]
        return seen

    @property
    def group(self) -> Hashable:
        """Samples of one group have the same shapes."""
        return (self.bucket.width, self.bucket.height, self.tokens)


@dataclass(frozen=True)
class Captions:
    """Reads the caption of a visit."""

    rules: Rules
    read: Callable[[str], Text]

    def drawn(self, sample: Sample, choices: Choices) -> tuple[Text, ...]:
        """The caption; with output preservation, also the one without trigger words."""
        words = self.rules.drawn(sample.item.caption, choices)
        both = (words, self.rules.without_trigger(words)) if self.rules.preserved else (words,)
        return tuple(map(self.read, both))

    def alike(self, texts: Sequence[Text], tokens: int) -> list[Text]:
        """All of one length: `tokens`, or that of the longest. Chunks of the empty caption fill the others up, as the
        WebUI does with prompts of unequal length."""
        tokens = max(tokens, *map(length, texts))
        return [text if length(text) == tokens else self._filled_up(text, tokens) for text in texts]

    def _filled_up(self, text: Text, tokens: int) -> Text:
        empty = self.read("")
        times = (tokens - length(text)) // length(empty)
        longer = {name: torch.cat([text[name], *[part] * times]) for name, part in empty.items() if name in _BY_CHUNK}
        return {**text, **longer}


@dataclass(frozen=True)
class Prepared:
    """The samples in the order of the items, regularisation pictures among them, and what was left out.

    `texts` has every caption that can be drawn of them by `rules`, with and without trigger words; None where those are
    too many, and captions are read when they are drawn.
    """

    samples: tuple[Sample, ...]
    skipped: tuple[str, ...]
    rules: Rules = field(default_factory=Rules)
    texts: Mapping[str, Text] | None = None

    def captions(self, tokens: Callable[[str], Text]) -> Captions:
        """`tokens` reads captions that are not there yet."""
        return Captions(self.rules, tokens if self.texts is None else self.texts.__getitem__)

    @property
    def trained(self) -> tuple[Sample, ...]:
        """All but regularisation pictures."""
        return tuple(sample for sample in self.samples if not sample.item.prior)

    @property
    def images(self) -> int:
        """Files to learn, however many sizes they are seen at."""
        return len({sample.item.path for sample in self.trained})

    @property
    def epoch(self) -> tuple[Sample, ...]:
        """What an epoch sees: each sample `repeats` times."""
        return tuple(sample for sample in self.samples for _ in range(sample.item.repeats))

    @property
    def buckets(self) -> dict[tuple[int, int], int]:
        """Images to learn by (width, height), each as often as an epoch sees it."""
        sizes: Counter[tuple[int, int]] = Counter()
        for sample in self.trained:
            sizes[sample.bucket.width, sample.bucket.height] += sample.item.repeats
        return dict(sizes)


_BY_CHUNK = ("context", "ids", "emphasis")


def length(text: Text) -> int:
    """In tokens."""
    return text["ids"].numel() if "ids" in text else text["context"].shape[0]
