"""The evidence that a LoRA learns the style from the demo's data, with a plain PEFT loop.

usage: python evidence.py DEMO_FOLDER SHEET.png [TRAINING_SETS …]

The guide's settings: rank 8, alpha 16, dropout 0.1, AdamW 2e-4, batch 4 × 2, 10 epochs. Prints the loss on
the held-out icons at 8 fixed timesteps with fixed noise: base, LoRA, shuffled captions, placebo.
"""

from __future__ import annotations

import csv
import random
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from lora_trainer.models.latents import decode, encode, latent_shape, to_image, to_tensor
from lora_trainer.models.model import CheckpointHashes, Model
from lora_trainer.models.single_file import model_of, place

TARGETS = r".*transformer_blocks.*(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2)|.*(proj_in|proj_out)"
DEVICE = torch.device("cpu")
SHOWN, COLUMN = 10, 134


@dataclass(frozen=True)
class Data:
    """Latents [N, 4, 16, 16], contexts [N, 77, width], and the pictures themselves."""

    latents: Tensor
    contexts: Tensor
    pictures: list[Image.Image]


def open_world(demo: Path) -> Model:
    path = demo / "emoji-world.safetensors"
    family, state = place(path, DEVICE, torch.float32)
    return model_of(state, family, path, device=DEVICE, hashes=CheckpointHashes)


@torch.no_grad()
def read(model: Model, folder: Path) -> Data:
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    pictures = [Image.open(folder / name).convert("RGB") for name, _ in rows]
    zeros = torch.zeros(1, *latent_shape(model.vae, *pictures[0].size))
    return Data(
        torch.cat([encode(model.vae, to_tensor(picture), zeros) for picture in pictures]),
        torch.cat([model.text.encode(model.text.tokenize(caption)) for _, caption in rows]),
        pictures,
    )


def error(model: Model, data: Data, t: Tensor, noise: Tensor) -> Tensor:
    a = model.noise.alphas_cumprod[t].view(-1, 1, 1, 1)
    noisy = a.sqrt() * data.latents + (1 - a).sqrt() * noise
    return (model.unet(noisy, t, encoder_hidden_states=data.contexts).sample - noise).square().mean()


@torch.no_grad()
def held_out_loss(model: Model, data: Data) -> float:
    model.unet.eval()
    generator = torch.Generator().manual_seed(0)
    losses = []
    for t in range(63, 1000, 125):
        noise = torch.randn(data.latents.shape, generator=generator)
        losses.append(error(model, data, torch.full((len(noise),), t), noise))
    return torch.stack(losses).mean().item()


def train(model: Model, data: Data, epochs: int = 10) -> float:
    """Inject a LoRA and train it; returns the seconds."""
    torch.manual_seed(0)
    order = random.Random(0)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules=TARGETS)
    inject_adapter_in_model(config, model.unet)
    parameters = [p for name, p in model.unet.named_parameters() if "lora_" in name]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4)
    model.unet.train()
    began = time.time()
    for _ in range(epochs):
        index = order.sample(range(len(data.latents)), len(data.latents))
        for number, start in enumerate(range(0, len(index), 4)):
            batch = index[start : start + 4]
            part = Data(data.latents[batch], data.contexts[batch], [])
            t = torch.randint(1000, (len(batch),))
            (error(model, part, t, torch.randn_like(part.latents)) / 2).backward()
            if number % 2:
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return time.time() - began


@torch.no_grad()
def draw(model: Model, contexts: Tensor, guidance: float = 4.0, steps: int = 30) -> list[Image.Image]:
    """DDIM from one starting noise."""
    model.unet.eval()
    empty = model.text.encode(model.text.tokenize("")).expand_as(contexts)
    x = torch.randn(1, *latent_shape(model.vae, 128, 128), generator=torch.Generator().manual_seed(1))
    x = x.repeat(len(contexts), 1, 1, 1)
    alphas = model.noise.alphas_cumprod
    times = torch.linspace(981, 1, steps).round().long()
    for now, b in zip(times, torch.cat([alphas[times[1:]], alphas[:1]]), strict=True):
        a = alphas[now]
        both = torch.cat([empty, contexts])
        away, to = model.unet(torch.cat([x, x]), now, encoder_hidden_states=both).sample.chunk(2)
        eps = away + guidance * (to - away)
        x = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
    return [to_image(picture) for picture in decode(model.vae, x)]


def scale_lora(model: Model, weight: float) -> None:
    for module in model.unet.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] = 2.0 * weight


def main(demo: Path, sheet: Path, sets: list[str]) -> None:
    torch.set_num_threads(2)
    base = None
    for name in sets:
        model = open_world(demo)
        held_out = read(model, demo / "twemoji-held-out")
        shown = held_out.contexts[:SHOWN]
        if base is None:
            base = held_out_loss(model, held_out)
            print(f"base {base:.4f}", flush=True)
            rows = [draw(model, shown)]
        seconds = train(model, read(model, demo / name))
        loss = held_out_loss(model, held_out)
        print(f"{name}: {loss:.4f}, {1 - loss / base:.1%} lower, trained {seconds:.0f} s", flush=True)
        if name == "twemoji":
            wrong = held_out_loss(model, replace(held_out, contexts=held_out.contexts.roll(1, 0)))
            print(f"shuffled captions {wrong:.4f}, {wrong / loss - 1:.1%} worse", flush=True)
            for weight in (0.5, 1.0):
                scale_lora(model, weight)
                rows.append(draw(model, shown))
            rows.append(held_out.pictures[:SHOWN])
    whole = Image.new("RGB", (SHOWN * COLUMN, len(rows) * COLUMN), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            whole.paste(picture, (x * COLUMN + 3, y * COLUMN + 3))
    whole.save(sheet)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:] or ["twemoji", "placebo"])
