"""The demo's data sets: one style to learn, held-out icons of it, and a placebo.

usage: python datasets.py FOLDER DEMO_FOLDER

FOLDER as for icons.py. The placebo has the words of the training set and another style's pictures: what a
LoRA gains from it on the held-out icons is not the style.
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

from icons import caption, icons, render, subjects

TRAIN, HELD_OUT = 120, 64
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


def write(folder: Path, names: list[str], svgs: dict[str, str], style: str) -> None:
    """PNGs and a metadata.csv without a header, as `file,"caption"`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, name in enumerate(names, start=1):
        file = f"{number:03}-{name}.png"
        picture = render(svgs[name]).quantize(255, kmeans=1, dither=0)
        picture.save(folder / file, optimize=True)
        lines.append(f'{file},"{caption(style, name)}"\n')
    (folder / "metadata.csv").write_text("".join(lines), encoding="utf-8", newline="\n")


def main(folder: Path, demo: Path) -> None:
    train, held_out = chosen(folder)
    twemoji, noto = icons(folder, "twemoji"), icons(folder, "noto")
    write(demo / "twemoji", train, twemoji, "twemoji")
    write(demo / "twemoji-held-out", held_out, twemoji, "twemoji")
    write(demo / "placebo", train, noto, "twemoji")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
