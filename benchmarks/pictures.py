"""Pictures drawn with the LoRAs of `benchmarks.quality --work FOLDER`, for captions of held-out pictures: how far they
are from the real ones, and a sheet of them.

usage: python -m benchmarks.pictures FOLDER [--runs default-ink-1 …] [--device auto] [--count 64] [--draws 1]
                                     [--steps 120 360 …] [--last] [--sheet SHEET.png --captions 8] >> PICTURES.jsonl

Prints one line of JSON a LoRA; its distance is the mean over `--draws` pictures of each caption, each of which is
there too. Where the network of `benchmarks.perceptual` is installed, its distance stands beside that.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from benchmarks.perceptual import available, network, perceptual
from lora_trainer.demo import WORLD
from lora_trainer.draw import save_picture
from lora_trainer.hosts.standalone import device_of, open_model
from lora_trainer.models.latents import decode, latent_shape, to_image, to_tensor
from lora_trainer.models.model import Model
from lora_trainer.sampling import Recipe, apply_lora, conditions, scheduler
from lora_trainer.sheet import contact_sheet
from lora_trainer.training import randomness
from lora_trainer.training.precision import Precision

THUMBNAIL = 8
Measure = Callable[[Tensor, Tensor], float]
_NAME = re.compile(r"(?P<settings>.+)-(?P<style>[^-]+)-(?P<seed>\d+)")
_STEP = re.compile(r"-step(\d+)\.safetensors$")


@torch.no_grad()
def draw(model: Model, captions: Sequence[str], recipe: Recipe) -> Tensor:
    """[n, 3, H, W] in -1 … 1, drawn by DDIM with guidance, all at once; each caption with a noise of its own."""
    precision, device = Precision(model.facts.device, model.facts.dtype), model.facts.device
    told = conditions(model, [*[recipe.negative] * len(captions), *captions], recipe.size)
    ddim = scheduler(model.noise)
    ddim.set_timesteps(recipe.steps)
    shape = latent_shape(model.vae, *recipe.size)
    x = randomness.normal(recipe.seed, "pictures", range(len(captions)), shape).to(device)
    for t in ddim.timesteps:
        with precision.autocast():
            out = model.unet(torch.cat([x, x]), t.to(device), **told, return_dict=False)[0].float()
        away, towards = out.chunk(2)
        x = ddim.step(away + recipe.guidance * (towards - away), t, x, return_dict=False)[0]
    return torch.cat([decode(model.vae, part).float().cpu() for part in x.split(16)]).clamp(-1, 1)


def distance(drawn: Tensor, real: Tensor) -> float:
    """Mean squared difference of [n, 3, H, W] in -1 … 1 to the real pictures of the same captions, as thumbnails of
    THUMBNAIL² pixels: colours and where they are, without asking any network."""
    one, other = (F.adaptive_avg_pool2d(side, THUMBNAIL) for side in (drawn, real))
    return F.mse_loss(one, other).item()


def measured(drawn: Sequence[Tensor], real: Tensor, measures: Mapping[str, Measure]) -> dict[str, object]:
    """By each measure the distance of every draw, and their mean."""
    found: dict[str, object] = {}
    for name, measure in measures.items():
        far = [round(measure(each, real), 5) for each in drawn]
        found |= {name: round(sum(far) / len(far), 5), f"{name}_draws": far}
    return found


def held_out(folder: Path) -> tuple[list[str], list[Image.Image]]:
    """Captions and pictures, in the order of the list beside them."""
    rows = [line.partition(",") for line in (folder / "metadata.csv").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if (folder / row[0]).exists()]
    return [row[2].strip('"') for row in rows], [Image.open(folder / row[0]).convert("RGB") for row in rows]


def loras(run: Path) -> list[Path]:
    """A run's files in the order of their steps, the last one without a number at the end."""
    return sorted(run.glob("*.safetensors"), key=lambda path: (step(path) is None, step(path)))


def chosen(paths: Sequence[Path], steps: Sequence[int], last: bool) -> list[Path]:
    """Of a run's files those of `steps` and the last one; all where neither is asked for."""
    if not steps and not last:
        return list(paths)
    return [path for path in paths if step(path) in steps or (last and path == paths[-1])]


def step(path: Path) -> int | None:
    """The number in a file's name."""
    found = _STEP.search(path.name)
    return int(found[1]) if found else None


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", nargs="*", default=None, help="folders there; all that are runs")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--steps", nargs="*", type=int, default=[], help="only the LoRAs of these; all of a run")
    parser.add_argument("--last", action="store_true", help="the last LoRA of each run, beside those")
    parser.add_argument("--sheet", type=Path, default=None)
    parser.add_argument("--captions", type=int, default=8)
    asked = parser.parse_args(arguments)
    device = device_of(asked.device)
    measures: dict[str, Measure] = {"distance": distance}
    if available():
        measures["perceptual"] = partial(perceptual, network(device))
    rows: list[tuple[str, Sequence[Image.Image]]] = []
    heads: list[str] = []
    for name in asked.runs or sorted(path.parent.name for path in asked.folder.glob("*/logs")):
        about = _NAME.fullmatch(name)
        found = next(asked.folder.glob(f"{about['style']}-held-out-*"))
        captions, real = (part[: asked.count] for part in held_out(found))
        truth = torch.cat([to_tensor(picture) for picture in real])
        recipes = [Recipe(real[0].size, steps=20, seed=seed) for seed in range(asked.draws)]
        examples = range(0, len(captions), max(1, len(captions) // asked.captions))[: asked.captions]
        for path in chosen(loras(asked.folder / name), asked.steps, asked.last):
            model = open_model(WORLD / "emoji-world.safetensors", device)
            apply_lora(model, path)
            drawn = [draw(model, captions, recipe) for recipe in recipes]
            line = {**about.groupdict(), "seed": int(about["seed"]), "step": step(path), "count": len(captions)}
            print(json.dumps(line | measured(drawn, truth, measures)), flush=True)
            label = name if step(path) is None else f"{name}-step {step(path)}"
            rows.append((label.replace("-", "\n"), [to_image(drawn[0][at]) for at in examples]))
        heads = [captions[at].split(" of ", 1)[-1] for at in examples]
        real_row = ("real\n(held out)", [real[at] for at in examples])
    if asked.sheet:
        save_picture(contact_sheet([*rows, real_row], heads), asked.sheet)


if __name__ == "__main__":
    main(sys.argv[1:])
