"""Pictures from their files, or from the cache, to the posteriors of their latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from lora_trainer.dataset.buckets import Bucket
from lora_trainer.dataset.cache import Cache, key_of
from lora_trainer.dataset.crops import Sizes
from lora_trainer.dataset.decode import Cut, content_hash, cut
from lora_trainer.dataset.holes import HOLES, holes
from lora_trainer.dataset.images import ImageError, load_image
from lora_trainer.dataset.items import Item
from lora_trainer.dataset.masks import mask_tensor
from lora_trainer.models.latents import Moments, joined, posterior, scaled, to_bytes

# Encoded at once on a GPU: four pictures of 512 px, or one of 1024 px, take about 2 GiB.
MOST_PIXELS = 4 * 512 * 512


@dataclass(frozen=True)
class Picture:
    """A picture at one size: the posteriors of its views' latents, [views, 4, h, w], or the views' pixels, [1, 3, H, W]
    uint8 each, still to be encoded; what SDXL is told of each, [views, 6] int64; its place in the cache; and what they
    show of its mask, [views, h, w] uint8, where it has one. For an inpainting model its `holes` (`holes.holes`), and
    behind the views' posteriors those of the views with them."""

    bucket: Bucket
    key: str
    sizes: Tensor
    moments: Moments | None = None
    pixels: tuple[Tensor, ...] = ()
    mask: Tensor | None = None
    holes: Tensor | None = None


@dataclass(frozen=True)
class Opened:
    """An item's picture at each of its sizes; or why it cannot be used."""

    item: Item
    pictures: tuple[Picture, ...] = ()
    why: str | None = None


def opened(
    item: Item, sizes: Sequence[Sizes], cache: Cache, vae_key: str, *, factor: int, holed: bool = False
) -> Opened:
    """What the cache has of a picture and its mask, else they themselves, once a bucket; latents are `factor` times
    smaller; `holed`: with holes too. It may run in a thread."""
    try:
        pictures = _read(item, sizes, cache, (vae_key, HOLES, item.path.name) if holed else vae_key, factor)
        return Opened(item, tuple(_holed(picture, item.path.name) for picture in pictures) if holed else pictures)
    except (ImageError, ValueError) as error:
        return Opened(item, why=str(error))


def encoded(batch: Sequence[Opened], vae: AutoencoderKL, cache: Cache) -> list[Opened]:
    """With the posteriors of all of `batch`, in its order. On a GPU pictures of one bucket go through the VAE together;
    on a CPU that would save nothing, and another batch would change the last bits."""
    buckets: dict[Bucket, list[Picture]] = {}
    for picture in (picture for one in batch for picture in one.pictures if picture.moments is None):
        buckets.setdefault(picture.bucket, []).append(picture)
    found: dict[int, Picture] = {}
    for pictures in buckets.values():
        found |= dict(zip(map(id, pictures), _together(pictures, vae), strict=True))
    return [_finished(one, tuple(found.get(id(picture), picture) for picture in one.pictures), cache) for one in batch]


def on_gpu(vae: AutoencoderKL) -> bool:
    return next(vae.parameters()).is_cuda


def _holed(picture: Picture, name: str) -> Picture:
    return replace(picture, holes=holes(name, len(picture.sizes), (picture.bucket.width, picture.bucket.height)))


def _read(item: Item, sizes: Sequence[Sizes], cache: Cache, vae_key: object, factor: int) -> tuple[Picture, ...]:
    content, mask = (content_hash(path) if cache.folder and path else None for path in (item.path, item.mask))
    keys = [key_of("latents", content, vae_key, size) for size in sizes]
    found = [_cached(cache, key) for key in keys]
    # Apart from the latents, which are the same without a mask.
    mask_keys = [key_of("mask", content, mask, factor, size) for size in sizes]
    masks = [cache.get(key) if item.mask else {} for key in mask_keys]
    image = load_image(item.path) if None in (*found, *masks) else None
    pictures: dict[Bucket, Picture] = {}
    for number, size in enumerate(sizes):
        picture, seen = found[number], masks[number]
        made = cut(item.path, image, size) if picture is None or seen is None else None
        if picture is None:
            picture = _picture(made, keys[number])
        if seen is None:
            seen = {"mask": mask_tensor(item, made.views, factor)}
            cache.put(mask_keys[number], seen)
        pictures.setdefault(picture.bucket, replace(picture, mask=seen.get("mask")))
    return tuple(pictures.values())


def _picture(made: Cut, key: str) -> Picture:
    told = torch.tensor([view.sizes for view in made.views])
    return Picture(made.bucket, key, told, pixels=tuple(map(to_bytes, made.images)))


def _cached(cache: Cache, key: str) -> Picture | None:
    found = cache.get(key)
    if found is None or not {"mean", "std", "sizes"} <= set(found):
        return None
    height, width = found["sizes"][0, 4:].tolist()
    return Picture(Bucket(width, height), key, found["sizes"], Moments(found["mean"], found["std"]))


def _together(pictures: Sequence[Picture], vae: AutoencoderKL) -> list[Picture]:
    """Encode pictures of one bucket."""
    device = next(vae.parameters()).device
    views = [view for picture in pictures for view in _seen(picture)]
    count = max(1, MOST_PIXELS // pictures[0].bucket.area) if on_gpu(vae) else 1
    batches = [zip(*views[start : start + count], strict=True) for start in range(0, len(views), count)]
    moments = joined([posterior(vae, _shown(*batch, device)) for batch in batches])
    counts = [len(_seen(picture)) for picture in pictures]
    each = zip(pictures, moments.mean.split(counts), moments.std.split(counts), strict=True)
    return [replace(picture, moments=Moments(mean, std), pixels=()) for picture, mean, std in each]


def _seen(picture: Picture) -> list[tuple[Tensor, Tensor | None]]:
    """The pixels of each view, then of each with each of its holes."""
    views = [(pixels, None) for pixels in picture.pixels]
    if picture.holes is None:
        return views
    return views + [(picture.pixels[number // HOLES], hole) for number, hole in enumerate(picture.holes)]


def _shown(pixels: Sequence[Tensor], masks: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """[B, 3, H, W] in -1 … 1, gray in the holes."""
    shown = scaled(torch.cat(pixels).to(device))
    for row, mask in zip(shown, masks, strict=True):
        if mask is not None:
            row.masked_fill_(mask.to(device), 0)
    return shown


def _finished(one: Opened, pictures: tuple[Picture, ...], cache: Cache) -> Opened:
    """`one` with all its posteriors; what is new goes into the cache, unless it is no number."""
    new = [picture for before, picture in zip(one.pictures, pictures, strict=True) if before.moments is None]
    for picture in new:
        mean, std = picture.moments
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
            error = ImageError(one.item.path, "the VAE gave numbers that are not finite")
            return Opened(one.item, why=str(error))
        cache.put(picture.key, {"mean": mean, "std": std, "sizes": picture.sizes})
    return replace(one, pictures=pictures)
