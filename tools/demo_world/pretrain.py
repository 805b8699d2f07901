"""Pretrain the demo world's UNet and text encoder on one GPU, with the VAE of pretrain_vae.py.

usage: python pretrain.py ICONS.npz VAE.pt OUT SECONDS [sd15|sdxl]

Writes OUT/*.pt now and then (weights and their average in fp16) and sheets of what it draws.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import networks
import networks_sdxl
import numpy as np
import torch
from captions import STRANGE, Captions
from gpu import CUDA, DEVICE, HALF, Masters, graphed, train
from icons import FLAT
from networks import LATENT, make_vae
from pictures import Bank, encode_bank
from sheets import draw_sheet
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))
from lora_trainer.models.noise import scaled_linear

PEAK_RATE, WEIGHT_DECAY, AVERAGE = 8e-4, 5e-2, 0.9995
BATCH = 256 if CUDA else 4
SAVES = 6
FORMS = {"sd15": networks, "sdxl": networks_sdxl}


class World:
    """UNet and text side of a form, with their data on the device."""

    def __init__(self, captions: Captions, bank: Bank, form: ModuleType) -> None:
        self.captions, self.bank, self.form = captions, bank, form
        self.unet = form.make_unet().to(DEVICE, HALF, memory_format=torch.channels_last)
        self.text = form.make_text(captions.seen).to(DEVICE, HALF)
        self.alphas = scaled_linear(0.00085, 0.012, 1000).to(DEVICE)
        parameters = [*self.unet.parameters(), *self.text.parameters()]
        self.masters = Masters(parameters, weight_decay=WEIGHT_DECAY, average=AVERAGE)
        self.loss = torch.zeros((), device=DEVICE)
        self._error = self.error

    def compile(self) -> None:
        self._error = torch.compile(self.error, dynamic=False)

    def error(self, noisy: Tensor, t: Tensor, noise: Tensor, rows: Tensor, known: Tensor) -> Tensor:
        """Each sample's epsilon error [B]."""
        out = self.unet(noisy, t, **self.form.told(self.text(rows, known)), return_dict=False)[0].float()
        return (out - noise).square().mean((1, 2, 3))

    def step(self) -> None:
        """One update.

        The weights, relative to the error of the picture itself, are min-SNR's (gamma 5; Hang et al. 2023,
        arXiv:2303.09556) plus a little at the noisy end, where an icon gets its colors.
        """
        index = torch.randint(len(self.bank.mean), (BATCH,), device=DEVICE)
        spaced = torch.arange(BATCH, device=DEVICE) + torch.rand(BATCH, device=DEVICE)
        t = (spaced * (1000 / BATCH)).long().clamp(max=999)
        x0 = self.bank.draw(index)
        noise = torch.randn_like(x0)
        a = self.alphas[t].view(-1, 1, 1, 1)
        noisy = (a.sqrt() * x0 + (1 - a).sqrt() * noise).to(HALF).contiguous(memory_format=torch.channels_last)
        error = self._error(noisy, t, noise, *self.captions.draw(index))
        snr = self.alphas[t] / (1 - self.alphas[t])
        (error * (snr.clamp(max=5) + 0.15) / snr).mean().backward()
        self.masters.step()
        self.loss.lerp_(error.detach().mean(), 0.01)

    @torch.no_grad()
    def unseen_loss(self, latents: Tensor, subjects: Tensor) -> list[float]:
        """Epsilon errors at eight timesteps for pictures [N, 4, 16, 16] in a style that it never saw."""
        unet, text = self.averaged()
        said = self.form.told(self.said(text, subjects, STRANGE))
        noise = torch.randn(latents.shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
        found = []
        for t in range(63, 1000, 125):
            a = self.alphas[t]
            out = unet(a.sqrt() * latents + (1 - a).sqrt() * noise, t, **said).sample
            found.append((out - noise).square().mean().item())
        return found

    def said(self, text: nn.Module, index: Tensor | list[int], kind: int) -> Any:
        """What the text side, in fp32, says of these pictures' captions of a kind."""
        return text(self.captions.rows[index, kind], self.captions.known[index, kind].float())

    def save(self, out: Path) -> None:
        """The averages in fp16 under diffusers' and transformers' names, each file moved into place when whole."""
        out.mkdir(parents=True, exist_ok=True)
        names = [name for name, _ in self.unet.named_parameters()]
        halves = [tensor.half().cpu() for tensor in self.masters.average]
        unet = dict(zip(names, halves, strict=False))
        text = dict(zip((name for name, _ in self.text.named_parameters()), halves[len(names) :], strict=True))
        cut = len(names) // 2
        pieces = {"unet-average-0": dict(list(unet.items())[:cut]), "unet-average-1": dict(list(unet.items())[cut:])}
        pieces["text-average-0"] = text | {"seen": self.captions.seen}
        for name, piece in pieces.items():
            torch.save(piece, out / f"{name}.tmp")
            (out / f"{name}.tmp").rename(out / f"{name}.pt")

    @torch.no_grad()
    def averaged(self) -> tuple[nn.Module, nn.Module]:
        """(UNet, text encoder) in fp32 with the averaged weights, to draw with."""
        unet, text = self.form.make_unet().to(DEVICE), self.form.make_text(self.captions.seen).to(DEVICE)
        torch._foreach_copy_([p.data for p in [*unet.parameters(), *text.parameters()]], self.masters.average)
        return unet, text


def captured(world: World) -> Callable[[], None]:
    """The compiled step as a CUDA graph, with the moments of its warm-up forgotten."""
    if CUDA:
        world.compile()
    step = graphed(world.step)
    for state in world.masters.adam.state.values():
        torch._foreach_zero_(list(state.values()))
    return step


def wait_for(file: Path) -> dict[str, Tensor]:
    """The VAE may still be training beside us while we compile."""
    while not file.exists():
        time.sleep(1)
    return torch.load(file, weights_only=True, map_location=DEVICE)


def main(icons: Path, vae_file: Path, out: Path, seconds: float, form: str = "sd15") -> None:
    began = time.time()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    data = np.load(icons)
    load = lambda key: torch.from_numpy(data[key]).permute(0, 3, 1, 2).contiguous().to(DEVICE)  # noqa: E731
    pictures = load("pictures")
    styles = list(data["styles"])
    captions = Captions(list(data["names"]), styles, default=[style not in FLAT.values() for style in styles])
    bank = Bank.empty(len(pictures), LATENT)
    world = World(captions, bank, FORMS[form])
    step = captured(world)
    print(f"ready after {time.time() - began:.0f} s", flush=True)
    vae = make_vae().to(DEVICE).eval().requires_grad_(False)
    vae.load_state_dict(wait_for(vae_file))
    encode_bank(bank, vae, pictures)
    unseen = Bank.empty(len(data["unseen"]), LATENT, variants=1)
    encode_bank(unseen, vae, load("unseen"))
    subjects = torch.tensor([captions.first(str(name)) for name in data["unseen_names"]], device=DEVICE)
    print(f"latents std {bank.mean.std():.3f}, of one {bank.std.mean():.3f}; {time.time() - began:.0f} s", flush=True)
    saves = [n / SAVES for n in range(1, SAVES)]

    def keep(name: str) -> None:
        losses = world.unseen_loss(unseen.mean[:, 0].float(), subjects)
        print(f"unseen {sum(losses) / len(losses):.4f}:", *(f"{x:.4f}" for x in losses), flush=True)
        world.save(out / name)
        draw_sheet(world, vae, pictures, out / name / "sheet.png")
        (out / name / "done").touch()

    def report(count: int, elapsed: float) -> None:
        print(f"{count} steps {elapsed:.0f} s loss {world.loss.item():.4f} ms {1000 * elapsed / count:.2f}", flush=True)
        if saves and elapsed > saves[0] * seconds:
            saves.pop(0)
            keep(f"p{SAVES - len(saves) - 1}")

    count = train(step, world.masters.rate, seconds, peak=PEAK_RATE, report=report)
    report(count, seconds)
    keep(f"p{SAVES}")
    print(f"done after {time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]), *sys.argv[5:])
