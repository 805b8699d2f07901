"""Sliders and differences: against plain float64 references, what they ask for, and whole runs."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.nn import functional as F

from lora_trainer.adapters.inject import ADAPTER, strengthened
from lora_trainer.config import build, output_name_of
from lora_trainer.config.export import MODE, to_header
from lora_trainer.errors import ConfigError, DataError
from lora_trainer.events import Finished, Notice, Started, StepDone, Validated
from lora_trainer.hosts.roots import Roots
from lora_trainer.sampling import apply_lora
from lora_trainer.training import data, lessons
from lora_trainer.training.feed import Feed
from lora_trainer.training.segment import open_segment
from lora_trainer.training.sliders import prompts_of
from lora_trainer.training.validation import Validator
from tests.unit.test_masks import gradient_of, silent
from tests.unit.test_preservation import batch_of, models_of, plain_copy, wake
from tests.unit.test_run import ROOT, of, train, weights

SLIDER = {
    "mode": "slider",
    "slider_target": "a cat",
    "slider_positive": "a very old cat",
    "slider_negative": "a young cat",
    "max_train_steps": 3,
    "slider_pictures": 4,
}


@pytest.fixture
def slider(settings) -> dict:
    """Settings of a slider without pictures."""
    return {**{k: v for k, v in settings.items() if k != "train_data_dir"}, **SLIDER, "resolution": 64}


@pytest.fixture
def pairs(settings, tmp_path) -> dict:
    """Settings of a difference: the originals are the pictures with each colour turned round."""
    folder, originals = Path(settings["train_data_dir"]), tmp_path / "originals"
    originals.mkdir()
    for path in folder.glob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(originals / path.name)
    return {**settings, "mode": "difference", "original_data_dir": str(originals)}


# --- What is computed ---


def lesson_batch(segment, text_encoder: bool):
    """Of three samples, the last of weight 0: captions, a slider's prompts, and originals."""
    batch = batch_of(segment, text_encoder)
    generator = torch.Generator().manual_seed(9)
    if text_encoder:
        read = segment.model.text.tokens
        ways = [{"ids": torch.stack([read(text)["ids"]] * 3)} for text in ("an old cat", "a young cat")]
    else:
        ways = [{"context": torch.randn(3, 77, 16, generator=generator)} for _ in range(2)]
    original = torch.randn(batch.latents.shape, generator=generator)
    return replace(batch, preserved=None, positive=ways[0], negative=ways[1], original=original)


def reference(segment, networks, batch, mode: str) -> tuple[dict[str, torch.Tensor], float]:
    """Gradient and loss by the paper's formulas, in float64, with diffusers', transformers' and PEFT's forwards."""
    copies, layers, named = {}, [], {}
    for part, adapter in segment.adapters.items():
        network = segment.model.unet if part == "unet" else segment.model.text.module
        inside = {layer: name for name, layer in network.named_modules()}
        names = [inside[layer] for layer in adapter.layers.values()]
        copies[part], theirs = plain_copy(networks[part], adapter, names)
        layers += theirs.layers.values()
        for name, layer in zip(adapter.layers, theirs.layers.values(), strict=True):
            named |= {f"{name}.{which}": getattr(layer, which)[ADAPTER].weight for which in ("lora_A", "lora_B")}
    text = segment.model.text
    (encoder,) = text.encoders
    text = replace(text, encoders=(replace(encoder, module=copies.get("text_encoder", networks["text_encoder"])),))
    schedule = replace(segment.network.noise, alphas_cumprod=segment.network.noise.alphas_cumprod.double())
    scale = layers[0].scaling[ADAPTER]

    def predicted(weight, latents, context, ids):
        for layer in layers:
            layer.scaling[ADAPTER] = weight * scale
        if ids is not None:
            context = torch.cat([text.encode(each) for each in ids])
        noisy = schedule.add_noise(latents.double(), batch.eps.double(), batch.t)
        return copies["unet"](noisy, batch.t, encoder_hidden_states=context.double()).sample

    own = (batch.context, batch.ids)
    if mode == "slider":
        with torch.no_grad():
            neutral, positive, negative = (
                predicted(0, batch.latents, *texts)
                for texts in (own, *((way.get("context"), way.get("ids")) for way in (batch.positive, batch.negative)))
            )
        ends = [(w, batch.latents, neutral + w * 2.5 * (positive - negative)) for w in (1, -1)]
    else:
        ends = [(1, batch.latents, batch.eps.double()), (-1, batch.original, batch.eps.double())]
    total = 0.0
    for weight, latents, target in ends:
        losses = F.mse_loss(predicted(weight, latents, *own), target, reduction="none").mean(dim=(1, 2, 3))
        # Before the weight changes: PEFT reads it in the forward pass.
        total = total + (0.5 * losses * batch.weight.double()).sum()
    total.backward()
    return {name: parameter.grad for name, parameter in named.items()}, total.item()


