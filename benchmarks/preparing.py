"""How long pictures take from their files to the encoder, beside Pillow alone; and how soon a second run starts.

usage: python -m benchmarks.preparing [--images 1000] [--folder DIR]

Prints one line of JSON. Without a real encoder: what stands in for the VAE answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from lora_trainer.dataset.buckets import place
from lora_trainer.dataset.cache import Cache
from lora_trainer.dataset.crops import Sizes
from lora_trainer.dataset.decode import MOST_THREADS
from lora_trainer.dataset.items import Item
from lora_trainer.dataset.prepare import Encoded, Encoders, prepare

# The two sides of pictures of about 1024 px squared.
SHAPES = ((1024, 1024), (1216, 832), (832, 1216), (1280, 768), (896, 1152))
RESOLUTION = 512


class InstantVae(nn.Module):
    """Latents of the right size, at once."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.config = SimpleNamespace(block_out_channels=(1,) * 4, latent_channels=4, scaling_factor=1.0)
        self.encoded = 0

    def encode(self, pixels: torch.Tensor) -> SimpleNamespace:
        self.encoded += len(pixels)
        zeros = torch.zeros(len(pixels), 4, pixels.shape[2] // 8, pixels.shape[3] // 8)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=zeros, std=zeros))


def write_pictures(folder: Path, count: int) -> list[Item]:
    """JPEGs of about a photograph's detail, about 0.6 MB each."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    items = []
    for number in range(count):
        path = folder / f"{number:05}.jpg"
        if not path.exists():
            width, height = SHAPES[number % len(SHAPES)]
            coarse = Image.fromarray(random.integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8))
            picture = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
            noisy = picture + random.integers(-6, 7, (height, width, 1), dtype=np.int16)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=92)
        items.append(Item(path, f"picture {number}", "benchmark"))
    return items


class Taken(NamedTuple):
    """Seconds on the clock, and of the processor: the ones that another program's work does not change."""

    wall: float
    cpu: float

    @classmethod
    def since(cls, began: Taken) -> Taken:
        now = cls.now()
        return cls(now.wall - began.wall, now.cpu - began.cpu)

    @classmethod
    def now(cls) -> Taken:
        return cls(time.perf_counter(), time.process_time())


def pillow_alone(items: Sequence[Item], threads: int) -> Taken:
    """What decoding and resizing take in as many threads, to the same sizes by the same filter."""

    def one(item: Item) -> None:
        with Image.open(item.path) as image:
            picture = image.convert("RGB")
        placement = place(picture.size, RESOLUTION)
        # Squeezed instead of cut, which takes as long.
        picture.resize((placement.bucket.width, placement.bucket.height), Image.Resampling.LANCZOS)

    began = Taken.now()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, items))
    return Taken.since(began)


def prepared(items: Sequence[Item], cache: Cache, kept: Encoded | None = None) -> tuple[Taken, int]:
    """What it took, and how many pictures the encoder was asked for."""
    vae = InstantVae()
    encoders = Encoders(vae, lambda caption: {"context": torch.zeros(77, 8)}, "instant", "instant", cache)
    began = Taken.now()
    prepare(items, encoders, [Sizes(RESOLUTION)], noise=_noise, sink=lambda event: None, kept=kept)
    return Taken.since(began), vae.encoded


def measure(items: Sequence[Item], folder: Path, rounds: int = 3) -> dict[str, object]:
    """Medians of `rounds` that take turns, so that a busy machine is busy for all."""
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    torch.set_num_threads(1)
    alone, ours = [], []
    for _ in range(rounds):
        alone.append(pillow_alone(items, threads))
        ours.append(prepared(items, Cache(None))[0])
    cache = Cache(folder / "cache")
    stopped = _interrupted(items, cache)
    rest_taken, rest = prepared(items, cache)
    second, again = prepared(items, cache)
    return {
        "images": len(items),
        "threads": threads,
        "pillow_s": round(_median(alone).wall, 2),
        "prepare_s": round(_median(ours).wall, 2),
        "ratio": round(_median(ours).wall / _median(alone).wall, 3),
        "cpu_ratio": round(min(ours, key=_cpu).cpu / min(alone, key=_cpu).cpu, 3),
        "interrupted_after": stopped,
        "then_encoded": rest,
        "then_s": round(rest_taken.wall, 2),
        "second_run_s": round(second.wall, 2),
        "second_run_cpu_s": round(second.cpu, 2),
        "second_run_encoded": again,
    }


def _interrupted(items: Sequence[Item], cache: Cache) -> int:
    """Fill the cache for some pictures; how many were encoded."""

    class StopError(Exception):
        pass

    def between() -> None:
        if kept.count == len(items) // 3:
            raise StopError

    kept = Encoded(between)
    try:
        prepared(items, cache, kept)
    except StopError:
        return kept.count
    raise AssertionError("it was not interrupted")


def _noise(index: int, view: int, shape: tuple[int, int, int]) -> torch.Tensor:
    return torch.zeros(1, *shape)


def _median(values: Sequence[Taken]) -> Taken:
    return sorted(values)[len(values) // 2]


def _cpu(taken: Taken) -> float:
    return taken.cpu


def main(arguments: Sequence[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="keeps the pictures for the next time")
    given = parser.parse_args(arguments)
    with nullcontext(given.folder) if given.folder else tempfile.TemporaryDirectory() as folder:
        found = measure(write_pictures(Path(folder) / "pictures", given.images), Path(folder))
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
