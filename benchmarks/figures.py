"""Three figures to learn from few pictures: each a bundled icon in a colour that it never has, wearing another icon,
and beside it, in every picture, some third icon that the base knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from lora_trainer.demo import WORLD

ICONS, SIZE, TRAINED = WORLD / "placebo", 128, 24


@dataclass(frozen=True)
class Figure:
    """`hue`: by how much colours turn, of 256. The worn icon is `width` of the body's, its middle at `place`, in shares
    of the body."""

    body: str
    hue: int
    worn: str
    width: float
    place: tuple[float, float]


FIGURES = {
    "zorbin": Figure("duck", 170, "womans hat", 0.6, (0.38, 0.05)),
    "mippo": Figure("mouse face", 80, "glasses", 0.8, (0.5, 0.45)),
    "kelduk": Figure("leopard", 110, "headphone", 0.5, (0.25, 0.25)),
}


def icons() -> dict[str, Image.Image]:
    """The bundled pictures by subject, their white ground made transparent."""
    found = {}
    for row in (ICONS / "metadata.csv").read_text(encoding="utf-8").splitlines():
        name, _, caption = row.partition(",")
        picture = np.asarray(Image.open(ICONS / name).convert("RGB"))
        solid = (picture.min(axis=2) < 250).astype(np.uint8) * 255
        whole = Image.fromarray(np.dstack([picture, solid]))
        found[caption.strip('"').split(" of ", 1)[-1]] = whole.crop(whole.getbbox())
    return found


def dressed(figure: Figure, known: dict[str, Image.Image]) -> Image.Image:
    """The figure alone, with transparency."""
    body, worn = known[figure.body], known[figure.worn]
    hue, *rest = body.convert("RGB").convert("HSV").split()
    turned = Image.merge("HSV", [hue.point(lambda value: (value + figure.hue) % 256), *rest]).convert("RGB")
    worn = fitted(worn, round(figure.width * body.width))
    at = [round(share * side - half / 2) for share, side, half in zip(figure.place, body.size, worn.size, strict=True)]
    margin = max(0, *(-x for x in at))
    canvas = Image.new("RGBA", (body.width + 2 * margin, body.height + 2 * margin))
    canvas.paste(turned, (margin, margin), body.getchannel("A"))
    canvas.alpha_composite(worn, (at[0] + margin, at[1] + margin))
    return canvas.crop(canvas.getbbox())


def fitted(picture: Image.Image, width: int) -> Image.Image:
    return picture.resize((width, max(1, round(picture.height * width / picture.width))), Image.Resampling.LANCZOS)


def shown(name: str) -> Iterator[tuple[str, Image.Image]]:
    """Captions and pictures, each with another icon beside the figure; the same ones every time."""
    random, known = Random(name), icons()
    figure = dressed(FIGURES[name], known)
    others = [subject for subject in known if subject not in (FIGURES[name].body, FIGURES[name].worn)]
    random.shuffle(others)
    for other in others:
        canvas = Image.new("RGB", (SIZE, SIZE), "white")
        large, small = fitted(figure, random.randint(60, 80)), fitted(known[other], random.randint(30, 42))
        mirrored = random.random() < 0.5
        for picture, left in ((large, mirrored), (small, not mirrored)):
            across = random.randint(2, 6)
            place = across if left else SIZE - across - picture.width
            canvas.paste(picture, (place, random.randint(4, max(4, SIZE - 4 - picture.height))), picture)
        yield f"noto emoji of {name} and {other}", canvas


def write_figure(name: str, out: Path) -> tuple[Path, Path]:
    """Folders with the pictures to learn and the held-out ones, with captions."""
    pictures = list(shown(name))
    parts = (pictures[:TRAINED], pictures[TRAINED:])
    return tuple(_write(part, out / folder) for part, folder in zip(parts, (name, f"{name}-held-out"), strict=True))


def _write(pictures: Sequence[tuple[str, Image.Image]], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (caption, picture) in enumerate(pictures):
        picture.save(folder / f"{number:03}.png")
        rows.append(f'{number:03}.png,"{caption}"')
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder
