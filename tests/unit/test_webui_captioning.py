"""The WebUI's own interrogators caption in its stand-in, and take turns with whoever else wants the GPU."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_trainer.captioning.words import Words
from lora_trainer.dataset.items import scan
from lora_trainer.errors import ConfigError, DataError, ModelError
from tests.unit.test_webui_jobs import Meanwhile, losses, train, ui, webui_settings  # noqa: F401

COLORS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250)}
TAGS = ["red_thing", "green_thing", "ball_(toy)", "rating:safe", "unwanted"]


@pytest.fixture
def folder(tmp_path) -> Path:
    place = tmp_path / "captioned"
    place.mkdir()
    for name, color in COLORS.items():
        Image.new("RGB", (80, 64), color).save(place / f"{name}.png")
    return place


@pytest.fixture
def files(fake_webui, monkeypatch) -> dict[str, bytes]:
    """What the WebUI's interrogators load, as their authors' servers have it; BLIP's tokenizer is here."""
    monkeypatch.setattr(fake_webui.host("interrogators"), "_tokenizer_is_here", lambda: True)
    head = {"head.weight": torch.tensor([[9.0, -9, -9], [-9, 9, -9], [0, 0, 0], [0, 0, 0], [0, 0, 0]])}
    head["head.bias"] = torch.tensor([-3.0, -3, 1, 5, 5])
    internet = fake_webui("modelloader").internet
    for name, state in (
        ("model_base_caption_capfilt_large.pth", {"colors": torch.eye(3)}),
        ("model-resnet_custom_v3.pt", {**head, "tags": TAGS}),
    ):
        place = fake_webui.data / name
        torch.save(state, place)
        internet[name] = place.read_bytes()
    return internet


@pytest.fixture
def here(fake_webui, files) -> None:
    """They are on this machine."""
    for folder, name in (
        ("BLIP", "model_base_caption_capfilt_large.pth"),
        ("torch_deepdanbooru", "model-resnet_custom_v3.pt"),
    ):
        place = fake_webui.data / "models" / folder
        place.mkdir()
        (place / name).write_bytes(files.pop(name))


@pytest.fixture
def captioning(fake_webui):
    extension = fake_webui.host("extension").Extension()
    yield extension.captioning
    extension.captioning.stop()
    extension.captioning.wait(10)


def captions(folder: Path) -> dict[str, str]:
    return {item.path.stem: item.caption for item in scan(folder).items}


def captioned(captioning, folder, **settings) -> object:
    captioning.caption({"train_data_dir": str(folder), **settings})
    captioning.wait(30)
    assert not captioning.view.active
    return captioning.view


def test_blip_captions_without_clip(fake_webui, captioning, here, folder):
    view = captioned(captioning, folder, captioner="blip", trigger_words="sks")
    assert (view.state, view.done, view.total) == ("done", 3, 3), view
    assert captions(folder) == {color: f"sks, a picture of something {color}" for color in COLORS}
    assert fake_webui("modelloader").downloads == []
    # The WebUI's own object is as it was, and the queue is free.
    interrogator = fake_webui("shared").interrogator
    assert (interrogator.blip_model, interrogator.clip_model, interrogator.dtype) == (None, None, None)
    assert not fake_webui.lock._lock.locked()
    assert fake_webui.state.job == ""


def test_deepbooru_tags_by_our_rules_and_leaves_the_settings_alone(fake_webui, captioning, here, folder):
    opts = fake_webui("shared").opts
    opts.deepbooru_filter_tags, opts.interrogate_deepbooru_score_threshold = "unwanted", 0.999
    before = dict(opts.data)
    view = captioned(captioning, folder, captioner="deepbooru", threshold=0.6, escape=True)
    assert view.state == "done", view
    assert captions(folder) == {
        "red": "red thing, ball \\(toy\\)",
        "green": "green thing, ball \\(toy\\)",
        "blue": "ball \\(toy\\)",
    }
    assert opts.data == before
    model = fake_webui("deepbooru").model.model
    assert not model._forward_hooks
    captioned(captioning, folder, captioner="deepbooru", threshold=0.9, existing="replace", spaces=False)
    assert captions(folder)["red"] == "red_thing"


