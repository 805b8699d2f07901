"""`lora-trainer sample`: prompts drawn without and with a LoRA, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lora_trainer.config.sample_options import SampleOptions
from lora_trainer.files import publish
from lora_trainer.hosts.standalone import device_of, open_model
from lora_trainer.lineplot import png
from lora_trainer.sampling import Recipe, apply_lora, generate
from lora_trainer.sheet import contact_sheet
from lora_trainer.training.precision import resolve


def sample_command(base: Path, lora: Path, prompts: Sequence[str], *, options: SampleOptions) -> list[Path]:
    """Draw each prompt without and with the LoRA, side by side; returns the written pictures.

    Raises ModelError, OutputError.
    """
    device = device_of("auto")
    precision, _ = resolve("fp16", device)
    model = open_model(base, device, precision.compute)
    size = options.size or model.facts.family.resolution
    recipe = Recipe((size, size), options.steps, options.guidance, options.negative, options.seed)
    plain = generate(model, prompts, recipe, precision)
    with apply_lora(model, lora).weight(options.weight):
        styled = generate(model, prompts, recipe, precision)
    rows = [("base", plain), (f"{lora.stem[:12]}\nat {options.weight:g}", styled)]
    written = []
    for index, (before, after) in enumerate(zip(plain, styled, strict=True), start=1):
        for name, picture in (("base", before), ("lora", after)):
            written.append(save_picture(picture, Path(options.out) / f"{index:03}-{name}.png"))
    written.append(save_picture(contact_sheet(rows, prompts), Path(options.out) / "sheet.png"))
    return written


def save_picture(picture: Image.Image, path: Path) -> Path:
    """Write a PNG whole. Raises OutputError."""
    publish(png(picture), path)
    return path
