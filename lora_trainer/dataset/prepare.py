"""A folder's items to training samples: latents and text embeddings, computed once and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from lora_trainer.dataset.buckets import Bucket
from lora_trainer.dataset.cache import Cache, key_of
from lora_trainer.dataset.decode import Sizes, content_hash, cut, made_ahead
from lora_trainer.dataset.images import ImageError
from lora_trainer.dataset.items import Item
from lora_trainer.dataset.rules import Rules, variants
from lora_trainer.dataset.samples import Prepared, Sample, Text, length
from lora_trainer.errors import DataError
from lora_trainer.events import EventSink, Notice, Progress
from lora_trainer.models.latents import Moments, latent_shape, posterior, sampled, to_tensor

# Draws the posterior's noise for (index of the item, shape of its latents): [1, *shape] float32.
LatentNoise = Callable[[int, tuple[int, int, int]], Tensor]
NO_CACHE, NO_RULES = Cache(None), Rules()
# Of one picture; where there are more ways to write its caption, captions are read when they are drawn.
MOST_VARIANTS = 32


@dataclass
class Encoded:
    """What is encoded so far. `between` is called before each image."""

    between: Callable[[], object] = lambda: None
    samples: list[Sample] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    captions: dict[str, Text] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many items are dealt with."""
        return len(self.samples) + len(self.skipped)


@dataclass(frozen=True)
class Encoders:
    """`vae` makes latents of pictures, `read` of a caption what a batch holds of it, under the names of its fields:
    the frozen encoder's embedding, or the token ids for a trained one.

    `vae_key` and `text_key` tell in a cache what they are; a caption is not cached without a key. Captions change by
    `rules`; with `live` they are read when they are drawn.
    """

    vae: AutoencoderKL
    read: Callable[[str], Text]
    vae_key: str = ""
    text_key: str = ""
    cache: Cache = NO_CACHE
    rules: Rules = NO_RULES
    live: bool = False


@dataclass(frozen=True)
class Picture:
    """The posterior of a picture's latents, and its place in the cache; or the picture, still to be encoded."""

    bucket: Bucket
    key: str
    moments: Moments | None = None
    image: Image.Image | None = None


def prepare(
    items: Sequence[Item],
    encoders: Encoders,
    sizes: Sizes,
    *,
    noise: LatentNoise,
    sink: EventSink,
    kept: Encoded | None = None,
) -> Prepared:
    """Encode `items`, with all captions that can be drawn of theirs. Unreadable and too small images are named, skipped
    and counted.

    What `kept.between` raises ends the work, which goes on when `kept` is given again. Raises DataError when no image
    is left.
    """
    kept = Encoded() if kept is None else kept
    rest = items[kept.count :]
    read = partial(_read, sizes=sizes, encoders=encoders)
    with made_ahead(rest, read) as pictures:
        for index, (item, picture) in enumerate(zip(rest, pictures, strict=True), start=kept.count):
            kept.between()
            try:
                bucket, latents = _latents(item, picture(), encoders, partial(noise, index))
            except (ImageError, ValueError) as error:
                kept.skipped.append(str(error))
                sink(Notice(text=f"skipped: {error}", level="warning"))
                continue
            plain, *others = _texts(item.caption, encoders, kept.captions)
            tokens = max(map(length, (plain, *others)))
            kept.samples.append(Sample(item, bucket, latents, plain, tokens))
            sink(Progress(stage="encoding images", done=index + 1, total=len(items)))
    _refuse_nothing(items, kept, sink)
    return Prepared(tuple(kept.samples), tuple(kept.skipped), encoders.rules, None if encoders.live else kept.captions)


def _refuse_nothing(items: Sequence[Item], kept: Encoded, sink: EventSink) -> None:
    if kept.skipped:
        sink(Notice(text=f"{len(kept.skipped)} of {len(items)} images skipped", level="warning"))
    if not kept.samples:
        raise DataError(f"{items[0].path.parent}: none of its {len(items)} images can be used: {kept.skipped[0]}")


def _read(item: Item, sizes: Sizes, encoders: Encoders) -> Picture:
    """In a thread: what the cache has of a picture, else the picture itself. Raises ImageError."""
    key = ""
    if encoders.cache.folder is not None:
        key = key_of("latents", content_hash(item.path), encoders.vae_key, sizes)
        found = encoders.cache.get(key)
        if found is not None and {"mean", "std", "size"} <= set(found):
            bucket = Bucket(*(int(side) for side in found["size"]))
            return Picture(bucket, key, moments=Moments(found["mean"], found["std"]))
    made = cut(item.path, sizes)
    return Picture(made.bucket, key, image=made.image)


def _latents(
    item: Item, picture: Picture, encoders: Encoders, noise: Callable[[tuple[int, int, int]], Tensor]
) -> tuple[Bucket, Tensor]:
    vae, moments = encoders.vae, picture.moments
    if moments is None:
        moments = posterior(vae, to_tensor(picture.image))
        if not all(torch.isfinite(moment).all() for moment in moments):
            raise ImageError(item.path, "the VAE gave numbers that are not finite")
        size = torch.tensor([picture.bucket.width, picture.bucket.height])
        encoders.cache.put(picture.key, {"mean": moments.mean, "std": moments.std, "size": size})
    drawn = noise(latent_shape(vae, picture.bucket.width, picture.bucket.height))
    return picture.bucket, sampled(vae, moments, drawn)[0].cpu()


def _texts(caption: str, encoders: Encoders, known: dict[str, Text]) -> list[Text]:
    """The caption as written, then all else that can be drawn of it, as `known` has them afterwards."""
    plain = encoders.rules.plain(caption)
    if encoders.live:
        return [encoders.read(plain)]
    drawn = variants(encoders.rules, caption, MOST_VARIANTS)
    assert drawn is not None, "too many captions to keep: they are read live"
    texts = [plain, *drawn]
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