@pytest.mark.parametrize("mode", ["slider", "difference"])
@pytest.mark.parametrize(("text_encoder", "checkpointing"), [(False, False), (False, True), (True, True)])
def test_the_gradient_is_that_of_a_plain_reference(settings, slider, pairs, mode, text_encoder, checkpointing):
    """Convolutions that are not fused, and the text encoder's LoRA, are at the same weight."""
    config = build(
        {"slider": slider, "difference": pairs}[mode],
        {"slider_guidance": 2.5, "lora_dropout": 0, "mixed_precision": "no", "target_modules": ["default", "conv"]},
        {"train_text_encoder": text_encoder, "gradient_checkpointing": checkpointing},
    )
    with models_of(config).borrow() as model:
        networks = {"unet": deepcopy(model.unet), "text_encoder": deepcopy(model.text.module)}
        with open_segment(config, model, None) as segment:
            wake(segment)
            batch = lesson_batch(segment, text_encoder)
            got = gradient_of(segment, batch)
            expected, total = reference(segment, networks, batch, mode)
            assert segment.update.loss.item() == pytest.approx(total, rel=1e-5)
            # What a group norm of one channel takes away has a gradient of 0.
            least = 1e-6 * got.norm().item()
            for slot in segment.trainables.slots:
                mine, theirs = segment.trainables.of(got, slot).double(), expected[slot.name]
                assert (mine - theirs).norm() <= 1e-4 * theirs.norm() + least, slot.name
            with torch.no_grad():
                judged = (segment.judge.judged(batch) * batch.weight).sum().item()
            assert judged == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("mode", ["slider", "difference"])
def test_parts_add_up_and_the_lora_comes_back_to_its_weight_whatever_happens(slider, pairs, mode, monkeypatch):
    config = build({"slider": slider, "difference": pairs}[mode], {"lora_dropout": 0.3})
    with models_of(config).borrow() as model, open_segment(config, model, None) as segment:
        wake(segment)
        batch = lesson_batch(segment, False)
        layers = segment.adapters["unet"].layers.values()
        before = [layer.scaling[ADAPTER] for layer in layers]
        whole = gradient_of(segment, batch)
        segment.trainables.grads.zero_()
        for part in batch.split(2):
            segment.forward_backward(part)
        torch.testing.assert_close(segment.trainables.grads, whole, rtol=1e-4, atol=1e-6)

        def fails(*args):
            assert [layer.scaling[ADAPTER] for layer in layers] == before
            raise torch.cuda.OutOfMemoryError("in the middle of the first backward pass")

        monkeypatch.setattr(segment.forward_backward, "_add", fails)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            segment.forward_backward(batch)
        assert [layer.scaling[ADAPTER] for layer in layers] == before
        assert not any(layer.disable_adapters for layer in layers)
        segment.trainables.verify_views()


def test_what_both_ends_share_is_not_learned(pairs):
    """At its start a LoRA does nothing, so the pull of equal pictures at +1 and at -1 cancels out."""
    config = build(pairs, {"lora_dropout": 0, "mixed_precision": "no"})
    with models_of(config).borrow() as model, open_segment(config, model, None) as segment:
        batch = lesson_batch(segment, False)
        pull = gradient_of(segment, batch).abs().max()
        assert pull > 0
        assert gradient_of(segment, replace(batch, original=batch.latents)).abs().max() < 1e-5 * pull


