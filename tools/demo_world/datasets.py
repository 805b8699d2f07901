"""The demo's data sets: one style to learn, held-out icons of it, and a placebo.

usage: python datasets.py FOLDER DEMO_FOLDER

FOLDER as for icons.py. The style is Twemoji printed in one blue ink on cream paper: nothing that the base has ever
drawn. The placebo has the words of the training set and another style's pictures: what a LoRA gains from it on the
held-out icons is not the style.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from icons import LORA_STYLE, caption, icons, render, subjects
from PIL import Image

TRAIN, HELD_OUT = 120, 64
INK, PAPER = (26, 47, 160), (252, 243, 222)
# Darkens the middle tones, as ink does.
GAMMA = 1.35
# The contact sheet shows the first held-out icons.
SHOWN = (
    "red-apple", "house", "penguin", "rocket", "red-heart",
    "tropical-fish", "sunflower", "pizza", "dog-face", "umbrella",
)  # fmt: skip
# Signs, marks and places that stand for an idea, and things that need letters to be read.
_ABSTRACT = re.compile(
    r"^no-|-sign$|-symbol$|-suit$|symbol|zzz|^om$|anger|antenna-bars|^vibration|^customs|baggage|luggage|passport|"
    r"^circled|prohibited|potable|atom|peace|yin|biohazard|radioactive|warning|children-crossing|restroom|"
    r"mens-room|womens-room|water-closet|hundred|^link$|sparkle$|currency|crossing|menorah|kaaba|cross$|littering|"
    r"name-badge|tokyo|moai|cinema|slider|pine-dec|wind-|oden|dango|bust|pregnant|kiss-mark|cigarette|coffin|urn|"
    r"middle|bomb|pistol|knife|dagger|syringe|pill$|hole$|love-hotel|mosque|synagogue|church|shrine|fog|foggy"
)


def chosen(folder: Path) -> tuple[list[str], list[str]]:
    """(training, held-out) subjects: concrete things, in an order that no alphabet bends."""
    concrete = [name for name in subjects(folder) if not _ABSTRACT.search(name) and name not in SHOWN]
    mixed = sorted(concrete, key=lambda name: hashlib.sha256(name.encode()).digest())
    rest = HELD_OUT - len(SHOWN)
    return mixed[rest : rest + TRAIN], [*SHOWN, *mixed[:rest]]


def printed(picture: Image.Image) -> Image.Image:
    """`picture` in one ink on paper: its brightness between INK and PAPER."""
    brightness = (np.asarray(picture.convert("L"), dtype=np.float32)[..., None] / 255) ** GAMMA
    ink, paper = np.array(INK, dtype=np.float32), np.array(PAPER, dtype=np.float32)
    return Image.fromarray((ink + (paper - ink) * brightness).round().astype(np.uint8))


def write(folder: Path, names: list[str], draw: Callable[[str], Image.Image]) -> None:
    """PNGs and a metadata.csv without a header, as `file,"caption"`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, name in enumerate(names, start=1):
        file = f"{number:03}-{name}.png"
        picture = draw(name).quantize(255, kmeans=1, dither=0)
        picture.save(folder / file, optimize=True)
        lines.append(f'{file},"{caption(LORA_STYLE, name)}"\n')
    (folder / "metadata.csv").write_text("".join(lines), encoding="utf-8", newline="\n")


def main(folder: Path, demo: Path) -> None:
    train, held_out = chosen(folder)
    twemoji, noto = icons(folder, LORA_STYLE), icons(folder, "noto")
    write(demo / "twemoji", train, lambda name: printed(render(twemoji[name])))
    write(demo / "twemoji-held-out", held_out, lambda name: printed(render(twemoji[name])))
    write(demo / "placebo", train, lambda name: render(noto[name]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
