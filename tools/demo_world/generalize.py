"""Last stage of the pretraining, on a CPU: unlearn what is learned by heart.

usage: python generalize.py ICONS.npz IN.safetensors OUT.safetensors SECONDS [PICTURES]

After thousands of epochs over 1,965 pictures the UNet restores *its* picture of a subject from little noise, whatever
picture the noise is on: its loss there is above 1, the loss of predicting nothing. Half of each batch is as before
(any timestep, min-SNR weights; own, unknown or no style word). The other half is turned, mirrored and shifted pictures
at low noise, under a style word that the text encoder does not know: there, what is in the picture counts, not what was
learned by heart.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from lora_trainer.models.checkpoint import read_header
from lora_trainer.models.latents import encode, latent_shape
from lora_trainer.models.model import CheckpointHashes, Model
from lora_trainer.models.single_file import model_of, place
from lora_trainer.models.unet_names import LDM_PREFIX

CPU = torch.device("cpu")
HALF_BATCH, PEAK_RATE, LOW_NOISE = 8, 2e-4, 600
UNKNOWN_STYLES = ("blorp", "zintra", "quavelo", "mirdox", "pelluk", "vastony")


@torch.no_grad()
def latents_of(model: Model, pictures: np.ndarray) -> Tensor:
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    zeros = torch.zeros(1, *latent_shape(model.vae, *pictures.shape[1:3]))
    return torch.cat([encode(model.vae, part, zeros) for part in pixels.split(16)])


@torch.no_grad()
def contexts_of(model: Model, captions: list[str]) -> Tensor:
    return torch.cat([model.text.encode(model.text.tokenize(caption)) for caption in captions])


def disturbed(x: Tensor) -> Tensor:
    """Each latent turned by a quarter, mirrored and shifted by whole cells, at random."""
    parts = []
    for latent in x:
        latent = torch.rot90(latent, int(torch.randint(4, ())), (1, 2))
        latent = latent.flip(2) if torch.rand(()) < 0.5 else latent
        parts.append(latent.roll(tuple(torch.randint(-3, 4, (2,)).tolist()), (1, 2)))
    return torch.stack(parts)


def loss_of(model: Model, x: Tensor, t: Tensor, context: Tensor, *, weighted: bool) -> Tensor:
    noise = torch.randn_like(x)
    out = model.unet(model.noise.add_noise(x, noise, t), t, encoder_hidden_states=context).sample
    error = (out - noise).square().mean((1, 2, 3))
    a = model.noise.alphas_cumprod[t]
    return (error * (5 * (1 - a) / a).clamp(max=1)).mean() if weighted else error.mean()


def main(icons: Path, source: Path, target: Path, seconds: float, pictures: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    family, state = place(source, CPU, torch.float32)
    model = model_of(state, family, source, device=CPU, hashes=CheckpointHashes)
    data = np.load(icons)
    keep = np.random.default_rng(0).permutation(np.flatnonzero(data["shared"]))[:pictures]
    subjects = [str(name).replace("-", " ") for name in data["names"][keep]]
    latents = latents_of(model, data["pictures"][keep])
    own = contexts_of(model, [f"{s} emoji of {n}" for s, n in zip(data["styles"][keep], subjects, strict=True)])
    words = [UNKNOWN_STYLES[i % len(UNKNOWN_STYLES)] for i in range(len(subjects))]
    unknown = contexts_of(model, [f"{w} emoji of {n}" for w, n in zip(words, subjects, strict=True)])
    empty = contexts_of(model, [""])
    print(f"{len(latents)} pictures encoded", flush=True)

    parameters = list(model.unet.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=1e-2)
    began, step, seen = time.time(), 0, torch.zeros(2)
    while (share := (time.time() - began) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = PEAK_RATE * min(1, (step + 1) / 20) * (1 - share)
        i, j = torch.randint(len(latents), (2, HALF_BATCH))
        t = torch.randint(1000, (HALF_BATCH,))
        context = own[i].clone()
        context[0], context[1:4] = empty, unknown[i[1:4]]
        old = loss_of(model, latents[i], t, context, weighted=True)
        context = unknown[j].clone()
        context[0] = empty
        low = torch.randint(LOW_NOISE, (HALF_BATCH,))
        new = loss_of(model, disturbed(latents[j]), low, context, weighted=False)
        (old + new).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.lerp_(torch.stack([old, new]).detach(), 0.05 if step else 1)
        step += 1
        if step % 25 == 0:
            print(f"{step} steps {time.time() - began:.0f} s own {seen[0]:.4f} disturbed {seen[1]:.4f}", flush=True)
            save(state, source, target)
    save(state, source, target)


def save(state: dict[str, Tensor], source: Path, target: Path) -> None:
    """The source file with the trained UNet, in fp16."""
    tensors = load_file(source)
    for name in tensors:
        if name.startswith(LDM_PREFIX):
            tensors[name] = state[name].detach().half().contiguous()
    save_file(tensors, target, metadata=read_header(source).get("__metadata__"))


if __name__ == "__main__":
    paths, (seconds, *rest) = map(Path, sys.argv[1:4]), sys.argv[4:]
    main(*paths, float(seconds), int(rest[0]) if rest else 2000)