def test_the_base_is_the_base_at_either_end(slider):
    config = build(slider)
    with models_of(config).borrow() as model, open_segment(config, model, None) as segment:
        batch = lesson_batch(segment, False)
        with torch.no_grad():
            fresh = segment.judge.judged(batch)
            wake(segment)
            learned = segment.judge.judged(batch)
            with segment.base():
                base = segment.judge.judged(batch)
    assert torch.equal(base, fresh)
    assert not torch.equal(learned, fresh)


# --- What is asked for ---


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"slider_positive": " "}, "slider_positive: expected the prompt to lead to beside mode slider, found none"),
        ({"slider_negative": "a very old cat"}, "slider_negative: expected something else than slider_positive"),
        ({"max_train_steps": None}, "max_train_steps: expected beside mode slider without train_data_dir, found none"),
        ({"trigger_words": "sks"}, "trigger_words: says nothing in mode slider"),
        ({"preservation_weight": 1, "preservation_prompt": "x"}, "preservation_weight: says nothing in mode slider"),
        ({"validation_data_dir": "x"}, "validation_data_dir: expected train_data_dir beside it"),
        ({"original_data_dir": "x"}, "original_data_dir: says nothing in mode slider"),
        ({"slider_guidance": 0}, "slider_guidance: expected a number from more than 0 to 100, found 0"),
        ({"mode": "sliders"}, "mode: expected images, slider or difference, found 'sliders'; did you mean slider"),
        ({"mode": "images"}, "train_data_dir: missing"),
        ({"mode": "images", "train_data_dir": "x"}, "slider_positive: says nothing in mode images"),
        ({"mode": "difference"}, "train_data_dir: missing"),
    ],
)
def test_what_a_slider_needs_is_said_with_its_key(slider, changes, problem):
    with pytest.raises(ConfigError) as refused:
        build(slider, changes)
    assert any(line.startswith(problem) for line in refused.value.problems), refused.value.problems


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"original_data_dir": None}, "original_data_dir: expected the pictures before the change beside mode differ"),
        ({"crop": "focus"}, "crop: expected center or random in mode difference"),
        ({"masked_loss": True}, "masked_loss: says nothing in mode difference"),
        ({"validation_data_dir": "x"}, "validation_data_dir: says nothing in mode difference"),
        ({"slider_target": "x"}, "slider_target: says nothing in mode difference"),
    ],
)
def test_what_a_difference_needs_is_said_with_its_key(pairs, changes, problem):
    with pytest.raises(ConfigError) as refused:
        build(pairs, changes)
    assert any(line.startswith(problem) for line in refused.value.problems), refused.value.problems


def test_a_slider_without_pictures_has_a_name_and_needs_no_folder_in_the_webui(slider, tmp_path):
    assert output_name_of(build(slider, {"output_name": None})) == "a-very-old-cat-r4-s3"
    roots = Roots([tmp_path], enforced=True)
    empty = {**SLIDER, "train_data_dir": ""}
    assert roots.settings(empty) == empty
    for given in ({**empty, "mode": "images"}, {**empty, "original_data_dir": ""}):
        with pytest.raises(ConfigError, match="expected a path, found ''"):
            roots.settings(given)
    with pytest.raises(ConfigError, match="original_data_dir: expected a path that stays inside"):
        roots.settings({"original_data_dir": "/etc"})


def test_files_of_ordinary_runs_say_nothing_of_modes(settings, slider):
    assert not set(MODE) & set(json.loads(to_header(build(settings))))
    assert json.loads(to_header(build(slider)))["slider_positive"] == "a very old cat"


def test_attributes_stand_before_each_prompt(slider):
    config = build(slider, {"slider_attributes": ["male", "  female "], "slider_pictures": 5})
    assert prompts_of(config)["female a cat"] == {"positive": "female a very old cat", "negative": "female a young cat"}
    captions = [item.caption for item in data.find(config, silent).train]
    assert captions == ["male a cat", "female a cat", "male a cat", "female a cat", "male a cat"]


# --- Pairs ---


