"""Families by kinds of adapters, the same rows and columns with a WebUI and without one.

`goldens.json` beside it holds what the WebUI's networks answered with a LoRA file of each cell, for the tests that have
no WebUI: RECORD_GOLDENS=1 writes what a WebUI answers now.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from benchmarks.ldm import Shapes
from lora_trainer.adapters.save import assemble
from lora_trainer.config import build
from lora_trainer.hosts.standalone import open_model
from lora_trainer.models.model import Model
from lora_trainer.sampling import conditions
from lora_trainer.training.output import _kohya
from lora_trainer.training.segment import open_segment
from tests.webui.families import (
    UNET_SSD,
    shapes_1,
    shapes_2,
    shapes_refiner,
    shapes_xl,
    tensors,
    write_1,
    write_2,
    write_inpainting,
    write_refiner,
    write_xl,
)

GOLDENS = Path(__file__).parent / "goldens.json"
V_KEYS = ("v_pred", "ztsnr")
_BY_HEAD: Mapping[str, Any] = {"num_head_channels": 32}


@dataclass(frozen=True)
class Family:
    """A row: `write` puts a checkpoint into a WebUI's folder, for `clip`'s text encoder; `shapes` are those of its
    tensors, and our own reader wants `heads` and what is predicted in a YAML."""

    write: Callable[[Path, str, Path], None]
    shapes: Callable[[], Shapes]
    heads: Mapping[str, Any] = field(default_factory=lambda: _BY_HEAD)
    predicts: str = "eps"

    def checkpoint(self, folder: Path) -> Path:
        """The same as `write` makes, for a reader of ours."""
        path = folder / "tiny.safetensors"
        save_file(tensors(self.shapes()), path)
        said = {"parameterization": self.predicts, "unet_config": {"params": dict(self.heads)}}
        path.with_suffix(".yaml").write_text(yaml.safe_dump({"model": {"params": said}}))
        return path


FAMILIES = {
    "1.x": Family(write_1, shapes_1, {"num_heads": 4}),
    "1.x for inpainting": Family(write_inpainting, partial(shapes_1, 9), {"num_heads": 4}),
    "2.x, noise": Family(lambda folder, name, clip: write_2(folder, name), shapes_2),
    "2.x, v": Family(lambda folder, name, clip: write_2(folder, name, v=True), shapes_2, predicts="v"),
    "SDXL, noise": Family(write_xl, shapes_xl),
    "SDXL, v": Family(partial(write_xl, v=True, keys=V_KEYS), shapes_xl, predicts="v"),
    "SSD-1B": Family(partial(write_xl, unet=UNET_SSD), partial(shapes_xl, UNET_SSD)),
    "SDXL's refiner": Family(lambda folder, name, clip: write_refiner(folder, name), shapes_refiner),
}
_CONV = {"conv_rank": 2, "train_text_encoder": True}
# Settings by column.
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"adapter": "lora", "train_text_encoder": True},
    "LoCon": {"adapter": "lora", **_CONV},
    "DoRA": {"adapter": "dora", **_CONV},
    "LoHa": {"adapter": "loha", **_CONV},
    "LoKr": {"adapter": "lokr", **_CONV},
    "IA³": {"adapter": "ia3", **_CONV},
    "OFT": {"adapter": "oft", **_CONV},
}


def made(checkpoint: Path, kind: str) -> tuple[bytes, list[float]]:
    """A LoRA file of `kind` for `checkpoint`, whose numbers are made and not learned, and `answer_of` the networks that
    they would be trained in."""
    settings = {"base_model": "x", "train_data_dir": "x", "mixed_precision": "no", "lora_rank": 4}
    settings |= {"loraplus_lr_ratio": 1}
    model = open_model(checkpoint, torch.device("cpu"))
    with open_segment(build(settings, KINDS[kind]), model, None) as segment:
        for slot in segment.trainables.slots:
            part = slot.of(segment.trainables.masters)
            wave = torch.arange(part.numel(), dtype=torch.float64).mul(1.7).add(slot.start).sin()
            part.add_(wave.view_as(part) * 0.2)
        segment.working.refresh()
        return assemble(_kohya(segment), {}), answer_of(model)


def layout(data: bytes) -> str:
    """A digest of the names, dtypes and shapes in a file."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    held = sorted((name, of["dtype"], of["shape"]) for name, of in header.items() if name != "__metadata__")
    return hashlib.sha256(json.dumps(held).encode()).hexdigest()[:16]


@torch.no_grad()
def answer_of(model: Model) -> list[float]:
    """What the WebUI is asked in `snippets.applied_to_any`, of `model`."""
    channels = model.unet.config.in_channels
    x = torch.randn(2, channels, 8, 16, generator=torch.Generator().manual_seed(3))
    prompts = ["noto emoji of red apple", ""]
    out = model.unet(x, torch.tensor([100, 700]), **conditions(model, prompts, (128, 64))).sample
    return out.flatten()[::64].tolist()


def goldens() -> dict[str, dict[str, dict[str, Any]]]:
    """By family and kind: `layout`, `modules`, `answer`."""
    return json.loads(GOLDENS.read_text(encoding="utf-8")) if GOLDENS.exists() else {}


def record(family: str, kind: str, seen: Mapping[str, Any]) -> None:
    known = goldens()
    known.setdefault(family, {})[kind] = dict(seen)
    lines = ",\n".join(
        f" {json.dumps(name)}: {{\n"
        + ",\n".join(f"  {json.dumps(k, ensure_ascii=False)}: {json.dumps(v)}" for k, v in sorted(by.items()))
        + "\n }"
        for name, by in sorted(known.items())
    )
    GOLDENS.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
