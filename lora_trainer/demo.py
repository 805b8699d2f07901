"""`lora-trainer demo`: the main job on the bundled world, and the evidence that it worked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from lora_trainer.config import Config, build
from lora_trainer.config.sources import read_file
from lora_trainer.dataset.images import load_image
from lora_trainer.dataset.samples import Sample
from lora_trainer.draw import save_picture
from lora_trainer.errors import DataError
from lora_trainer.events import AnyEvent, EventSink, Finished, Notice, Progress, Saved, StepDone
from lora_trainer.files import publish
from lora_trainer.hosts.standalone import device_of, open_model, train
from lora_trainer.models.model import Model
from lora_trainer.sampling import Recipe, apply_lora, generate
from lora_trainer.sheet import contact_sheet
from lora_trainer.training import data
from lora_trainer.training.data import Items
from lora_trainer.training.dropout import LoraDropout, Shares
from lora_trainer.training.objectives import mse
from lora_trainer.training.precision import Precision
from lora_trainer.training.settings import torch_settings
from lora_trainer.training.step import Network
from lora_trainer.training.validation import Validator

WORLD = Path(__file__).parent.parent / "demo"
COLUMNS = 9
DRAWING_STEPS = 20
# With two threads a step takes two thirds of the time; more do not help kernels this small.
THREADS = 2


@dataclass(frozen=True)
class Evidence:
    """Held-out losses (same images, noise and timesteps), and whether weight 0 is exactly the base."""

    base: float
    lora: float
    shuffled_captions: float
    weight_0_is_base: bool
    training_seconds: float

    @property
    def gain(self) -> float:
        """The share of the base's held-out loss that the LoRA takes away."""
        return 1 - self.lora / self.base


def demo_config(out: Path, **changes: object) -> Config:
    """The demo's YAML with its paths made absolute. Raises DataError when the demo's files are not there."""
    if not (WORLD / "style.yaml").is_file():
        raise DataError(f"{WORLD}: the demo's files are not there; run it from a clone of the repository")
    settings = dict(read_file(WORLD / "style.yaml"))
    for key in ("train_data_dir", "metadata_path", "base_model", "validation_data_dir"):
        settings[key] = str(WORLD / settings[key])
    return build(settings, {"output_dir": str(out), "cpu_threads": THREADS, "overwrite": True}, changes)


def run_demo(out: Path, sink: EventSink) -> Finished:
    """Train on the bundled pictures, then draw the contact sheet and write the report into `out`.

    Raises UserError.
    """
    config = demo_config(out)
    seconds: list[float] = []

    def watch(event: AnyEvent) -> None:
        if isinstance(event, StepDone):
            seconds.append(event.seconds)
        sink(event)

    finished = train(config, watch)
    if finished.state != "done":
        return finished
    with torch_settings(config.cpu_threads):
        evidence, sheet = prove(config, finished, sum(seconds), sink)
    lines = report(evidence, finished)
    save_picture(sheet, out / "sheet.png")
    publish(("\n".join(lines) + "\n").encode(), out / "report.md")
    publish(json.dumps(asdict(evidence) | {"gain": evidence.gain}, indent=2).encode(), out / "report.json")
    for line in lines[2:-2]:
        sink(Notice(text=line))
    for name, kind in (("sheet.png", "sample"), ("report.md", "report")):
        sink(Saved(path=str(out / name), step=finished.steps, kind=kind))
    return finished


def prove(config: Config, finished: Finished, seconds: float, sink: EventSink) -> tuple[Evidence, Image.Image]:
    """Measure and draw with the file as it was written; `seconds` were spent in training steps."""
    device = device_of(config.device)
    model = open_model(Path(config.base_model), device)
    items = data.find(config, lambda event: None).held_out
    samples = data.load(Items(items, ()), config, model, sink=sink).train.samples
    network = Network(model.unet, model.noise, mse, Precision(device, torch.float32), LoraDropout({}, Shares()))
    shown = samples[:: max(1, len(samples) // COLUMNS)][:COLUMNS]
    rows = [("base", _draw(model, shown, sink))]
    adapter = apply_lora(model, Path(finished.output[0]))
    with adapter.weight(0.0):
        exact = _draw(model, shown[:1], sink)[0].tobytes() == rows[0][1][0].tobytes()
    with adapter.weight(0.5):
        rows.append(("LoRA\nat 0.5", _draw(model, shown, sink)))
    rows.append(("LoRA\nat 1.0", _draw(model, shown, sink)))
    rows.append(("real icons\n(held out)", [load_image(sample.item.path) for sample in shown]))
    sink(Progress(stage="shuffling captions", done=0, total=1))
    evidence = Evidence(
        base=finished.validation_base,
        lora=finished.validation_lora,
        shuffled_captions=Validator(shuffled(samples), most=config.validation_draws).loss(network),
        weight_0_is_base=exact,
        training_seconds=seconds,
    )
    sink(Progress(stage="shuffling captions", done=1, total=1))
    heads = [sample.item.caption.split(" of ", 1)[-1] for sample in shown]
    return evidence, contact_sheet(rows, heads)


def shuffled(samples: Sequence[Sample]) -> list[Sample]:
    """Each picture with the caption of the next one."""
    following = zip(samples, [*samples[1:], samples[0]], strict=True)
    return [replace(sample, text=other.text, tokens=other.tokens) for sample, other in following]


def report(evidence: Evidence, finished: Finished) -> list[str]:
    """The demo's findings, in Markdown."""
    worse = evidence.shuffled_captions / evidence.lora - 1
    return [
        "# Demo report",
        "",
        f"{finished.steps} steps took {evidence.training_seconds:.0f} s; with preparing and validating "
        f"{finished.seconds:.0f} s.",
        "",
        "| held-out loss (64 icons never trained on, fixed noise and timesteps) | |",
        "|---|---|",
        f"| base model | {evidence.base:.4f} |",
        f"| with the LoRA | {evidence.lora:.4f} ({evidence.gain:.1%} lower) |",
        f"| with the LoRA, captions shuffled | {evidence.shuffled_captions:.4f} ({worse:.1%} worse) |",
        "",
        f"With weight 0 the picture is {'bit-identical to' if evidence.weight_0_is_base else 'NOT identical to'} "
        "the base's.",
        "",
        "![base, LoRA at 0.5, LoRA at 1.0, real icons](sheet.png)",
    ]


def _draw(model: Model, samples: Sequence[Sample], sink: EventSink) -> list[Image.Image]:
    bucket = samples[0].bucket
    recipe = Recipe((bucket.width, bucket.height), steps=DRAWING_STEPS)
    precision = Precision(model.facts.device, model.facts.dtype)
    pictures = []
    for sample in samples:
        pictures += generate(model, [sample.item.caption], recipe, precision)
        sink(Progress(stage="drawing", done=len(pictures), total=len(samples)))
    return pictures
