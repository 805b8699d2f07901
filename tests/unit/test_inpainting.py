"""Checkpoints for inpainting: what they are shown in training, what they draw, and the LoRAs that come out."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lora_trainer import sampling
from lora_trainer.config import build
from lora_trainer.dataset.holes import HOLES, holes
from lora_trainer.errors import ModelError
from lora_trainer.events import Notice, StepDone
from lora_trainer.hosts.standalone import open_model
from lora_trainer.models.inpainting import TOLD, blank
from lora_trainer.models.latents import posterior, to_tensor
from lora_trainer.sampling import Recipe
from lora_trainer.training import data
from lora_trainer.training.feed import Feed
from lora_trainer.training.precision import Precision
from lora_trainer.training.segment import open_segment
from tests.tiny import tiny_state
from tests.unit.test_run import of, train

CPU = torch.device("cpu")
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
SIZE = (96, 64)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inpainting") / "holes.safetensors"
    state = tiny_state()
    more = torch.randn(32, 5, 3, 3, generator=torch.Generator().manual_seed(1)) / 45**0.5
    save_file(state | {CONV_IN: torch.cat([state[CONV_IN], more], dim=1)}, path)
    return path


@pytest.fixture
def inpainting(settings, base) -> dict:
    return {**settings, "base_model": str(base), "resolution": 64, "epochs": 1}


def loaded(settings, model, **changes):
    config = build(settings, changes)
    sink = [].append
    return config, data.load(data.find(config, sink), config, model, sink=sink)


# --- holes


def test_holes_are_the_pictures_own():
    drawn = holes("p1.png", 2, SIZE)
    assert (drawn.shape, drawn.dtype) == ((2 * HOLES, 64, 96), torch.bool)
    assert torch.equal(drawn, holes("p1.png", 2, SIZE))
    assert not torch.equal(drawn, holes("p2.png", 2, SIZE))
    assert [bool(mask.all()) for mask in drawn] == [True, False, False, False] * 2
    assert len({mask.numpy().tobytes() for mask in drawn}) == 2 * HOLES - 1


def test_some_are_strokes_and_some_boxes_and_about_a_third_of_a_picture():
    drawn = torch.cat([holes(str(number), 1, (512, 512))[1:] for number in range(60)])
    shares = drawn.float().mean(dim=(1, 2))
    assert 0.2 < shares.mean() < 0.5
    assert shares.min() > 0
    # Up to four boxes leave few kinds of rows, a stroke's round ends many.
    straight = sum(len({row.numpy().tobytes() for row in mask}) <= 2 * 4 + 1 for mask in drawn)
    assert 0.3 < straight / len(drawn) < 0.7


# --- what is shown


def test_a_picture_is_shown_with_its_holes(inpainting, base, pictures):
    model = open_model(base, CPU)
    _, loaded_data = loaded(inpainting, model, resolution=64)
    sample = next(s for s in loaded_data.train.samples if s.item.path.name == "p1.png")
    assert sample.shown.shape == (1, HOLES, 5, 8, 8)
    drawn = holes("p1.png", 1, (64, 64))
    pixels = to_tensor(Image.open(pictures / "p1.png"))
    for mask, shown in zip(drawn, sample.shown[0], strict=True):
        assert torch.equal(shown[0], mask[::8, ::8].float())
        latents = posterior(model.vae, pixels * ~mask).mean * model.vae.config.scaling_factor
        torch.testing.assert_close(shown[1:], latents[0])
    torch.testing.assert_close(sample.shown[0, 0], blank(model.vae, 8, 8)[0])


def test_the_latents_are_those_of_a_run_without_holes(inpainting, checkpoint, base):
    _, with_holes = loaded(inpainting, open_model(base, CPU))
    _, without = loaded(inpainting, open_model(checkpoint, CPU))
    for one, other in zip(with_holes.train.samples, without.train.samples, strict=True):
        assert torch.equal(one.latents, other.latents)
        assert other.shown is None


def test_the_cache_gives_the_same(inpainting, base, tmp_path):
    model = open_model(base, CPU)
    cached = {"cache_dir": str(tmp_path / "cache"), "crop": "random", "crops_per_image": 2, "flip": True}
    _, first = loaded(inpainting, model, **cached)
    model.vae.encode = None
    _, second = loaded(inpainting, model, **cached)
    assert first.train.samples[-1].shown.shape[:2] == (4, HOLES)
    for one, other in zip(first.train.samples, second.train.samples, strict=True):
        assert torch.equal(one.shown, other.shown)


def test_a_visit_sees_one_of_them_and_all_are_seen(inpainting, base):
    model = open_model(base, CPU)
    config, prepared = loaded(inpainting, model)
    feed = Feed.of(config, prepared.train, model)
    batches = [batch for step in range(30) for batch in feed.batches(next(feed.updates(step)))]
    whole = torch.cat([batch.shown[:, 0].mean(dim=(1, 2)) == 1 for batch in batches]).float().mean()
    assert 0.1 < whole < 0.4
    assert {tuple(batch.shown.shape[1:]) for batch in batches} >= {(5, 8, 8)}


def test_the_unet_sees_latents_mask_and_picture_in_this_order(inpainting, base):
    model = open_model(base, CPU)
    config, prepared = loaded(inpainting, model, lora_dropout=0, mixed_precision="no")
    feed = Feed.of(config, prepared.train, model)
    batch = next(iter(feed.batches(next(feed.updates(0)))))
    with open_segment(config, model, None) as segment, torch.no_grad():
        predicted = segment.network.predicted(batch)
        noisy = model.noise.add_noise(batch.latents, batch.eps, batch.t)
        asked = torch.cat([noisy, batch.shown], dim=1)
        expected = model.unet(asked, batch.t, encoder_hidden_states=batch.context).sample
        torch.testing.assert_close(predicted, expected)
        without = replace(batch, shown=batch.shown.roll(1, dims=1))
        assert not torch.allclose(segment.network.predicted(without), expected, atol=1e-3)


def test_drawing_from_nothing_shows_nothing(base):
    model = open_model(base, CPU)
    x, t = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    context = model.text.embed("a cat").expand(2, -1, -1)
    with torch.no_grad():
        alone = model.unet(x, t, encoder_hidden_states=context).sample
        shown = torch.cat([x, blank(model.vae, 8, 12).expand(2, -1, -1, -1)], dim=1)
        assert torch.equal(alone, model.unet(shown, t, encoder_hidden_states=context).sample)
    gray = posterior(model.vae, torch.zeros(1, 3, 64, 96)).mean * model.vae.config.scaling_factor
    torch.testing.assert_close(blank(model.vae, 8, 12), torch.cat([torch.ones(1, 1, 8, 12), gray], dim=1))


# --- runs


def test_a_run_teaches_and_its_lora_fits_the_model_it_was_made_from(inpainting, base, checkpoint):
    changes = {"learning_rate": 0.02, "sample_prompts": ["a cat"], "sample_steps": 2, "validation_split": 0.3}
    events, _ = train(inpainting, **changes, measure_drift=True, drift_prompts=["a dog"])
    assert [notice.text for notice in of(events, Notice)].count(TOLD) == 1
    assert all(math.isfinite(step.loss) for step in of(events, StepDone))
    lora = Path(inpainting["output_dir"]) / "tiny.safetensors"
    recipe, precision = Recipe((64, 64), steps=2), Precision(CPU, torch.float32)
    for path in (base, checkpoint):
        model = open_model(path, CPU)
        plain = sampling.denoise(model, "a cat", recipe, precision)
        sampling.apply_lora(model, lora)
        assert not torch.allclose(plain, sampling.denoise(model, "a cat", recipe, precision), atol=1e-3)


def test_pairs_are_refused_before_anything_is_encoded(inpainting, tmp_path):
    originals = shutil.copytree(inpainting["train_data_dir"], tmp_path / "originals")
    pairs = {**inpainting, "mode": "difference", "original_data_dir": str(originals)}
    with pytest.raises(ModelError, match=r"holes\.safetensors is an inpainting checkpoint.*mode difference"):
        train(pairs)
