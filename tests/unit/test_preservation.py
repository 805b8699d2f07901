"""Output preservation: against a plain float64 reference, what it leaves alone, and what it costs when it is off."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_trainer.adapters.inject import ADAPTER, Adapter, inject, without
from lora_trainer.config import build
from lora_trainer.dataset.rules import Rules
from lora_trainer.dataset.samples import Captions
from lora_trainer.errors import ConfigError
from lora_trainer.events import Started, StepDone
from lora_trainer.hosts.standalone import FileModels
from lora_trainer.training import data
from lora_trainer.training.feed import Feed
from lora_trainer.training.preservation import Preservation
from lora_trainer.training.segment import open_segment
from lora_trainer.training.step import Batch
from tests.unit.test_forecast import feed
from tests.unit.test_masks import gradient_of, silent
from tests.unit.test_run import of, train


@pytest.mark.parametrize(
    ("words", "prompt", "drawn", "expected"),
    [
        (("sks",), "", "sks, a cat", "a cat"),
        (("sks",), "", "a cat, SKS, red", "a cat, red"),
        (("sks",), "", "a photo of sks", "a photo of"),
        (("sks",), "", "asks, sks2", "asks, sks2"),
        (("sks",), "person", "sks, a cat by sks", "person, a cat by person"),
        (("sks person",), "person", "sks person, red", "person, red"),
        (("sks", "sks person"), "person", "sks person, red", "person, red"),
        (("my style, sks",), "style", "my style, sks, red", "style, red"),
        (("my style, sks",), "style", "sks, red, my style", "red, style"),
        (("my style, sks",), "style", "sks, red", "sks, red"),
        (("sks",), r"\1 style", "sks", r"\1 style"),
        (("",), "a person", "red, a cat", "a person"),
        (("sks",), "person", "", ""),
    ],
)
def test_the_trigger_words_make_way(words, prompt, drawn, expected):
    assert Rules(trigger_words=words, preservation_prompt=prompt).without_trigger(drawn) == expected


def test_without_anything_to_leave_out_it_says_so(settings):
    with pytest.raises(ConfigError, match="preservation_weight: expected trigger_words to leave out"):
        build(settings, {"preservation_weight": 1})
    for other in ({"preservation_prompt": "a person"}, {"concepts": [{"folder": ".", "trigger_words": "x"}]}):
        assert build(settings, {"preservation_weight": 1}, other)


def models_of(config) -> FileModels:
    text = config.train_text_encoder
    return FileModels(Path(config.base_model), torch.device("cpu"), torch.float32, train_text=text)


def batch_of(segment, ids: bool) -> Batch:
    generator = torch.Generator().manual_seed(7)
    latents, eps = (torch.randn(3, 4, 8, 16, generator=generator) for _ in range(2))
    if ids:
        read = segment.model.text.tokens
        texts = {"ids": torch.stack([read(text)["ids"] for text in ("sks, a", "sks, red b", "c, sks")])}
        others = {"ids": torch.stack([read(text)["ids"] for text in ("a", "red b", "c")])}
    else:
        texts, others = ({"context": torch.randn(3, 77, 16, generator=generator)} for _ in range(2))
    return Batch(
        latents,
        eps,
        torch.tensor([20, 500, 950]),
        torch.tensor([0.25, 0.75, 0.0]),
        torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.int32),
        preserved=others,
        **texts,
    )


def wake(segment) -> None:
    """A LoRA that does something."""
    generator = torch.Generator().manual_seed(2)
    segment.trainables.masters.add_(0.02 * torch.randn(segment.trainables.masters.shape, generator=generator))
    segment.working.refresh()


def plain_copy(network: nn.Module, adapter: Adapter, names: list[str]) -> tuple[nn.Module, Adapter]:
    """PEFT's own layers with the same weights in a float64 copy, computed by diffusers' and transformers' forwards."""
    copy = deepcopy(network)
    sizes = dict(zip(names, adapter.sizes.values(), strict=True))
    theirs = inject(copy, sizes, generator=lambda name: torch.Generator())
    copy.double()
    for mine, other in zip(adapter.layers.values(), theirs.layers.values(), strict=True):
        for part in ("lora_A", "lora_B"):
            getattr(other, part)[ADAPTER].weight.data.copy_(getattr(mine, part)[ADAPTER].weight.detach())
    return copy, theirs