def test_pairs_are_found_by_name_whatever_their_ending(pairs):
    folder = Path(pairs["original_data_dir"])
    Image.open(folder / "p0.png").convert("RGB").save(folder / "p0.jpg")
    (folder / "p0.png").unlink()
    items = data.find(build(pairs, {"validation_split": 0.2}), silent)
    assert {item.path.name: item.original.name for item in (*items.train, *items.held_out)} == {
        **{f"p{n}.png": f"p{n}.png" for n in range(1, 6)},
        "p0.png": "p0.jpg",
    }
    assert len(items.held_out) == 1


def test_what_has_no_fellow_is_named(pairs):
    folder, originals = Path(pairs["train_data_dir"]), Path(pairs["original_data_dir"])
    (originals / "p1.png").rename(originals / "other.png")
    with pytest.raises(
        DataError, match=r"original_data_dir: .*originals has no picture of the same name for 1 of 6 \(p1"
    ):
        data.find(build(pairs), silent)
    Image.open(originals / "other.png").save(originals / "p1.png")
    with pytest.raises(
        DataError, match=r"original_data_dir: .*pictures has no picture of the same name for 1 of 7 \(oth"
    ):
        data.find(build(pairs), silent)
    with pytest.raises(DataError, match="original_data_dir: expected a folder whose pictures are not trained on"):
        data.find(build(pairs, {"original_data_dir": str(folder)}), silent)


def loaded(config):
    with models_of(config).borrow() as model:
        return data.load(data.find(config, silent), config, model, sink=silent), model


def test_pairs_of_two_shapes_are_refused(pairs):
    path = Path(pairs["original_data_dir"]) / "p5.png"
    Image.open(path).resize((64, 128)).save(path)
    wanted = r"originals/p5.png: expected the shape of .*pictures/p5.png, which is trained at 128×64, found 64×128"
    with pytest.raises(DataError, match=wanted):
        loaded(build(pairs))


def test_each_picture_comes_with_the_same_part_of_its_original(pairs, tmp_path):
    """Cut, mirrored and encoded alike: the latents of a pair of equal pictures are equal to the bit."""
    same = {**pairs, "original_data_dir": str(tmp_path / "same")}
    (tmp_path / "same").mkdir()
    for path in Path(pairs["train_data_dir"]).glob("*.png"):
        wide = Image.open(path).resize((200, 96))
        wide.save(path)
        wide.save(tmp_path / "same" / path.name)
    config = build(same, {"crop": "random", "crops_per_image": 3, "flip": True, "extra_resolutions": [64]})
    prepared, model = loaded(config)
    assert len(prepared.train.samples) == 12
    assert prepared.train.images == 6
    assert all(torch.equal(sample.latents, sample.original) for sample in prepared.train.samples)
    assert {len(sample.latents) for sample in prepared.train.samples} == {6}
    feed = Feed.of(config, prepared.train, model)
    batch = next(feed.batches(next(feed.updates(0))))
    assert torch.equal(batch.latents, batch.original)


def test_a_pair_that_cannot_be_read_is_left_out_whole(pairs):
    (Path(pairs["original_data_dir"]) / "p2.png").write_bytes(b"no picture")
    prepared, _ = loaded(build(pairs))
    assert [sample.item.path.name for sample in prepared.train.samples] == [f"p{n}.png" for n in (0, 1, 3, 4, 5)]
    assert all(sample.original is not None for sample in prepared.train.samples)


# --- Whole runs ---


def test_a_slider_draws_its_own_pictures_and_goes_on_as_if_nothing_had_happened(slider):
    from lora_trainer.hosts.standalone import AloneLease

    class Interrupted(AloneLease):
        asked = 0

        def hand_over(self, make_room=None):
            self.asked += 1
            return self.asked % 2 == 1

    changes = {"validation_split": 0.25, "output_format": "webui"}
    events, expected = train(slider, **changes)
    assert of(events, Started)[0].images == 3
    assert [step.step for step in of(events, StepDone)] == [1, 2, 3]
    first, last = of(events, Validated)
    assert first.lora == first.base > 0
    assert last.lora != last.base == first.base
    _, interrupted = train(slider, lease=Interrupted(), **changes)
    assert interrupted == expected