@pytest.mark.parametrize(
    ("captioner", "file"),
    [("blip", "model_base_caption_capfilt_large.pth"), ("deepbooru", "model-resnet_custom_v3.pt")],
)
def test_nothing_is_downloaded_unasked(fake_webui, captioning, files, folder, captioner, file):
    downloads = fake_webui("modelloader").downloads
    with pytest.raises(ConfigError, match=f"would first download {file}.*tick Download"):
        captioning.caption({"train_data_dir": str(folder), "captioner": captioner})
    assert captioning.downloads(captioner)[0].startswith(file)
    assert (downloads, captioning.view.state) == ([], "idle")
    view = captioned(captioning, folder, captioner=captioner, download=True)
    assert view.state == "done", view
    assert view.log[0].startswith(f"the WebUI downloads {file}")
    assert [Path(url).name for url in downloads] == [file]
    assert captioning.downloads(captioner) == []


def test_a_download_that_fails_is_told(fake_webui, captioning, files, folder):
    files.clear()
    view = captioned(captioning, folder, captioner="blip", download=True)
    assert view.state == "failed"
    assert view.end.startswith("the WebUI's BLIP cannot be loaded: IndexError")
    assert not fake_webui.lock._lock.locked()


def test_blips_tokenizer_counts(fake_webui, captioning, here, folder, monkeypatch):
    interrogators = fake_webui.host("interrogators")
    monkeypatch.setattr(interrogators, "_tokenizer_is_here", lambda: False)
    with pytest.raises(ConfigError, match="tokenizer bert-base-uncased from the Hugging Face hub"):
        captioning.caption({"train_data_dir": str(folder), "captioner": "blip"})


def test_where_blips_tokenizer_is_looked_for(fake_webui, tmp_path, monkeypatch):
    import huggingface_hub.constants
    import transformers.utils.hub

    find = fake_webui.host("interrogators")._tokenizer_is_here
    cache = tmp_path / "hub"
    for module, name in (
        (huggingface_hub.constants, "HF_HUB_CACHE"),
        (transformers.utils.hub, "TRANSFORMERS_CACHE"),
        (transformers.utils.hub, "HF_HUB_CACHE"),
    ):
        monkeypatch.setattr(module, name, str(cache), raising=False)
    assert not find()
    repository = cache / "models--bert-base-uncased"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc" / "vocab.txt").write_text("[PAD]")
    assert find()


def test_a_running_job_is_not_disturbed(fake_webui, ui, webui_settings, here, folder):  # noqa: F811
    """Captions come between its steps; its losses and the model are as without them."""
    undisturbed = losses(train(ui, webui_settings))
    extension = fake_webui.host("extension").Extension()
    before = ui.digest()

    def blip() -> object:
        return captioned(extension.captioning, folder, captioner="blip")

    def deepbooru() -> object:
        return captioned(extension.captioning, folder, captioner="deepbooru", threshold=0.6, existing="append")

    # Each begins to wait while the job has the queue.
    meanwhile = Meanwhile(ui, blip, ui.picture, deepbooru)
    events = train(ui, webui_settings, at=meanwhile)
    first, _, second = meanwhile.wait()
    assert (first.state, second.state) == ("done", "done")
    assert captions(folder)["red"] == "a picture of something red, red thing, unwanted, ball (toy)"
    assert losses(events) == undisturbed
    assert ui.digest() == before


class Slow:
    """A captioner that takes `seconds`; what happened, in order."""

    name = "slow"

    def __init__(self, seconds: float) -> None:
        self.seconds, self.log = seconds, []

    def caption(self, image: Image.Image) -> Words:
        time.sleep(self.seconds)
        self.log.append("caption")
        return Words("words")

    def rest(self) -> None:
        self.log.append("rest")


@pytest.fixture
def turns(fake_webui, monkeypatch):
    module = fake_webui.host("turns")
    monkeypatch.setattr(module, "TURN", 0.05)
    return module