@pytest.mark.parametrize("text_encoder", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_that_of_a_plain_reference(settings, text_encoder, checkpointing):
    """Convolutions that are not fused, and the text encoder's LoRA, are off in the base's answer as well."""
    config = build(
        settings,
        {"preservation_weight": 3, "preservation_prompt": "x", "lora_dropout": 0, "mixed_precision": "no"},
        {"target_modules": ["default", "conv"], "train_text_encoder": text_encoder},
        {"gradient_checkpointing": checkpointing},
    )
    with models_of(config).borrow() as model:
        networks = {"unet": deepcopy(model.unet), "text_encoder": deepcopy(model.text.module)}
        with open_segment(config, model, None) as segment:
            wake(segment)
            batch = batch_of(segment, text_encoder)
            got = gradient_of(segment, batch)
            loss = segment.update.loss.item()
            expected, total = reference(segment, networks, batch)
            # What a group norm of one channel takes away has a gradient of 0.
            least = 1e-6 * got.norm().item()
            for slot in segment.trainables.slots:
                mine, theirs = segment.trainables.of(got, slot).double(), expected[slot.name]
                assert (mine - theirs).norm() <= 1e-4 * theirs.norm() + least, slot.name
            assert loss == pytest.approx(total, rel=1e-5)


def reference(segment, networks, batch: Batch) -> tuple[dict[str, torch.Tensor], float]:
    copies, off = {}, []
    named: dict[str, nn.Parameter] = {}
    for part, adapter in segment.adapters.items():
        inside = {layer: name for name, layer in _network(segment, part).named_modules()}
        names = [inside[layer] for layer in adapter.layers.values()]
        copies[part], theirs = plain_copy(networks[part], adapter, names)
        off += theirs.layers.values()
        for name, layer in zip(adapter.layers, theirs.layers.values(), strict=True):
            named |= {f"{name}.{which}": getattr(layer, which)[ADAPTER].weight for which in ("lora_A", "lora_B")}
    text = segment.model.text
    (encoder,) = text.encoders
    text = replace(text, encoders=(replace(encoder, module=copies.get("text_encoder", networks["text_encoder"])),))
    schedule = replace(segment.network.noise, alphas_cumprod=segment.network.noise.alphas_cumprod.double())
    noisy = schedule.add_noise(batch.latents.double(), batch.eps.double(), batch.t)

    def predicted(context, ids):
        if ids is not None:
            context = torch.cat([text.encode(each) for each in ids])
        return copies["unet"](noisy, batch.t, encoder_hidden_states=context.double()).sample

    others = (batch.preserved.get("context"), batch.preserved.get("ids"))
    for layer in off:
        layer.enable_adapters(False)
    with torch.no_grad():
        target = predicted(*others)
    for layer in off:
        layer.enable_adapters(True)
    weight = batch.weight.double()
    kept = F.mse_loss(predicted(*others), target, reduction="none").mean(dim=(1, 2, 3))
    own = F.mse_loss(predicted(batch.context, batch.ids), batch.eps.double(), reduction="none").mean(dim=(1, 2, 3))
    loss = ((own + 3 * kept) * weight).sum()
    loss.backward()
    return {name: parameter.grad for name, parameter in named.items()}, loss.item()


def _network(segment, part: str) -> nn.Module:
    return segment.model.unet if part == "unet" else segment.model.text.module


@pytest.fixture
def awake(settings):
    config = build(
        settings,
        {"preservation_weight": 1, "trigger_words": "sks", "train_text_encoder": True, "lora_dropout": 0.5},
        {"target_modules": ["default", "conv"]},
    )
    with models_of(config).borrow() as model, open_segment(config, model, None) as segment:
        yield segment


def test_the_bases_answer_is_the_bases_whatever_dropout_does(awake):
    """A fresh LoRA does nothing, so nothing is to be preserved; one that does something is wholly off."""
    batch = batch_of(awake, ids=True)
    network = awake.network
    with network.dropout.recording(batch.shape, batch.mask_keys), torch.no_grad():
        fresh = network.losses(batch)
    with network.dropout.masks(batch.shape, batch.mask_keys), torch.no_grad():
        assert network.preserved(batch).abs().max() == 0
        wake(awake)
        with without(network.preservation.adapters):
            assert torch.equal(network.losses(batch), fresh)
        assert not torch.equal(network.losses(batch), fresh)
        assert network.preserved(batch).min() > 0


def test_the_loras_are_on_again_whatever_happens(awake):
    before = [layer.scaling[ADAPTER] for adapter in awake.adapters.values() for layer in adapter.layers.values()]

    def fails():
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        Preservation(1, tuple(awake.adapters.values())).losses(fails)
    layers = [layer for adapter in awake.adapters.values() for layer in adapter.layers.values()]
    assert [layer.scaling[ADAPTER] for layer in layers] == before
    assert not any(layer.disable_adapters for layer in layers)
    assert all(slot.owner.weight.requires_grad for slot in awake.trainables.slots)
    awake.trainables.verify_views()


def test_parts_add_up_to_the_whole(settings):
    config = build(settings, {"preservation_weight": 1, "trigger_words": "sks", "lora_dropout": 0.3})
    with models_of(config).borrow() as model, open_segment(config, model, None) as segment:
        wake(segment)
        batch = batch_of(segment, ids=False)
        whole = gradient_of(segment, batch)
        segment.trainables.grads.zero_()
        for part in batch.split(2):
            segment.forward_backward(part)
        torch.testing.assert_close(segment.trainables.grads, whole, rtol=1e-4, atol=1e-6)
        segment.trainables.grads.zero_()
        segment.forward_backward(replace(batch, preserved={"context": batch.context}))
        assert not torch.equal(segment.trainables.grads, whole)


def test_weight_0_is_the_plain_step_to_the_bit_and_costs_nothing(settings, monkeypatch):
    from diffusers import UNet2DConditionModel

    calls = []
    forward = UNet2DConditionModel.forward
    monkeypatch.setattr(UNet2DConditionModel, "forward", lambda *a, **k: calls.append(0) or forward(*a, **k))
    plain, _ = train(settings, trigger_words="sks", epochs=1)
    count = len(calls)
    off, _ = train(settings, trigger_words="sks", epochs=1, preservation_prompt="a person")
    assert [step.loss for step in of(off, StepDone)] == [step.loss for step in of(plain, StepDone)]
    assert len(calls) == 2 * count
    steps = of(train(settings, trigger_words="sks", epochs=1, preservation_weight=1)[0], Started)[0].steps
    # The base's answer, and the LoRA's.
    assert len(calls) == 3 * count + 2 * steps


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train_text_encoder": True},
        {"shuffle_captions": True, "tag_dropout": 0.3, "caption_dropout": 0.2},
        {"shuffle_captions": True, "train_text_encoder": True, "gradient_accumulation_steps": 2},
        {"caption_syntax": "webui", "tag_dropout": 0.3},
    ],
)
def test_a_run_preserves_with_any_captions(settings, changes):
    settings = {**settings, "trigger_words": "sks", "lora_dropout": 0.1, "epochs": 1}
    events, file = train(settings, preservation_weight=1, preservation_prompt="picture", **changes)
    assert all(step.loss == step.loss for step in of(events, StepDone))
    _, other = train(settings, preservation_weight=0, **changes)
    assert file != other
    if not changes:
        _, checkpointed = train(settings, preservation_weight=1, preservation_prompt="picture")
        assert checkpointed == file


