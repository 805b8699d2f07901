"""A folder's items to training samples: latents and text embeddings, computed once and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from lora_trainer.dataset.cache import Cache, key_of
from lora_trainer.dataset.crops import Sizes
from lora_trainer.dataset.decode import MOST_TOGETHER, made_ahead
from lora_trainer.dataset.items import Item
from lora_trainer.dataset.masks import weights
from lora_trainer.dataset.pictures import Opened, Picture, encoded, on_gpu, opened
from lora_trainer.dataset.rules import Rules, variants
from lora_trainer.dataset.samples import Prepared, Sample, Text, length
from lora_trainer.errors import DataError
from lora_trainer.events import EventSink, Notice, Progress
from lora_trainer.models.latents import Moments, latent_shape, sampled

# Draws the posterior's noise for (index of the item, number of its view, shape of its latents): [1, *shape] float32.
LatentNoise = Callable[[int, int, tuple[int, int, int]], Tensor]
NO_CACHE, NO_RULES = Cache(None), Rules()
# Of one picture; where there are more ways to write its caption, captions are read when they are drawn.
MOST_VARIANTS = 32


@dataclass
class Encoded:
    """What is encoded so far: of the first `count` items. `between` is called before each image or few images."""

    between: Callable[[], object] = lambda: None
    samples: list[Sample] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    captions: dict[str, Text] = field(default_factory=dict)
    count: int = 0


@dataclass(frozen=True)
class Encoders:
    """`vae` makes latents of pictures, `read` of a caption what a batch holds of it, under the names of its fields:
    the frozen encoder's embedding, or the token ids for a trained one.

    `vae_key` and `text_key` tell in a cache what they are; a caption is not cached without a key. Captions change by
    `rules`; with `live` they are read when they are drawn. In a run with masks `unmasked` is how much counts what they
    leave out. `holed`: an inpainting model is shown the pictures with holes.
    """

    vae: AutoencoderKL
    read: Callable[[str], Text]
    vae_key: str = ""
    text_key: str = ""
    cache: Cache = NO_CACHE
    rules: Rules = NO_RULES
    live: bool = False
    unmasked: float | None = None
    holed: bool = False

    @property
    def factor(self) -> int:
        """How many times smaller than pictures latents are."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)


def prepare(
    items: Sequence[Item],
    encoders: Encoders,
    sizes: Sequence[Sizes],
    *,
    noise: LatentNoise,
    sink: EventSink,
    kept: Encoded | None = None,
) -> Prepared:
    """Encode `items` at all `sizes`, with all captions that can be drawn of theirs. A size that would cut a picture to
    the bucket of an earlier one is left out for it. Unreadable and too small images are named, skipped and counted.

    What `kept.between` raises ends the work, which goes on when `kept` is given again. Raises DataError when no image
    is left.
    """
    kept = Encoded() if kept is None else kept
    rest = items[kept.count :]
    where = {"cache": encoders.cache, "vae_key": encoders.vae_key, "factor": encoders.factor, "holed": encoders.holed}
    read = partial(opened, sizes=sizes, **where)
    together = MOST_TOGETHER if on_gpu(encoders.vae) else 1
    with made_ahead(rest, read) as made:
        while window := [ready() for ready in islice(made, together)]:
            kept.between()
            for one in encoded(window, encoders.vae, encoders.cache):
                if one.why is None:
                    kept.samples += _samples(one, encoders, kept, partial(noise, kept.count))
                    sink(Progress(stage="encoding images", done=kept.count + 1, total=len(items)))
                else:
                    kept.skipped.append(one.why)
                    sink(Notice(text=f"skipped: {one.why}", level="warning"))
                kept.count += 1
    _refuse_nothing(items, kept, sink)
    return Prepared(tuple(kept.samples), tuple(kept.skipped), encoders.rules, None if encoders.live else kept.captions)


def _refuse_nothing(items: Sequence[Item], kept: Encoded, sink: EventSink) -> None:
    if kept.skipped:
        sink(Notice(text=f"{len(kept.skipped)} of {len(items)} images skipped", level="warning"))
    if all(sample.item.prior for sample in kept.samples):
        raise DataError(f"{items[0].path.parent}: none of its {len(items)} images can be used: {kept.skipped[0]}")


def _samples(
    one: Opened, encoders: Encoders, kept: Encoded, noise: Callable[[int, tuple[int, int, int]], Tensor]
) -> list[Sample]:
    """A sample a size."""
    plain, *others = _texts(one.item.caption, encoders, kept.captions)
    tokens = max(map(length, (plain, *others)))
    samples: list[Sample] = []
    for picture in one.pictures:
        before = sum(len(sample.latents) for sample in samples)
        shape = latent_shape(encoders.vae, picture.bucket.width, picture.bucket.height)
        views = len(picture.sizes)
        drawn = torch.cat([noise(before + number, shape) for number in range(views)])
        latents = sampled(encoders.vae, Moments(*(x[:views] for x in picture.moments)), drawn).cpu()
        mask = None if encoders.unmasked is None else _mask(picture, latents, encoders.unmasked)
        shown = _shown(picture, encoders) if encoders.holed else None
        samples.append(Sample(one.item, picture.bucket, latents, picture.sizes, plain, tokens, mask, shown))
    return samples


def _shown(picture: Picture, encoders: Encoders) -> Tensor:
    """[views, HOLES, 5, h, w]: each mask, and the likeliest latents of the view with it. Masks shrink as the WebUI and
    CompVis' code shrink them, to the nearest pixel."""
    views, factor = len(picture.sizes), encoders.factor
    latents = picture.moments.mean[views:].cpu() * encoders.vae.config.scaling_factor
    masks = picture.holes[:, None, ::factor, ::factor].to(latents.dtype)
    return torch.cat([masks, latents], dim=1).unflatten(0, (views, -1))


def _mask(picture: Picture, latents: Tensor, unmasked: float) -> Tensor:
    """[views, h, w] beside the views' latents [views, 4, h, w]."""
    return torch.ones_like(latents[:, 0]) if picture.mask is None else weights(picture.mask, unmasked)


def _texts(caption: str, encoders: Encoders, known: dict[str, Text]) -> list[Text]:
    """The caption as written, then all else that can be drawn of it, as `known` has them afterwards."""
    plain = encoders.rules.plain(caption)
    if encoders.live:
        return [encoders.read(plain)]
    drawn = variants(encoders.rules, caption, MOST_VARIANTS)
    assert drawn is not None, "too many captions to keep: they are read live"
    texts = [plain, *drawn]
    if encoders.rules.preserved:
        texts += [encoders.rules.without_trigger(text) for text in texts]
    # The empty caption fills short ones up.
    for text in texts if set(texts) == {plain} else [*texts, ""]:
        if text not in known:
            known[text] = _caption(text, encoders)
    return [known[text] for text in texts]


def _caption(caption: str, encoders: Encoders) -> Text:
    cache = encoders.cache
    if cache.folder is None or not encoders.text_key:
        return encoders.read(caption)
    key = key_of("caption", caption, encoders.text_key)
    found = cache.get(key)
    if found is None:
        found = encoders.read(caption)
        cache.put(key, found)
    return found
