"""Icon sets of the npm registry to pictures and captions.

usage: python icons.py FOLDER OUT.npz

FOLDER holds an unpacked npm package a set (`npm pack @iconify-json/noto`, unpacked as FOLDER/noto/package/…).
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 128
MARGIN = 0.04
# npm package -> the word that captions use for the style
SHADED = {"noto": "noto", "fluent-emoji": "fluent", "emojione": "emojione", "streamline-emojis": "outline"}
FLAT = {"fluent-emoji-flat": "flat", "noto-v1": "android", "fxemoji": "firefox"}
BASE_STYLES = SHADED | FLAT
LORA_STYLE = "twemoji"
MOST_WORDS, FEWEST_STYLES = 3, 3

# Signs, clocks and people's variants say nothing about a drawing style, and there are very many of them.
_LEFT_OUT = re.compile(
    r"\d|middle-finger|button|oclock|thirty|flag|arrow|keycap|skin-tone|-tone|regional|family|input-|japanese|"
    r"^(man|woman|men|women|person|people|boy|girl)\b|"
    r"^(aries|taurus|gemini|cancer|leo|virgo|libra|scorpio|sagittarius|capricorn|aquarius|pisces|ophiuchus)$|"
    r"^(copyright|registered|trade-mark|information|minus|plus|divide|multiply|infinity|wavy-dash|curly-loop|"
    r"double-.*|heavy-.*|part-alternation.*|recycling.*|trident.*|check-.*|cross-.*|white-.*|black-.*)$"
)
_BOX = {"left": 0, "top": 0, "width": 16, "height": 16}


def icons(folder: Path, package: str) -> dict[str, str]:
    """Icon name -> SVG of one set (iconify's JSON: a body, and a box whose defaults the set may override)."""
    data = json.loads((folder / package / "package" / "icons.json").read_text(encoding="utf-8"))
    found = {}
    for name, icon in data["icons"].items():
        if icon.get("hidden") or _LEFT_OUT.search(name):
            continue
        box = " ".join(str(icon.get(key, data.get(key, default))) for key, default in _BOX.items())
        found[name] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}">{icon["body"]}</svg>'
        )
    return found


def render(svg: str) -> Image.Image:
    """A picture of SIZE × SIZE on white, the icon with a small margin."""
    import resvg_py  # not where the base is trained

    inner = round(SIZE * (1 - 2 * MARGIN))
    drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=inner, height=inner))))
    picture = Image.new("RGB", (SIZE, SIZE), "white")
    picture.paste(drawn, ((SIZE - drawn.width) // 2, (SIZE - drawn.height) // 2), drawn.convert("RGBA"))
    return picture


def subjects(folder: Path) -> list[str]:
    """Icon names of at most two words that noto, fluent and emojione share with the LoRA's style."""
    sets = [set(icons(folder, package)) for package in (*SHADED, LORA_STYLE) if package != "streamline-emojis"]
    return sorted(name for name in set.intersection(*sets) if name.count("-") <= 1)


def caption(style: str, name: str) -> str:
    return f"{style} emoji of {name.replace('-', ' ')}"


def base_icons(folder: Path) -> list[tuple[str, str, str]]:
    """(style, name, SVG) of what the base learns: short names that several styles have."""
    found = {style: icons(folder, package) for package, style in BASE_STYLES.items()}
    names = Counter(name for svgs in found.values() for name in svgs)
    spelled = {name.replace("-", ""): name for name in names if "-" in name}
    # This set alone writes its names without hyphens.
    found["firefox"] = {spelled.get(name, name): svg for name, svg in found["firefox"].items()}
    names = Counter(name for svgs in found.values() for name in svgs)
    kept = {n for n, styles in names.items() if styles >= FEWEST_STYLES and n.count("-") < MOST_WORDS}
    return [(style, name, svgs[name]) for style, svgs in found.items() for name in sorted(kept & svgs.keys())]


def main(folder: Path, out: Path) -> None:
    """Everything the pretraining needs.

    `pictures` [N, 128, 128, 3] uint8 with `names` and `styles`, and `unseen` [M, 128, 128, 3], named by
    `unseen_names`: pictures in the LoRA's style, only to measure with.
    """
    rows = base_icons(folder)
    unseen, shared = icons(folder, LORA_STYLE), subjects(folder)
    np.savez_compressed(
        out,
        pictures=np.stack([np.asarray(render(svg)) for _, _, svg in rows]),
        names=np.array([name for _, name, _ in rows]),
        styles=np.array([style for style, _, _ in rows]),
        unseen=np.stack([np.asarray(render(unseen[name])) for name in shared]),
        unseen_names=np.array(shared),
    )
    print(f"{len(rows)} pictures of {len({name for _, name, _ in rows})} subjects: {Counter(row[0] for row in rows)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
