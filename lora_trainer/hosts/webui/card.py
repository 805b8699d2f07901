"""The card of a finished LoRA: what the WebUI shows of it, and what a click on it puts into the prompt."""

from __future__ import annotations

import io
import json
from pathlib import Path

from lora_trainer.config import Config, trigger_words_of
from lora_trainer.dataset.images import ImageError, is_picture, load_image
from lora_trainer.files import publish
from lora_trainer.models.checkpoint import read_header

PREFERRED_WEIGHT, SIDE = 0.8, 512
PICTURES = (".png", ".preview.png", ".jpg", ".preview.jpg", ".webp", ".preview.webp")


def write_card(lora: Path, config: Config, folder: Path) -> None:
    """Beside `lora`: its texts, and the newest preview in `folder`, else a training picture. What is there stays."""
    card = lora.with_suffix(".json")
    if not card.exists():
        values = {
            "description": f"Trained with LoRA Trainer on {config.base_model}.",
            "sd version": _version(lora),
            "activation text": trigger_words_of(config),
            "preferred weight": PREFERRED_WEIGHT,
        }
        publish(json.dumps(values, indent=4, ensure_ascii=False).encode(), card)
    if not any(lora.with_suffix(ending).exists() for ending in PICTURES):
        picture = _picture(config, folder)
        if picture is not None:
            publish(picture, lora.with_suffix(".png"))


def _version(lora: Path) -> str:
    """As the WebUI reads it from the file's header; for Stable Diffusion 3 it has no word, and would say SD1."""
    said = read_header(lora).get("__metadata__", {})
    version = said.get("ss_base_model_version", "")
    if version.startswith("sd3"):
        return "Unknown"
    if version.startswith("sdxl_"):
        return "SDXL"
    return "SD2" if said.get("ss_v2") == "True" else "SD1"


def _picture(config: Config, folder: Path) -> bytes | None:
    previews = sorted((folder / "samples").glob("*-1.png"))
    home = Path(config.train_data_dir)
    # A slider may have had no pictures: that is not the current folder.
    places = [home / concept.folder for concept in config.concepts] or [home] * bool(config.train_data_dir)
    files = (path for place in places for path in sorted([*place.glob("*"), *place.glob("*/*")]))
    trained = (path for path in files if is_picture(path))
    for path in (*previews[-1:], *trained):
        try:
            image = load_image(path)
        except ImageError:
            continue
        image.thumbnail((SIDE, SIDE))
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return buffer.getvalue()
    return None
