"""Pretrain the demo world's UNet and text encoder on one GPU, with the VAE of pretrain_vae.py.

usage: python pretrain.py ICONS.npz VAE.pt OUT SECONDS FROM TO [BATCH] [RESUME]

FROM and TO say which part of the whole training (0 … 1) this run is. Writes OUT/*.pt (weights and their
average in fp16, in parts of less than 16 MiB; a resumed run finds new moments) and a sampled sheet.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from gpu import CUDA, DEVICE, HALF, Masters, graphed, train
from networks import LATENT, SCALE, Text, make_unet, make_vae
from pretrain_vae import pixels
from sheets import draw_sheet
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from lora_trainer.models.noise import scaled_linear
from lora_trainer.models.text import Tokenizer

PEAK_RATE = 8e-4
UNKNOWN = 49000  # stands for any token that no caption of the base has
# Captions of an image: with its style, without one, with an unknown word (three tokens) as its style, empty.
SHARES = (0.66, 0.12, 0.12, 0.10)
STYLED, PLAIN, STRANGE, EMPTY = range(len(SHARES))
PARTS = ("unet-values", "unet-average", "text-values", "text-average")


def captions(names: np.ndarray, styles: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """(ids of seen tokens, rows [N, 4, 77] into them, known [N, 4, 77] bool)."""
    tokenizer = Tokenizer()
    ids = []
    for name, style in zip(names, styles, strict=True):
        subject = name.replace("-", " ")
        plain = tokenizer(f"emoji of {subject}")[0]
        strange = torch.cat([plain[:1], torch.full((3,), UNKNOWN), plain[1:-3]])
        ids += [tokenizer(f"{style} emoji of {subject}")[0], plain, strange, tokenizer("")[0]]
    ids = torch.stack(ids)
    seen = torch.tensor(sorted(set(ids.flatten().tolist()) - {UNKNOWN}))
    where = torch.zeros(UNKNOWN + 1000, dtype=torch.long)
    where[seen] = torch.arange(len(seen))
    return seen, where[ids].view(-1, len(SHARES), 77), (ids != UNKNOWN).view(-1, len(SHARES), 77)


class World:
    """UNet and text encoder, with their data on the device."""

    def __init__(self, names: np.ndarray, styles: np.ndarray) -> None:
        self.seen, rows, known = captions(names, styles)
        self.rows, self.known = rows.to(DEVICE), known.to(DEVICE, HALF)
        self.latents = torch.randn(len(rows), *LATENT, device=DEVICE)
        self.spread = torch.zeros_like(self.latents)
        self.unet = make_unet().to(DEVICE, HALF, memory_format=torch.channels_last)
        self.text = Text(self.seen).to(DEVICE, HALF)
        self.alphas = scaled_linear(0.00085, 0.012, 1000).to(DEVICE)
        self.masters = Masters([*self.unet.parameters(), *self.text.parameters()], weight_decay=1e-3, average=0.9995)
        self.loss = torch.zeros((), device=DEVICE)
        self._shares = torch.tensor(SHARES, device=DEVICE).cumsum(0)
        self._error = self.error

    def compile(self) -> None:
        self._error = torch.compile(self.error, dynamic=False)

    def error(self, noisy: Tensor, t: Tensor, noise: Tensor, rows: Tensor, known: Tensor) -> Tensor:
        """Each sample's epsilon error [B]."""
        out = self.unet(noisy, t, encoder_hidden_states=self.text(rows, known), return_dict=False)[0].float()
        return (out - noise).square().mean((1, 2, 3))

    def step(self, batch: int) -> None:
        """One update.

        The weights, relative to the error of the picture itself, are min-SNR's (gamma 5; Hang et al. 2023,
        arXiv:2303.09556) plus a little at the noisy end, where an icon gets its colors.
        """
        index = torch.randint(len(self.latents), (batch,), device=DEVICE)
        kind = torch.searchsorted(self._shares, torch.rand(batch, device=DEVICE)).clamp(max=EMPTY)
        spaced = torch.arange(batch, device=DEVICE) + torch.rand(batch, device=DEVICE)
        t = (spaced * (1000 / batch)).long().clamp(max=999)
        x0 = self.latents[index] + self.spread[index] * torch.randn_like(self.latents[index])
        noise = torch.randn_like(x0)
        a = self.alphas[t].view(-1, 1, 1, 1)
        noisy = (a.sqrt() * x0 + (1 - a).sqrt() * noise).to(HALF).contiguous(memory_format=torch.channels_last)
        error = self._error(noisy, t, noise, self.rows[index, kind], self.known[index, kind])
        snr = self.alphas[t] / (1 - self.alphas[t])
        (error * (snr.clamp(max=5) + 0.15) / snr).mean().backward()
        self.masters.step()
        self.loss.lerp_(error.detach().mean(), 0.01)

    def save(self, out: Path) -> None:
        """fp16 parts under diffusers' and transformers' names, each moved into place when whole."""
        names = (
            [name for name, _ in self.unet.named_parameters()],
            [name for name, _ in self.text.named_parameters()],
        )
        cut = len(names[0])
        for part in PARTS:
            tensors = self.masters.average if part.endswith("average") else self.masters.values
            half, keys = (tensors[:cut], names[0]) if part.startswith("unet") else (tensors[cut:], names[1])
            state = {name: tensor.half().cpu() for name, tensor in zip(keys, half, strict=True)}
            split = len(state) // 2
            items = list(state.items())
            for number, piece in enumerate((items[:split], items[split:]) if cut == len(keys) else (items,)):
                path = out / f"{part}-{number}.pt"
                torch.save(dict(piece) | ({"seen": self.seen} if part == "text-average" else {}), path)

    def load(self, folder: Path) -> None:
        values, average = (
            [t for name in ("unet", "text") for t in read_part(folder, f"{name}-{kind}").values()]
            for kind in ("values", "average")
        )
        self.masters.restore(values, average)

    @torch.no_grad()
    def averaged(self) -> tuple[torch.nn.Module, torch.nn.Module]:
        """(UNet, text encoder) in fp32 with the averaged weights, to draw with."""
        unet, text = make_unet().to(DEVICE), Text(self.seen).to(DEVICE)
        torch._foreach_copy_([p.data for p in [*unet.parameters(), *text.parameters()]], self.masters.average)
        return unet, text


