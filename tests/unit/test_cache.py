"""What was encoded once is read back, bit by bit, for as long as nothing that it depends on changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_trainer.dataset import pictures as opening
from lora_trainer.dataset.cache import Cache, key_of
from lora_trainer.dataset.decode import made_ahead
from lora_trainer.events import Progress
from lora_trainer.models.text import TextEncoder
from tests.unit.test_resume import Run, at_step, weights


class Counted:
    """How often the VAE and the text encoder were asked."""

    def __init__(self, monkeypatch) -> None:
        self.pictures = self.captions = 0
        posterior, context = opening.posterior, TextEncoder.context

        def encode(*args):
            self.pictures += 1
            return posterior(*args)

        def read(*args):
            self.captions += 1
            return context(*args)

        monkeypatch.setattr(opening, "posterior", encode)
        monkeypatch.setattr(TextEncoder, "context", read)

    def take(self) -> tuple[int, int]:
        seen, self.pictures, self.captions = (self.pictures, self.captions), 0, 0
        return seen


@pytest.fixture
def counted(monkeypatch) -> Counted:
    return Counted(monkeypatch)


@pytest.fixture
def job(settings, tmp_path) -> Run:
    return Run(settings | {"cache_dir": str(tmp_path / "cache"), "overwrite": True, "epochs": 1})


def test_a_second_run_encodes_nothing_and_comes_to_the_same_bytes(job, counted, tmp_path):
    without = job(resumes=False, cache_dir=None, epochs=1)
    assert counted.take() == (6, 6)
    first = job(resumes=False, epochs=1)
    assert counted.take() == (6, 6)
    second = job(resumes=False, epochs=1)
    assert counted.take() == (0, 0)
    assert weights(first) == weights(second) == weights(without)
    assert not list(tmp_path.rglob("*.tmp"))


def test_an_interrupted_preparation_does_only_the_rest(job, counted):
    job.killed(lambda event: getattr(event, "stage", "") == "encoding images" and event.done == 4)
    assert counted.take() == (4, 4)
    job()
    assert counted.take() == (2, 2)


def test_only_what_has_changed_is_encoded_again(job, counted, pictures):
    job(resumes=False)
    counted.take()
    Image.new("RGB", (64, 64), "red").save(pictures / "p0.png")
    captions = pictures / "metadata.csv"
    captions.write_text(captions.read_text(encoding="utf-8").replace("number 1", "number one"), encoding="utf-8")
    job(resumes=False)
    assert counted.take() == (1, 1)
    job(resumes=False, seed=7)
    assert counted.take() == (0, 0)
    job(resumes=False, clip_skip=2)
    assert counted.take() == (0, 6)
    job(resumes=False, resolution=64)
    assert counted.take() == (6, 0)


def test_a_damaged_entry_is_made_again(job, counted, tmp_path):
    expected = job(resumes=False)
    counted.take()
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-7])
    assert job(resumes=False) == expected
    assert counted.take() == (6, 6)


def test_a_folder_that_cannot_be_written_costs_only_time(job, tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert job(resumes=False)


def test_a_run_that_goes_on_need_not_encode_again(job, counted):
    job.killed(at_step(2), epochs=2)
    counted.take()
    job(epochs=2)
    assert counted.take() == (0, 0)


def test_what_was_used_longest_ago_goes_first(tmp_path):
    import os

    cache = Cache(tmp_path)
    keys = [key_of(number) for number in range(4)]
    for number, key in enumerate(keys):
        cache.put(key, {"x": torch.zeros(100)})
        os.utime(cache._path(key), (number, number))
    assert cache.get(keys[0]) is not None
    size = cache._path(keys[0]).stat().st_size
    cache.trim(2 * size)
    assert [cache.get(key) is not None for key in keys] == [True, False, False, True]
    assert Cache(None).get(keys[0]) is None
    Cache(None).trim()


@pytest.mark.parametrize("count", [0, 1, 3, 100])
def test_made_ahead_keeps_the_order_and_what_was_raised(count):
    def make(number: int) -> int:
        if number == 2:
            raise ValueError(number)
        return -number

    seen = []
    with made_ahead(range(count), make) as made:
        for result in made:
            try:
                seen.append(result())
            except ValueError as error:
                seen.append(error.args[0])
    assert seen == [2 if number == 2 else -number for number in range(count)]


def test_what_is_not_asked_for_is_not_made():
    made: list[int] = []
    with made_ahead(range(10_000), made.append) as results:
        next(results)()
    assert len(made) < 200


def test_paths_of_a_cache_are_no_users_choice_in_the_webui():
    from lora_trainer.hosts.roots import PATH_KEYS

    assert "cache_dir" in PATH_KEYS


class Batched(torch.nn.Module):
    """A VAE on a pretended GPU: it remembers how many pictures came at once, and has room for `room`."""

    def __init__(self, vae, room: int) -> None:
        super().__init__()
        self.vae, self.room, self.batches = vae, room, []
        self.config = vae.config

    def encode(self, pixels):
        self.batches.append(len(pixels))
        if len(pixels) > self.room:
            raise torch.cuda.OutOfMemoryError("simulated")
        return self.vae.encode(pixels)


@pytest.mark.parametrize(("room", "batches"), [(9, [4, 2]), (3, [4, 1, 1, 1, 1, 2]), (1, [4, 1, 1, 1, 1, 2, 1, 1])])
def test_pictures_of_one_size_are_encoded_together_and_one_by_one_where_memory_is_short(
    settings, pictures, monkeypatch, room, batches
):
    from lora_trainer.dataset import prepare as preparing
    from lora_trainer.dataset.crops import Sizes
    from lora_trainer.dataset.items import scan
    from lora_trainer.hosts.standalone import open_model

    (pictures / "p1.png").write_bytes(b"damaged")
    Image.new("RGB", (64, 64)).save(pictures / "p6.png")
    (pictures / "p6.txt").write_text("another", encoding="utf-8")
    model = open_model(Path(settings["base_model"]), torch.device("cpu"))
    items = scan(pictures).items

    def prepared(vae):
        told: list = []
        encoders = preparing.Encoders(vae, model.text.tokens)
        noise = lambda index, view, shape: torch.full((1, *shape), index / 9)  # noqa: E731
        return preparing.prepare(items, encoders, [Sizes(128)], noise=noise, sink=told.append), told

    alone, _ = prepared(model.vae)
    monkeypatch.setattr(preparing, "on_gpu", lambda vae: True)
    monkeypatch.setattr(opening, "on_gpu", lambda vae: True)
    vae = Batched(model.vae, room)
    together, told = prepared(vae)
    assert vae.batches == batches
    assert [event.done for event in told if isinstance(event, Progress)] == [1, 3, 4, 5, 6, 7]
    assert together.skipped == alone.skipped
    assert len(together.skipped) == 1
    for one, other in zip(together.samples, alone.samples, strict=True):
        assert one.item == other.item
        torch.testing.assert_close(one.latents, other.latents, rtol=1e-4, atol=1e-5)
