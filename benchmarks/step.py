"""The product's own step and loop on networks of the real size: time, GPU time and memory.

usage: python -m benchmarks.step [sd15|sdxl|sd3] [key=value ...]

Keys are those of `Workload`, profile=1, webui=1, out=FILE to which the line of JSON is added, for `benchmarks.plot`,
and settings of a run: kernels=plain, gradient_accumulation_steps=4, min_snr_gamma=5, masked_loss=true, adapter=oft.
adapter=all measures every kind in turn, a line each. With base_precision=fp8|int8|nf4 the same is run on the base as it
computes too: `loss_apart` is how far the losses of all steps are from that run's, on average. `base_bytes` is what the
UNet takes.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import torch
from torch import Tensor, nn

from benchmarks import models
from benchmarks.timing import fresh_memory, gaps, machine, peak_reserved, profiler, spread
from benchmarks.workload import LEARNING_RATE, Workload, samples
from lora_trainer.adapters.kinds import KINDS
from lora_trainer.config import Config, build
from lora_trainer.config.sources import parse_overrides
from lora_trainer.models.flow import Flow, shifted
from lora_trainer.models.model import CheckpointHashes, Model, ModelFacts
from lora_trainer.models.noise import NoiseSchedule, scaled_linear
from lora_trainer.models.single_file import UNET, is_kernel, is_matrix
from lora_trainer.models.storage import AUTO, Storage, storage_of
from lora_trainer.models.stored import Stored
from lora_trainer.models.text import ClipEncoder, TextEncoder, Tokenizer
from lora_trainer.training.control import StopOnly
from lora_trainer.training.fit import Loop, fit
from lora_trainer.training.results import Results
from lora_trainer.training.segment import Segment, open_segment
from lora_trainer.training.settings import torch_settings
from lora_trainer.training.step import Batch


@dataclass
class Clock:
    """A lease that nobody else wants; it is asked after each update and notes when."""

    stamps: list[float] = field(default_factory=list)

    @contextmanager
    def hold(self) -> Iterator[None]:
        yield

    def hand_over(self, make_room: object = None) -> bool:
        self.stamps.append(time.perf_counter())
        return True


@dataclass(frozen=True)
class RandomFeed:
    """The interface of `training.feed.Feed` over a cache of random samples: the host's work is what a real run's is.

    `config` says how many batches an update has, and whether they have masks and captions without trigger words."""

    work: Workload
    config: Config | None = None

    def stream(self, first_step: int, *, pinned: bool):  # noqa: ANN201
        cache = samples(self.work)
        generator = torch.Generator().manual_seed(1)
        parts = self.config.gradient_accumulation_steps if self.config else 1
        place = first_step * self.work.batch * parts
        while True:
            batches = []
            for _ in range(parts):
                chosen = [cache[(place + n) % len(cache)] for n in range(self.work.batch)]
                batch = self._batch(chosen, generator, parts)
                batches.append(batch.pinned() if pinned else batch)
                place += self.work.batch
            yield SimpleNamespace(epoch=0), batches

    def _batch(self, chosen: list[dict[str, Tensor]], generator: torch.Generator, parts: int) -> Batch:
        def stacked(name: str) -> Tensor | None:
            return torch.stack([sample[name] for sample in chosen]) if name in chosen[0] else None

        latents = stacked("latents").float()
        masked = self.config is not None and self.config.masked_loss
        preserved = self.config is not None and self.config.preservation_weight > 0
        return Batch(
            latents=latents,
            eps=torch.randn(latents.shape, generator=generator),
            t=torch.randint(0, 1000, latents.shape[:1], generator=generator),
            context=stacked("context"),
            ids=stacked("ids"),
            weight=torch.full(latents.shape[:1], 1 / (len(chosen) * parts)),
            mask_keys=torch.randint(-(2**31), 2**31, (len(chosen), 2), generator=generator, dtype=torch.int32),
            pooled=stacked("text_embeds"),
            sizes=stacked("time_ids"),
            mask=torch.rand(latents[:, :1].shape, generator=generator) if masked else None,
            preserved={"context": stacked("context")} if preserved else None,
        )


def config_of(work: Workload, **changes: object) -> Config:
    return build(
        {
            "base_model": "random",
            "train_data_dir": "random",
            "batch_size": work.batch,
            "lora_rank": 8,
            "lora_dropout": work.dropout,
            "gradient_checkpointing": work.checkpointing,
            "train_text_encoder": work.train_text_encoder,
            "mixed_precision": "no" if work.device == "cpu" else "fp16",
            "learning_rate": LEARNING_RATE,
        },
        changes,
    )


def model_of(work: Workload, *, webui: bool = False, storage: str = AUTO) -> Model:
    """The random UNet as a run borrows it, and the text encoder where it is trained; nothing here encodes ahead.

    With `webui` its kernels lie as in a WebUI, whose tensors are not ours to lay out anew. `storage`: its
    base_precision."""
    device = torch.device(work.device)
    flow = work.family == "sd3"
    noise = Flow(shifted(3.0)) if flow else NoiseSchedule(scaled_linear(0.00085, 0.012, 1000), "epsilon")
    facts = ModelFacts("random", None, device, work.dtype, CheckpointHashes)
    clip = models.text_encoder(device, work.dtype) if work.train_text_encoder else None
    text = clip and TextEncoder(Tokenizer(), (ClipEncoder(clip),))
    unet = models.unet(work.family, device, work.dtype)
    if device.type == "cuda" and not webui:
        for weight in filter(is_kernel, unet.parameters()):
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    store(unet, storage_of(storage, device))
    return Model(unet, text, None, noise.to(device), facts)


def store(unet: nn.Module, storage: Storage | None) -> None:
    """The matrices of `unet` in `storage`, as `single_file.place` has them."""
    for module_name, module in unet.named_modules() if storage else ():
        weight = getattr(module, "weight", None)
        if weight is not None and is_matrix(f"{UNET}{module_name}.weight", weight):
            module.weight = nn.Parameter(Stored.encode(weight.detach(), storage), requires_grad=False)


def bytes_of(unet: nn.Module) -> int:
    """What the weights of `unet` take."""
    return sum(w.stored_bytes if isinstance(w, Stored) else w.numel() * w.element_size() for w in unet.parameters())


def measure(work: Workload, *, profiled: bool = False, webui: bool = False, **changes: object) -> dict:
    """Step times of the product's loop, of its graphs alone, and peak memory."""
    config, clock, losses = config_of(work, **changes), Clock(), []
    model = model_of(work, webui=webui, storage=config.base_precision)
    fresh_memory()
    began = time.perf_counter()
    steps = work.warmup + work.steps
    with torch_settings(None), open_segment(config, model, None) as segment:
        results = Results(segment.update.result, steps, lambda event: losses.append(event.loss), window=10)
        boundary = SimpleNamespace(due=lambda step: False)
        loop = Loop(RandomFeed(work, config), segment, lambda step: LEARNING_RATE, boundary, results)
        fit(loop, first_step=0, lease=clock, control=StopOnly())
        report = spread(gaps([*clock.stamps, time.perf_counter()][work.warmup :]))
        report |= {
            "first_step_s": round(clock.stamps[0] - began, 2),
            "graphs_ms": replayed(segment),
            "peak_reserved_bytes": peak_reserved(),
            "base_bytes": bytes_of(model.unet),
            "loss": results.mean_loss,
            "losses": losses,
            "bad": results.bad_in_a_row,
            "told": segment.tier.notices,
        }
        if profiled:
            report["kernels"] = kernels(segment)
    return report