def test_the_captions_without_trigger_words_are_encoded_ahead_and_cached(settings, tmp_path):
    changes = {"preservation_weight": 1, "trigger_words": "sks", "cache_dir": str(tmp_path / "cache")}
    config = build(settings, changes)
    with models_of(config).borrow() as model:
        loaded = data.load(data.find(config, silent), config, model, sink=silent)
        without = {f"picture, number {n}" for n in range(6)}
        # The empty one fills short ones up.
        assert set(loaded.train.texts) == without | {f"sks, {caption}" for caption in without} | {""}
        given = Feed(loaded.train.epoch, loaded.train.captions(model.text.tokens), 2, 1, 1, 1000)
        batch = next(given.batches(next(given.updates(0))))
        read = {caption: model.text.context(caption)["context"] for caption in loaded.train.texts}
    for own, other in zip(batch.context, batch.preserved["context"], strict=True):
        (caption,) = [text for text, embedded in read.items() if torch.equal(embedded, own)]
        assert torch.equal(other, read[caption.removeprefix("sks, ")])
    _, first = train(settings, epochs=1, **changes)
    _, again = train(settings, epochs=1, **changes)
    assert first == again


def test_both_captions_have_one_length_and_pooled_ones_their_sizes():
    def read(text: str) -> dict[str, torch.Tensor]:
        chunks = 2 if text == "long" else 1
        return {"context": torch.full((77 * chunks, 8), float(len(text))), "pooled": torch.full((4,), float(len(text)))}

    rules = Rules(trigger_words=("a cat",), preserved=True, preservation_prompt="long")
    (example,) = replace(feed({(64, 64): 4}), captions=Captions(rules, read)).examples()
    batch = example.batch
    assert batch.shape == (4, 8, 8, 154)
    other = batch.without_trigger()
    assert (other.context.shape, other.preserved) == (batch.context.shape, None)
    assert (batch.pooled.unique().item(), other.pooled.unique().item()) == (5, 4)
    assert other.condition()["added_cond_kwargs"]["time_ids"] is batch.sizes
    static = batch.like(torch.device("cpu"))
    static.copy_(batch)
    assert torch.equal(static.preserved["pooled"], batch.preserved["pooled"])
    assert [part.preserved["context"].shape for part in batch.split(2)] == [(2, 154, 8)] * 2
