"""The training that every loop here is measured on: what is trained, on what data, with what loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from benchmarks import models
from lora_trainer.adapters.targets import select

TEXT_MODULES = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
TOKENS, BOS, EOS = 77, 49406, 49407
LEARNING_RATE = 2e-4
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Workload:
    """Rank 8, alpha 16 on the modules kohya targets; `warmup` steps are run and not counted.

    fp16 on a GPU; fp32 on a CPU, which is only good for trying the code.
    """

    family: models.Family = "sd15"
    batch: int = 1
    resolution: int = 512
    dropout: float = 0.0
    checkpointing: bool = False
    train_text_encoder: bool = False
    steps: int = 100
    warmup: int = 15
    device: str = "cuda"

    def __post_init__(self) -> None:
        if self.train_text_encoder and self.family != "sd15":
            raise ValueError("train_text_encoder is measured on sd15 only")

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights, and of what a cache of latents and embeddings holds."""
        return torch.float32 if self.device == "cpu" else torch.float16


@dataclass(frozen=True)
class Networks:
    """The UNet and, where it is trained, the text encoder, each with a PEFT LoRA."""

    unet: nn.Module
    text: nn.Module | None
    noise: DDPMScheduler

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        networks = [self.unet] if self.text is None else [self.unet, self.text]
        return [p for network in networks for p in network.parameters() if p.requires_grad]

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean squared error of the predicted noise; noise and timesteps are drawn on the device."""
        latents = batch["latents"]
        noise = torch.randn_like(latents)
        t = torch.randint(0, self.noise.config.num_train_timesteps, latents.shape[:1], device=latents.device)
        noisy = self.noise.add_noise(latents, noise, t)
        context = batch["context"] if self.text is None else self.text(batch["ids"][:, 0])[0]
        extra = {name: batch[name] for name in ("text_embeds", "time_ids") if name in batch}
        predicted = self.unet(noisy, t, context, added_cond_kwargs=extra or None, return_dict=False)[0]
        return functional.mse_loss(predicted.float(), noise.float())


def load(work: Workload) -> Networks:
    """The frozen networks on their device, still without a LoRA. Raises ValueError for those that learn a flow."""
    if work.family == "sd3":
        raise ValueError("sd3 is measured by benchmarks.step only")
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    text = models.text_encoder(work.device, work.dtype) if work.train_text_encoder else None
    return Networks(models.unet(work.family, work.device, work.dtype), text, schedule)


def add_loras(networks: Networks, work: Workload) -> None:
    """PEFT's LoRA with fp32 parameters in each network, which is then ready to train."""
    targets = {networks.unet: list(select(networks.unet, ["default"]))}
    if networks.text is not None:
        targets[networks.text] = TEXT_MODULES
    for network, modules in targets.items():
        config = LoraConfig(r=8, lora_alpha=16, lora_dropout=work.dropout, target_modules=modules)
        inject_adapter_in_model(config, network)
        for parameter in network.parameters():
            if parameter.requires_grad:
                # PEFT follows the base's fp16, in which small updates would be lost.
                parameter.data = parameter.data.float()
        network.train()


def samples(work: Workload, count: int = 64) -> list[dict[str, Tensor]]:
    """A cache of `count` random latents and text embeddings (or token ids) on the CPU."""
    generator = torch.Generator().manual_seed(models.SEED)
    side = work.resolution // 8

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(work.dtype)

    def sample() -> dict[str, Tensor]:
        sd3 = work.family == "sd3"
        latents = {"latents": normal(16 if sd3 else 4, side, side)}
        if work.train_text_encoder:
            ids = torch.randint(0, BOS, (1, TOKENS), generator=generator)
            ids[:, 0], ids[:, 20:] = BOS, EOS
            return latents | {"ids": ids}
        if work.family == "sd15":
            return latents | {"context": normal(TOKENS, 768)}
        size = float(work.resolution)
        time_ids = torch.tensor([size, size, 0, 0, size, size], dtype=work.dtype)
        return latents | {
            "context": normal(TOKENS, 2048),
            "text_embeds": normal(2048 if sd3 else 1280),
            "time_ids": time_ids,
        }

    return [sample() for _ in range(count)]


def loader(work: Workload) -> DataLoader:
    """Shuffled batches of `samples`."""
    return DataLoader(samples(work), batch_size=work.batch, shuffle=True, drop_last=True)


def forever(batches: DataLoader) -> Iterator[dict[str, Tensor]]:
    """Epoch after epoch."""
    while True:
        yield from batches
