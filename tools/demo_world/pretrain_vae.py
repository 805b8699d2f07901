"""Pretrain the demo world's VAE on one GPU.

usage: python pretrain_vae.py ICONS.npz VAE.pt SECONDS [FROM.pt]
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import torch
from gpu import CUDA, DEVICE, HALF, Masters, graphed, train
from networks import SCALE, make_vae
from torch import Tensor, nn

KL_WEIGHT = 1e-3
BATCH = 64 if CUDA else 2


def pixels(pictures: Tensor) -> Tensor:
    """uint8 to -1 … 1."""
    return pictures.float().div(127.5).sub(1)


def pretrain(pictures: Tensor, seconds: float, start: Path | None) -> nn.Module:
    """Absolute and squared error, edges (flat icons live by them), a small KL. `pictures` [N, 3, 128, 128] uint8."""
    vae = make_vae().to(DEVICE, memory_format=torch.channels_last)
    if start is not None:
        vae.load_state_dict(torch.load(start, weights_only=True, map_location=DEVICE))
    masters = Masters(vae.parameters(), weight_decay=1e-4, average=0.999)
    seen = torch.zeros(3, device=DEVICE)

    def step() -> None:
        index = torch.randint(len(pictures), (BATCH,), device=DEVICE)
        x = pixels(pictures[index]).contiguous(memory_format=torch.channels_last)
        with torch.autocast(DEVICE.type, HALF, enabled=CUDA, cache_enabled=False):
            posterior = vae.encode(x).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            y = vae.decode(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)).sample.float()
        error = y - x
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        (error.abs().mean() + error.square().mean() + 0.5 * edges + KL_WEIGHT * kl).backward()
        masters.step()
        seen.lerp_(torch.stack([error.detach().square().mean(), edges.detach(), kl.detach()]), 0.05)

    def report(count: int, elapsed: float) -> None:
        square, edges, kl = seen.tolist()
        print(
            f"vae {count} steps {elapsed:.0f} s psnr {10 * math.log10(4 / square):.2f} edges {edges:.4f} kl {kl:.2f}",
            flush=True,
        )

    count = train(graphed(step), masters.rate, seconds, peak=1.5e-3, report=report)
    report(count, seconds)
    torch._foreach_copy_([p.data for p in masters.parameters], masters.average)
    return vae.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)


@torch.no_grad()
def normalize(vae: nn.Module, pictures: Tensor) -> None:
    """Fold the latents' mean and spread into the 1×1 convolutions: Stable Diffusion's factor then fits exactly."""
    means = torch.cat([vae.encode(pixels(part)).latent_dist.mean for part in pictures.split(64)])
    center, factor = means.mean((0, 2, 3)), 1 / (SCALE * means.std((0, 2, 3)))
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += post.weight[:, :, 0, 0] @ center
    post.weight /= factor.view(1, -1, 1, 1)
    quant.weight[:4] *= factor.view(-1, 1, 1, 1)
    quant.bias[:4] = (quant.bias[:4] - center) * factor
    quant.bias[4:] += 2 * factor.log()


@torch.no_grad()
def psnr(vae: nn.Module, pictures: Tensor) -> float:
    """Mean over pictures of the reconstruction's peak signal-to-noise ratio, in dB."""
    errors = []
    for part in pictures.split(64):
        x = pixels(part)
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        errors.append((y - x).square().mean((1, 2, 3)))
    return (10 * torch.log10(4 / torch.cat(errors))).mean().item()


def main(icons: Path, out: Path, seconds: float, start: Path | None = None) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    data = np.load(icons)
    load = lambda key: torch.from_numpy(data[key]).permute(0, 3, 1, 2).contiguous().to(DEVICE)  # noqa: E731
    pictures = load("pictures")
    vae = pretrain(pictures, seconds, start)
    normalize(vae, pictures)
    print(
        f"psnr {psnr(vae, pictures):.2f} dB; on the style it never saw {psnr(vae, load('unseen')):.2f} dB",
        flush=True,
    )
    partial = out.with_suffix(".tmp")
    torch.save({name: tensor.half().cpu() for name, tensor in vae.state_dict().items()}, partial)
    partial.rename(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), *map(Path, sys.argv[4:5]))
