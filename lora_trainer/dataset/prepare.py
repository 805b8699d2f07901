"""A folder's items to training samples: latents and text embeddings, computed once and kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from lora_trainer.dataset.buckets import Bucket, fit, place
from lora_trainer.dataset.images import ImageError, load_image
from lora_trainer.dataset.items import Item
from lora_trainer.errors import DataError
from lora_trainer.events import EventSink, Notice, Progress
from lora_trainer.models.latents import encode, latent_shape, to_tensor

# Draws the posterior's noise for (index of the item, shape of its latents): [1, *shape] float32.
LatentNoise = Callable[[int, tuple[int, int, int]], Tensor]


@dataclass(frozen=True)
class Sample:
    """One image, ready: latents [4, h, w] float32 on the CPU, and the caption as `Encoders.read` gives it."""

    item: Item
    bucket: Bucket
    latents: Tensor
    text: Mapping[str, Tensor]

    @property
    def group(self) -> Hashable:
        """Samples of one group have the same shapes."""
        tokens = self.text["ids"].numel() if "ids" in self.text else self.text["context"].shape[0]
        return (self.bucket.width, self.bucket.height, tokens)


@dataclass(frozen=True)
class Prepared:
    """The samples in the order of the items, and what was left out."""

    samples: tuple[Sample, ...]
    skipped: tuple[str, ...]

    @property
    def groups(self) -> list[Hashable]:
        return [sample.group for sample in self.samples]

    @property
    def buckets(self) -> dict[tuple[int, int], int]:
        """Images by (width, height)."""
        return dict(Counter((s.bucket.width, s.bucket.height) for s in self.samples))


@dataclass
class Encoded:
    """What is encoded so far. `between` is called before each image."""

    between: Callable[[], object] = lambda: None
    samples: list[Sample] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    captions: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many items are dealt with."""
        return len(self.samples) + len(self.skipped)


@dataclass(frozen=True)
class Sizes:
    """How pictures are cut: the area of a bucket is at most `resolution` squared."""

    resolution: int
    allow_upscaling: bool = False


@dataclass(frozen=True)
class Encoders:
    """`vae` makes latents of pictures, `read` of a caption what a batch holds of it, under the names of its fields:
    the frozen encoder's embedding, or the token ids for a trained one."""

    vae: AutoencoderKL
    read: Callable[[str], Mapping[str, Tensor]]


def prepare(
    items: Sequence[Item],
    encoders: Encoders,
    sizes: Sizes,
    *,
    noise: LatentNoise,
    sink: EventSink,
    kept: Encoded | None = None,
) -> Prepared:
    """Encode `items`. Unreadable and too small images are named, skipped and counted.

    What `kept.between` raises ends the work, which goes on when `kept` is given again. Raises DataError when no image
    is left.
    """
    kept = Encoded() if kept is None else kept
    for index, item in enumerate(items[kept.count :], start=kept.count):
        kept.between()
        try:
            bucket, latents = _latents(item, index, encoders.vae, sizes, noise)
        except (ImageError, ValueError) as error:
            kept.skipped.append(str(error))
            sink(Notice(text=f"skipped: {error}", level="warning"))
        else:
            if item.caption not in kept.captions:
                kept.captions[item.caption] = encoders.read(item.caption)
            kept.samples.append(Sample(item, bucket, latents, kept.captions[item.caption]))
            sink(Progress(stage="encoding images", done=index + 1, total=len(items)))
    samples, skipped = kept.samples, kept.skipped
    if skipped:
        sink(Notice(text=f"{len(skipped)} of {len(items)} images skipped", level="warning"))
    if not samples:
        raise DataError(f"{items[0].path.parent}: none of its {len(items)} images can be used: {skipped[0]}")
    return Prepared(tuple(samples), tuple(skipped))


def _latents(item: Item, index: int, vae: AutoencoderKL, sizes: Sizes, noise: LatentNoise) -> tuple[Bucket, Tensor]:
    image = load_image(item.path)
    try:
        placement = place(image.size, sizes.resolution, allow_upscaling=sizes.allow_upscaling)
    except ValueError as error:
        raise ImageError(item.path, str(error)) from error
    shape = latent_shape(vae, placement.bucket.width, placement.bucket.height)
    latents = encode(vae, to_tensor(fit(image, placement)), noise(index, shape))
    if not torch.isfinite(latents).all():
        raise ImageError(item.path, "the VAE gave numbers that are not finite")
    return placement.bucket, latents[0].cpu()