def test_its_file_is_an_ordinary_lora(slider, tmp_path):
    """Which the loader takes, and which is off at 0, and something else at either end."""
    from lora_trainer.sampling import Recipe, generate
    from lora_trainer.training.precision import Precision

    events, _ = train(slider, lora_dropout=0, learning_rate=1e-2)
    file = Path(of(events, Finished)[0].output[0])
    with models_of(build(slider)).borrow() as model:
        recipe, precision = Recipe((64, 64), steps=2), Precision(torch.device("cpu"), torch.float32)
        (base,) = generate(model, ["a cat"], recipe, precision)
        adapter = apply_lora(model, file)
        drawn = {}
        for weight in (-1, 0, 1):
            with adapter.weight(weight):
                drawn[weight] = generate(model, ["a cat"], recipe, precision)[0].tobytes()
    assert drawn[0] == base.tobytes()
    assert len(set(drawn.values())) == 3


@pytest.mark.parametrize("changes", [{"train_text_encoder": True}, {"slider_attributes": ["x", "word " * 90]}])
def test_a_slider_with_pictures_reads_no_captions(settings, changes):
    given = {**settings, **SLIDER, "max_train_steps": None, "epochs": 1, **changes}
    events, file = train(given)
    assert file
    told = [notice.text for notice in of(events, Notice) if "captions are not read" in notice.text]
    assert len(told) == 1
    (Path(settings["train_data_dir"]) / "metadata.csv").write_text("nothing,of\nuse", encoding="utf-8")
    assert train(given)[1] == file
    prepared, _ = loaded(build(given))
    for sample in prepared.train.samples:
        texts = (sample.text, *sample.directions.values())
        assert len({text["ids" if "ids" in text else "context"].shape for text in texts}) == 1
        assert set(sample.directions) == {"positive", "negative"}
    assert next(Validator(prepared.train.samples).batches(1000)).positive is not None


@pytest.mark.parametrize(
    "changes", [{}, {"train_text_encoder": True, "gradient_accumulation_steps": 2}, {"trial": True}]
)
def test_a_difference_trains_and_is_judged_by_held_out_pairs(pairs, changes):
    events, file = train(pairs, validation_split=0.2, **changes)
    assert file
    measured = of(events, Validated)
    assert measured[0].lora == measured[0].base
    assert measured[-1].lora != measured[-1].base
    assert of(events, Started)[0].images == 5


def test_a_run_without_a_lesson_asks_for_none(settings, monkeypatch):
    """Ordinary steps are what they were: no weight of a LoRA is touched."""
    monkeypatch.setattr(lessons, "strengthened", None)
    assert train(settings, epochs=1)[1]
    with pytest.raises(TypeError):
        train({**settings, **SLIDER}, epochs=1)


def test_weights_are_put_back(settings):
    config = build(settings)
    with models_of(config).borrow() as model, open_segment(config, model, None) as segment:
        layers = list(segment.adapters["unet"].layers.values())
        before = layers[0].scaling[ADAPTER]
        with strengthened([segment.adapters["unet"]], -1):
            assert layers[0].scaling[ADAPTER] == -before
        assert layers[0].scaling[ADAPTER] == before


def test_a_resumed_slider_is_the_same_run(slider, tmp_path):
    stop = iter(range(1000))
    train(slider, stop=lambda: next(stop) >= 6, checkpoint_every=1)
    events, resumed = train(slider, resumes=True, checkpoint_every=1)
    assert 0 < len(of(events, StepDone)) < 3
    _, whole = train({**slider, "output_dir": str(tmp_path / "whole")}, checkpoint_every=1)
    assert weights(resumed) == weights(whole)


def test_what_the_documents_show_is_understood():
    for name, many in (("docs/sliders.md", 2), ("README.md", 2)):
        text = (ROOT / name).read_text(encoding="utf-8")
        shown = [block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "mode: " in block]
        assert len(shown) == many
        for block in shown:
            assert build({"base_model": "any"}, yaml.safe_load(block)).mode in block
