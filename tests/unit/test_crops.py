"""Pictures at several sizes, in several parts and mirrored: encoded once, drawn by visit, and shown on a sheet."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from lora_trainer.cli import main
from lora_trainer.config import build
from lora_trainer.config.options import options
from lora_trainer.dataset.crops import Sizes, views
from lora_trainer.doctor.crops import described
from lora_trainer.errors import ConfigError
from lora_trainer.events import Started, StepDone, Validated
from lora_trainer.models.latents import posterior, to_tensor
from lora_trainer.training.step import Batch, with_sizes
from tests.unit.test_caption_rules import feed_of, told
from tests.unit.test_resume import Run, at_step
from tests.unit.test_run import of, train, weights

ALL = {"extra_resolutions": [64], "crop": "random", "crops_per_image": 3, "flip": True}


@pytest.fixture
def wide(settings, pictures) -> dict:
    """Two pictures larger than their buckets among the six."""
    for number in (1, 4):
        values = np.random.default_rng(number).integers(0, 255, (100, 160, 3), dtype=np.uint8)
        Image.fromarray(values).save(pictures / f"p{number}.png")
    return settings


# --- settings


def test_a_list_of_sizes_as_people_write_it(settings):
    for written in ([512, 768], "512,768", "512, 768", ["512", 768.0]):
        assert build(settings, {"extra_resolutions": written}).extra_resolutions == [512, 768]
    assert build(settings, {"extra_resolutions": 768}).extra_resolutions == [768]
    assert options()["extra_resolutions"].expected == "a list of whole numbers from 64 to 4096 in steps of 64"
    for wrong in ([500], ["much"], [True], "512;768", [32]):
        with pytest.raises(ConfigError, match="extra_resolutions: expected a list of whole numbers from 64 to 4096"):
            build(settings, {"extra_resolutions": wrong})


# --- samples


def test_each_size_of_a_picture_is_a_sample_and_each_part_a_view(wide):
    _, data, _ = feed_of(wide, **ALL)
    found = {}
    for sample in data.samples:
        found.setdefault(sample.item.path.stem, {})[sample.bucket.width, sample.bucket.height] = sample
        assert len(sample.latents) == len(sample.sizes)
    # Of 64 × 64 pixels the second size is the first one again.
    for small in ("p0", "p2", "p3"):
        assert {size: len(sample.latents) for size, sample in found[small].items()} == {(64, 64): 2}
    # Of 160 × 100 and 128 × 64 pixels. What is cut off lies above and below, or left and right.
    for large in ("p1", "p4"):
        assert {size: len(sample.latents) for size, sample in found[large].items()} == {(128, 64): 6, (64, 64): 6}
        told = found[large][128, 64].sizes.tolist()
        assert [row[2:4] for row in told] == [[8, 0], [8, 0], [0, 0], [0, 0], [16, 0], [16, 0]]
        assert {(*row[:2], *row[4:]) for row in told} == {(100, 160, 64, 128)}
    assert found["p5"][64, 64].sizes[:, 3].tolist() == [32, 32, 0, 64, 64, 0]
    assert data.images == 6
    assert len(data.samples) == 9


def test_a_view_is_what_the_vae_makes_of_that_part(wide, monkeypatch):
    """Mirrored pictures are encoded, not mirrored latents."""
    from lora_trainer.training import data as module

    monkeypatch.setattr(module.randomness, "normal", lambda seed, purpose, visits, shape: torch.zeros(1, *shape))
    _, data, model = feed_of(wide, crop="random", crops_per_image=3, flip=True)
    sample = max(data.samples, key=lambda sample: len(sample.latents))
    with Image.open(sample.item.path) as image:
        images = [view.of(image) for view in views(image, Sizes(128, crop="random", crops=3, flip=True))]
    expected = torch.cat([posterior(model.vae, to_tensor(image)).mean for image in images])
    torch.testing.assert_close(sample.latents, expected * model.vae.config.scaling_factor)
    plain, mirrored = sample.latents[:2]
    assert not torch.allclose(plain.flip(-1), mirrored, atol=1e-3)


def test_every_view_is_seen_and_an_epoch_has_each_sample_once(wide):
    feed, data, _ = feed_of(wide, **ALL)
    stream, seen = feed.updates(0), set()
    for _ in range(40):
        counted = Counter()
        for _ in range(feed.steps_per_epoch):
            update = next(stream)
            for batch, made in zip(update.batches, feed.batches(update), strict=True):
                counted.update(index for index, weight in zip(batch.indices, batch.weights, strict=True) if weight)
                for index, latents in zip(batch.indices, made.latents, strict=True):
                    sample = data.samples[index]
                    (view,) = [at for at, mine in enumerate(sample.latents) if torch.equal(mine, latents)][:1]
                    seen.add((index, view))
        assert counted == Counter(range(len(data.samples)))
    assert seen == {(index, view) for index, sample in enumerate(data.samples) for view in range(len(sample.latents))}


@pytest.mark.parametrize("pooled", [None, torch.zeros(1, 4)])
def test_sizes_go_with_families_that_are_told_them(pooled):
    sizes = torch.tensor([[100, 160, 0, 3, 64, 128]])
    rows = with_sizes({"context": torch.zeros(1, 77, 4), "pooled": pooled}, sizes)
    nothing = torch.zeros(1, 4, 8, 16)
    told = Batch(nothing, nothing, *torch.zeros(3, 1), **rows).condition()["added_cond_kwargs"]
    assert (told is None) == (pooled is None)
    assert told is None or (told["time_ids"].dtype, told["time_ids"].tolist()) == (torch.float32, sizes.tolist())


# --- runs


def test_a_killed_run_goes_on_with_the_same_parts(wide, tmp_path):
    cached = {"cache_dir": str(tmp_path / "cache")}
    expected = Run(wide | {"output_dir": str(tmp_path / "other")})(**ALL)
    job = Run(wide | cached)
    job.killed(at_step(4), **ALL)
    # What is on the disk now, and in memory alone before, is the same.
    assert weights(job(**ALL)) == weights(expected)


def test_a_second_run_reads_every_size_and_part_from_the_cache(wide, tmp_path, monkeypatch):
    from lora_trainer.dataset import pictures

    asked, real = [], pictures.posterior
    monkeypatch.setattr(pictures, "posterior", lambda *given: asked.append(1) or real(*given))
    changes = ALL | {"cache_dir": str(tmp_path / "cache"), "max_train_steps": 1}
    first, _ = train(wide, **changes)
    encoded = len(asked)
    second, _ = train(wide, **changes)
    assert encoded > 12
    assert len(asked) == encoded
    assert of(first, StepDone)[0].loss == of(second, StepDone)[0].loss
    # A size that is there already is not encoded again.
    train(wide, **changes | {"extra_resolutions": []})
    assert len(asked) == encoded


def test_held_out_pictures_are_seen_whole_and_once(wide):
    still = {"validation_split": 0.34, "max_train_steps": 1}
    (base, *_), (other, *_) = (of(train(wide, **still, **rule)[0], Validated) for rule in (ALL, {}))
    assert base.base == other.base


def test_log_and_header_count_pictures_once(wide):
    events, data = train(wide, **ALL, max_train_steps=1)
    assert of(events, Started)[0].images == 6
    assert told(events, "pictures: 6, seen 9 times an epoch, as 38 sizes, parts and mirrorings")
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    assert header["ss_flip_aug"] == header["ss_random_crop"] == "True"
    assert json.loads(header["ss_dataset_dirs"])["pictures"]["img_count"] == 6
    assert json.loads(header["lora_trainer_config"])["extra_resolutions"] == [64]


# --- the sheet


def test_the_sheet_shows_every_picture(wide, pictures, tmp_path, capsys):
    (pictures / "bad.png").write_bytes(b"x")
    out = tmp_path / "crops.png"
    changes = ["crop=random", "--flip", "extra_resolutions=[64]", "resolution=128"]
    assert main(["crops", f"train_data_dir={pictures}", "--out", str(out), *changes]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    with Image.open(out) as sheet:
        assert sheet.size == (6 * 186 + 10, 2 * 222 + 10)
    assert main(["crops", f"train_data_dir={pictures}", "--out", str(tmp_path / "crops.gif")]) == 2
    assert main(["crops", f"train_data_dir={tmp_path / 'none'}"]) == 2


def test_what_is_kept_is_bright_and_what_is_cut_off_dark(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (1400, 512), "white").save(folder / "a.png")
    assert main(["crops", f"train_data_dir={folder}", "--out", str(tmp_path / "s.png")]) == 0
    with Image.open(tmp_path / "s.png") as sheet:
        middle = 10 + 88
        row = [sum(sheet.getpixel((10 + x, middle))) for x in range(176)]
    bright = [x for x, value in enumerate(row) if value > 700]
    assert bright[0] > 8
    assert bright[-1] < 168
    assert row[2] < 300


def test_a_view_in_words():
    image = Image.new("L", (1400, 512))
    assert described(views(image, Sizes(512))) == "768x320 -12%"
    assert described(views(image, Sizes(512, crop="random", crops=5, flip=True))) == "768x320 -12% 5 parts mirrored"
    assert described(views(Image.new("L", (512, 512)), Sizes(512))) == "512x512"
