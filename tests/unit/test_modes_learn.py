"""Sliders and differences on the demo world: what weights from -1 to 1 of their files do, in order.

Icons at 64 px and a few steps, judged at the same noise and timesteps for every weight.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks.styles import write_style
from lora_trainer.config import build
from lora_trainer.demo import WORLD
from lora_trainer.events import Finished
from lora_trainer.hosts.standalone import FileModels
from lora_trainer.sampling import apply_lora
from lora_trainer.training import data
from lora_trainer.training.data import Items
from lora_trainer.training.dropout import LoraDropout, Shares
from lora_trainer.training.objectives import mse
from lora_trainer.training.precision import Precision
from lora_trainer.training.step import Network
from lora_trainer.training.validation import Validator
from tests.unit.test_learns_the_demo import few
from tests.unit.test_masks import silent
from tests.unit.test_run import of, train

WEIGHTS = (-1, 0, 1)
BASE = WORLD / "emoji-world.safetensors"
SETTINGS = {
    "base_model": str(BASE),
    "resolution": 64,
    "batch_size": 2,
    "target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
    "learning_rate": 2e-3,
    "lora_dropout": 0,
    "checkpoint_every": 0,
    "cpu_threads": 1,
    "output_name": "learned",
}


@pytest.fixture(scope="module")
def models() -> FileModels:
    return FileModels(BASE, torch.device("cpu"), torch.float32)


def network_of(model) -> Network:
    cpu = Precision(torch.device("cpu"), torch.float32)
    return Network(model.unet, model.noise, mse, cpu, LoraDropout({}, Shares()))


def test_a_difference_leads_from_the_originals_to_the_pictures(models, tmp_path):
    """Twelve icons in ink and in chalk: the greater the weight, the nearer are three others in chalk, and the nearer to
    chalk than to ink; which is near to the base already, and left behind at 1."""
    folders = {"ink": few(WORLD / "twemoji", tmp_path / "ink", 12)}
    folders["chalk"] = write_style("chalk", folders["ink"], tmp_path / "chalk")
    other = few(WORLD / "twemoji-held-out", tmp_path / "ink-held-out", 3)
    held_out = {"ink": other, "chalk": write_style("chalk", other, tmp_path / "chalk-held-out")}
    given = {**SETTINGS, "output_dir": str(tmp_path / "out")}
    difference = {
        "mode": "difference",
        "original_data_dir": str(folders["ink"]),
        "train_data_dir": str(folders["chalk"]),
    }
    events, _ = train(given, models=models, **difference, max_train_steps=12)
    losses: dict[str, list[float]] = {}
    with models.borrow() as model:
        samples = {}
        for style, folder in held_out.items():
            config = build(given, {"train_data_dir": str(folder)})
            items = Items(data.find(config, silent).train, ())
            samples[style] = data.load(items, config, model, sink=silent).train.samples
        adapter = apply_lora(model, Path(of(events, Finished)[0].output[0]))
        for weight in WEIGHTS:
            with adapter.weight(weight):
                for style, shown in samples.items():
                    losses.setdefault(style, []).append(Validator(shown).loss(network_of(model)))
    assert all(before > 1.01 * after for before, after in pairwise(losses["chalk"])), losses
    ahead = [chalk - ink for chalk, ink in zip(losses["chalk"], losses["ink"], strict=True)]
    assert all(before > 1.1 * after for before, after in pairwise(ahead)), losses
    assert losses["ink"][-1] > 1.05 * losses["ink"][0], losses


def test_a_slider_leads_from_one_prompt_to_the_other(models, tmp_path):
    """How far a prediction has moved from the base's, along the way between the prompts: 0 at weight 0, and at either
    end a fair share of what was asked for."""
    prompts = {"slider_target": "noto emoji", "slider_positive": "fluent emoji", "slider_negative": "outline emoji"}
    given = {**SETTINGS, **prompts, "mode": "slider", "output_dir": str(tmp_path), "slider_guidance": 2}
    events, _ = train(given, models=models, max_train_steps=10, slider_pictures=4, validation_split=0.25)
    (finished,) = of(events, Finished)
    assert finished.validation_lora < 0.8 * finished.validation_base
    config = build(given, {"max_train_steps": 1, "slider_pictures": 2, "seed": 7})
    with models.borrow() as model, torch.no_grad():
        samples = data.load(data.find(config, silent), config, model, sink=silent).train.samples
        network = network_of(model)
        (batch,) = Validator(samples, most=12).batches(1000)
        neutral, positive, negative = (
            network.predicted(seen) for seen in (batch, *map(batch.directed, (batch.positive, batch.negative)))
        )
        way = 2 * (positive - negative)
        adapter = apply_lora(model, Path(finished.output[0]))
        shares = []
        for weight in WEIGHTS:
            with adapter.weight(weight):
                moved = network.predicted(batch) - neutral
            shares.append(((moved * way).sum() / way.square().sum()).item())
    assert shares[1] == 0
    assert shares[0] < -0.2, shares
    assert shares[2] > 0.2, shares
