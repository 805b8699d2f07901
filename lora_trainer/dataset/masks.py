"""Which part of a picture counts: the files that say so, and what they say at the size of latents."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_trainer.dataset.captions import stop
from lora_trainer.dataset.crops import View
from lora_trainer.dataset.folders import files_of
from lora_trainer.dataset.images import IMAGE_SUFFIXES, MASK_ENDING, ImageError, image_facts, load_alpha, load_image
from lora_trainer.dataset.items import Item

# (name of the picture's folder, its name without ending); of masks in no folder the folder is "".
Masks = dict[tuple[str, str], Path]


def masks_in(folder: Path) -> Masks:
    """The masks of a folder and its direct sub-folders, by the names of their pictures. Raises DataError."""
    files, _, _ = files_of(folder, stop)
    found: Masks = {}
    for file in files:
        if file.suffix.lower() in IMAGE_SUFFIXES:
            stem = file.name[: -len(MASK_ENDING)] if file.name.lower().endswith(MASK_ENDING) else file.stem
            found.setdefault(_key("" if file.parent == folder else file.parent.name, stem), file)
    return found


def with_masks(items: Sequence[Item], masks: Masks, *, loose: bool = True) -> tuple[Item, ...]:
    """Each with its mask: that in `masks`, else the one beside it, else itself where it is transparent.

    With `loose`, masks in no folder of their own count for pictures in any.
    """
    return tuple(replace(item, mask=_mask(item.path, masks, loose)) for item in items)


def told(items: Sequence[Item], folder: Path | None) -> str:
    """How many of `items` got their masks from where, in words."""
    places = Counter(_place(item, folder) for item in items)
    return ", ".join(f"{count} {place}" for place, count in sorted(places.items(), key=lambda pair: -pair[1]))


def mask_tensor(item: Item, views: Sequence[View], factor: int) -> Tensor:
    """What `views` show of the item's mask, [views, h, w] uint8 of 0 to 255, `factor` times smaller than their bucket.

    Raises ImageError, also for a mask that has not the size of its picture.
    """
    assert item.mask is not None
    mask = load_alpha(item.mask) if item.mask == item.path else load_image(item.mask).convert("L")
    original = views[0].placement.original
    if mask.size != original:
        expected = f"expected the {original[0]}×{original[1]} pixels of {item.path.name}, whose mask it is"
        raise ImageError(item.mask, f"{expected}, found {mask.width}×{mask.height}")
    return torch.stack([_tensor(view.mask_of(mask, factor)) for view in views])


def weights(mask: Tensor, rest: float) -> Tensor:
    """How much each part counts, float32: 1 where the mask is white, `rest` where it is black, between them in
    proportion, so that a latent counts by the share of it that is white."""
    return rest + (1 - rest) * mask.float() / 255


def _mask(path: Path, masks: Masks, loose: bool) -> Path | None:
    for place in (path.parent.name, "")[: 1 + loose]:
        if _key(place, path.stem) in masks:
            return masks[_key(place, path.stem)]
    beside = path.with_name(path.stem + MASK_ENDING)
    if beside.is_file():
        return beside
    try:
        return path if image_facts(path).transparent else None
    except ImageError:
        # Whoever reads the picture tells why it cannot be used.
        return None


def _key(place: str, stem: str) -> tuple[str, str]:
    """macOS writes accents as characters of their own, other systems do not."""
    return unicodedata.normalize("NFC", place), unicodedata.normalize("NFC", stem)


def _place(item: Item, folder: Path | None) -> str:
    if item.mask is None:
        return "have none and count wholly"
    if item.mask == item.path:
        return "by their transparency"
    return "from mask_dir" if folder is not None and item.mask.is_relative_to(folder) else f"from …{MASK_ENDING}"


def _tensor(mask: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(mask))