def replayed(segment: Segment, times: int = 30) -> float | None:
    """Milliseconds a step of the captured graphs, launched back to back."""
    graphs = segment.captures._graphs
    if not graphs:
        return None
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(times):
        for graph in graphs.values():
            graph.replay()
    last.record()
    last.synchronize()
    return round(first.elapsed_time(last) / times, 3)


def kernels(segment: Segment, top: int = 28) -> list[str]:
    """Where the time of one step goes: milliseconds, launches, name."""
    with profiler() as record:
        for graph in segment.captures._graphs.values():
            graph.replay()
        torch.cuda.synchronize()
    total, count = Counter(), Counter()
    for event in record.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = event.name[:90]
            total[name] += (event.time_range.end - event.time_range.start) / 1e3
            count[name] += 1
    lines = [f"{ms:7.3f} {count[name]:5d} {name}" for name, ms in total.most_common(top)]
    return [f"{sum(total.values()):7.3f} {sum(count.values()):5d} all", *lines]


def main(arguments: list[str]) -> None:
    families = [a for a in arguments if a in get_args(models.Family)]
    given = dict(a.split("=", 1) for a in arguments if "=" in a)
    profiled = given.pop("profile", "0") == "1"
    webui = given.pop("webui", "0") == "1"
    out = given.pop("out", None)
    types = {f.name: type(f.default) for f in fields(Workload)}
    values = {k: v == "1" if types[k] is bool else types[k](v) for k, v in given.items() if k in types}
    settings = parse_overrides([f"{k}={v}" for k, v in given.items() if k not in types])
    work = Workload(family=families[0] if families else "sd15", **values)
    runs = [{**settings, "adapter": kind} for kind in KINDS] if settings.get("adapter") == "all" else [settings]
    for run in runs:
        report = measure(work, profiled=profiled, webui=webui, **run)
        lines, losses = report.pop("kernels", []), report.pop("losses", [])
        if run.get("base_precision", AUTO) != AUTO:
            plain = measure(work, webui=webui, **run | {"base_precision": AUTO})["losses"]
            report["loss_apart"] = sum(abs(a - b) / b for a, b in zip(losses, plain, strict=True)) / len(plain)
        facts = {"what": "ours", "at": time.strftime("%Y-%m-%d"), **asdict(work)}
        facts |= {"webui": webui, **run}
        line = json.dumps(facts | report | machine())
        print(line, flush=True)
        if out:
            with Path(out).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