def test_whoever_waits_gets_in_after_a_turn_and_then_has_longer(fake_webui, turns):
    slow = Slow(0.02)
    captioner, picture = turns.InTurns(slow, lambda: False), Image.new("RGB", (8, 8))
    waited: list[float] = []

    def others() -> None:
        began = time.monotonic()
        with fake_webui.lock:
            waited.append(time.monotonic() - began)
            slow.log.append("others")

    captioner.caption(picture)
    assert fake_webui.lock._lock.locked()
    assert fake_webui.state.job == "Captioning"
    thread = threading.Thread(target=others)
    thread.start()
    while not fake_webui.lock._pending_threads:
        time.sleep(0.001)
    began = time.monotonic()
    for _ in range(4):
        captioner.caption(picture)
    thread.join(5)
    captioner.rest()
    assert slow.log.index("others") == slow.log.index("rest") + 1 <= 4
    assert time.monotonic() - began >= 0.05 * turns.OTHERS
    assert slow.log[-1] == "rest"
    assert not fake_webui.lock._lock.locked()


def test_alone_it_does_not_wait_for_itself(fake_webui, turns, monkeypatch):
    monkeypatch.setattr(turns, "OTHERS", 50.0)
    captioner, picture = turns.InTurns(Slow(0.06), lambda: False), Image.new("RGB", (8, 8))
    began = time.monotonic()
    for _ in range(4):
        captioner.caption(picture)
    # After each turn a moment; never as long as for others.
    assert time.monotonic() - began < 2


def test_an_error_frees_the_queue(fake_webui, turns):
    class Broken(Slow):
        def caption(self, image: Image.Image) -> Words:
            raise ModelError("no")

    captioner = turns.InTurns(Broken(0), lambda: False)
    with pytest.raises(ModelError):
        captioner.caption(Image.new("RGB", (8, 8)))
    assert not fake_webui.lock._lock.locked()


def test_interrupt_stops_it_at_the_next_picture(fake_webui, turns):
    class Watched(Slow):
        def caption(self, image: Image.Image) -> Words:
            fake_webui.state.interrupt()
            return super().caption(image)

    captioner = turns.InTurns(Watched(0), lambda: False)
    assert not captioner.stopping()
    captioner.caption(Image.new("RGB", (8, 8)))
    assert captioner.stopping()
    captioner.rest()


def test_one_run_at_a_time_and_stop_ends_it(fake_webui, captioning, here, folder):
    fake_webui.lock.acquire()
    captioning.caption({"train_data_dir": str(folder), "captioner": "blip"})
    assert captioning.view.state == "running"
    with pytest.raises(DataError, match="captioned just now"):
        captioning.caption({"train_data_dir": str(folder), "captioner": "blip"})
    captioning.stop()
    assert captioning.view.state == "stopping"
    fake_webui.lock.release()
    captioning.wait(10)
    # It stops at the next picture, the first or the second.
    assert captioning.view.state == "stopped"
    assert captioning.view.done <= 1
    assert captioned(captioning, folder, captioner="blip").state == "done"
    assert len(captions(folder)) == 3


def test_a_tagger_in_a_folder_needs_no_turn(fake_webui, captioning, folder, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from tests.captioners import write_tagger

    tagger = write_tagger(tmp_path / "tagger", size=96)
    with fake_webui.lock:
        assert captioned(captioning, folder, captioner=str(tagger)).state == "done"
    assert captions(folder)["red"].startswith("red ball")


def test_only_where_a_visitor_may(fake_webui, captioning, here, folder, tmp_path):
    fake_webui("shared").cmd_opts.webui_is_non_local = True
    with pytest.raises(ConfigError, match="train_data_dir: .*allowed folders"):
        captioning.caption({"train_data_dir": str(folder), "captioner": "blip"})
    inside = fake_webui.data / "mine"
    folder.rename(inside)
    with pytest.raises(ConfigError, match="captioner: .*allowed folders"):
        captioning.caption({"train_data_dir": str(inside), "captioner": str(tmp_path)})
    with pytest.raises(ConfigError, match="metadata_path: .*allowed folders"):
        captioning.caption(
            {"train_data_dir": str(inside), "metadata_path": str(tmp_path / "x.csv"), "captioner": "blip"}
        )
    for settings in ({}, {"train_data_dir": ""}, {"train_data_dir": str(inside), "captioner": " "}):
        with pytest.raises((ConfigError, DataError), match="found nothing"):
            captioning.caption(settings)
    output = inside / "mine.csv"
    assert captioned(captioning, inside, captioner="blip", metadata_path=str(output)).state == "done"
    assert output.is_file()