def read_part(folder: Path, part: str) -> dict[str, Tensor]:
    """The tensors of `part` in order, without `seen`."""
    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob(f"{part}-*.pt")):
        state |= torch.load(path, weights_only=True)
    state.pop("seen", None)
    return state


@torch.no_grad()
def encode(vae: torch.nn.Module, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """(means, standard deviations) of the pictures' scaled latents."""
    found = [vae.encode(pixels(part)).latent_dist for part in pictures.split(64)]
    return torch.cat([p.mean for p in found]) * SCALE, torch.cat([p.std for p in found]) * SCALE


def captured(world: World, batch: int) -> Callable[[], None]:
    """The compiled step as a CUDA graph, with the moments of its warm-up forgotten."""
    if CUDA:
        world.compile()
    step = graphed(lambda: world.step(batch))
    for state in world.masters.adam.state.values():
        torch._foreach_zero_(list(state.values()))
    return step


def wait_for(file: Path) -> dict[str, Tensor]:
    """The VAE may still be training beside us while we compile."""
    while not file.exists():
        time.sleep(1)
    return torch.load(file, weights_only=True, map_location=DEVICE)


def main(icons: Path, vae_file: Path, out: Path, options: list[str]) -> None:
    began = time.time()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    seconds, shares = float(options[0]), (float(options[1]), float(options[2]))
    torch.manual_seed(round(1000 * shares[0]))
    out.mkdir(parents=True, exist_ok=True)
    data = np.load(icons)
    shared = data["shared"]
    pictures = torch.from_numpy(data["pictures"][shared]).permute(0, 3, 1, 2).contiguous().to(DEVICE)
    world = World(data["names"][shared], data["styles"][shared])
    if len(options) > 4:
        world.load(Path(options[4]))
    step = captured(world, int(options[3]) if len(options) > 3 else 256)
    print(f"ready after {time.time() - began:.0f} s", flush=True)
    vae = make_vae().to(DEVICE).eval().requires_grad_(False)
    vae.load_state_dict(wait_for(vae_file))
    for kept, found in zip((world.latents, world.spread), encode(vae, pictures), strict=True):
        kept.copy_(found)
    print(f"latents std {world.latents.std():.3f}, of one picture {world.spread.mean():.3f}", flush=True)
    saves = [0.25, 0.5, 0.75]

    def report(count: int, elapsed: float) -> None:
        print(f"{count} steps {elapsed:.0f} s loss {world.loss.item():.4f} ms {1000 * elapsed / count:.2f}", flush=True)
        if saves and elapsed > saves[0] * seconds:
            saves.pop(0)
            world.save(out)

    count = train(step, world.masters.rate, seconds, peak=PEAK_RATE, shares=shares, report=report)
    report(count, seconds)
    world.save(out)
    draw_sheet(world, vae, pictures, out / "sheet.png")
    print(f"done after {time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
