"""A text encoder that is trained: its forward, its gradients beside an ordinary step's, its files and previews."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from lora_trainer import sampling
from lora_trainer.adapters.naming import UNET_PREFIX
from lora_trainer.config import build
from lora_trainer.errors import ConfigError
from lora_trainer.events import Started, StepDone, Validated
from lora_trainer.hosts.standalone import AloneLease, open_model
from lora_trainer.models.single_file import model_of, place
from lora_trainer.models.unet_names import LDM_PREFIX as UNET
from lora_trainer.sampling import Recipe
from lora_trainer.training import segment as segments
from lora_trainer.training.precision import Precision
from lora_trainer.training.step import Batch
from lora_trainer.training.tier import Tier
from tests.tiny import tiny_state
from tests.unit.test_kernels import HALF, triton_ops
from tests.unit.test_run import of, train, weights

CPU = torch.device("cpu")
LONG, OTHER = "a cat, sitting " * 30, "dogs under trees, " * 30
TEXT = {"train_text_encoder": True}


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    """A checkpoint whose text encoder has three layers."""
    path = tmp_path_factory.mktemp("deep") / "deep.safetensors"
    save_file(tiny_state(text_layers=3), path)
    return path


def model_at(path: Path, clip_skip: int | None = None):
    family, state = place(path, CPU, torch.float32)
    return model_of(state, family, path, device=CPU, hashes=lambda: None, clip_skip=clip_skip)


@contextmanager
def opened(path: Path, *, clip_skip: int | None = None, heard: bool = True, **changes):
    """A segment; its LoRAs have an effect if `heard`."""
    config = build({"base_model": "x", "train_data_dir": "x", "mixed_precision": "no"}, TEXT | changes)
    with segments.open_segment(config, model_at(path, clip_skip), None) as segment:
        for slot in segment.trainables.slots if heard else ():
            slot.of(segment.trainables.masters).normal_(std=0.1, generator=torch.Generator().manual_seed(slot.start))
        segment.working.refresh()
        yield segment


def batch(model, captions=(LONG, OTHER), emphasis=None):
    generator = torch.Generator().manual_seed(0)
    size = len(captions)
    return Batch(
        latents=torch.randn(size, 4, 8, 16, generator=generator),
        eps=torch.randn(size, 4, 8, 16, generator=generator),
        t=torch.tensor([10, 500, 990])[:size],
        weight=torch.arange(1.0, size + 1) / sum(range(1, size + 1)),
        mask_keys=torch.randint(-(2**31), 2**31, (size, 2), generator=generator, dtype=torch.int32),
        ids=torch.stack([model.text.tokens(caption)["ids"] for caption in captions]),
        emphasis=emphasis,
    )


@pytest.mark.parametrize("clip_skip", [1, 2, 3])
def test_an_untrained_lora_changes_nothing_of_the_embedding(deep, clip_skip):
    frozen = torch.cat([model_at(deep, clip_skip).text.embed(caption) for caption in (LONG, OTHER)])
    with opened(deep, clip_skip=clip_skip, heard=False) as segment:
        got = segment.network.encode(batch(segment.model).ids).context
        starts = [f.down for f in segment.adapters["text_encoder"].factors().values()]
        assert len(starts) == 6 * (4 - clip_skip)
        assert len({start[0, 0].item() for start in starts}) == len(starts)
    assert got.shape == (2, 154, 16)
    torch.testing.assert_close(got, frozen, rtol=0, atol=1e-5)


def test_emphasis_is_the_frozen_encoders(deep):
    emphasis = torch.ones(2, 2, 77)
    emphasis[0, 0, 3:9], emphasis[1, 1, 2] = 1.4, 0.5
    with opened(deep, heard=False) as segment:
        text, given = segment.model.text, batch(segment.model, emphasis=emphasis)
        expected = torch.cat([text.encode(i, w) for i, w in zip(given.ids, emphasis, strict=True)])
        got = segment.network.encode(given.ids, given.emphasis).context
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def reference(path: Path, state: dict, clip_skip: int):
    """(loss, gradient by parameter name) of a step in ordinary autograd, on transformers', diffusers' and PEFT's own
    forwards."""
    model = model_at(path, clip_skip)
    config = build({"base_model": "x", "train_data_dir": "x"}, TEXT)
    trained = {
        name: getattr(owner, attribute)
        for adapter in segments.injected(config, model).values()
        for name, owner, attribute in adapter.parameters()
    }
    for name, parameter in trained.items():
        parameter.data.copy_(state[name])
    given, inner = batch(model), model.text.encoders[0].inner
    contexts = []
    for ids in given.ids:
        layers = model.text.module(input_ids=ids, output_hidden_states=True).hidden_states
        contexts.append(inner.final_layer_norm(layers[-clip_skip]).reshape(1, -1, layers[0].shape[-1]))
    abar = model.noise.alphas_cumprod[given.t].view(-1, 1, 1, 1)
    noisy = abar.sqrt() * given.latents + (1 - abar).sqrt() * given.eps
    predicted = model.unet(noisy, given.t, encoder_hidden_states=torch.cat(contexts)).sample
    loss = ((predicted - given.eps).square().mean(dim=(1, 2, 3)) * given.weight).sum()
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in trained.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("clip_skip", [1, 2])
def test_a_step_is_an_ordinary_one(deep, clip_skip, checkpointing):
    settings = {"lora_dropout": 0.0, "gradient_checkpointing": checkpointing}
    with opened(deep, clip_skip=clip_skip, **settings) as segment:
        trainables = segment.trainables
        state = {slot.name: slot.of(trainables.masters).clone() for slot in trainables.slots}
        segment.forward_backward(batch(segment.model))
        loss = segment.forward_backward.loss.clone()
        grads = {slot.name: slot.of(trainables.grads).clone() for slot in trainables.slots}
    expected_loss, expected = reference(deep, state, clip_skip)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert expected.keys() == grads.keys()
    for part in (True, False):
        names = [name for name in grads if name.startswith("text_model.") == part]
        mine, theirs = (torch.cat([by_name[name].flatten() for name in names]) for by_name in (grads, expected))
        assert theirs.norm() > 0
        assert (mine - theirs).norm() < 1e-5 * theirs.norm()


def test_checkpointed_layers_run_again_with_the_same_masks(deep, monkeypatch):
    from lora_trainer.training import clip

    calls, seen = [], []
    original = clip.StepClip._layer
    monkeypatch.setattr(clip.StepClip, "_layer", lambda *given: calls.append(1) or original(*given))
    for checkpointing in (False, True):
        with opened(deep, lora_dropout=0.3, gradient_checkpointing=checkpointing) as segment:
            segment.forward_backward(batch(segment.model))
            calls.clear()
            segment.forward_backward(batch(segment.model))
            seen.append((len(calls), segment.trainables.grads.clone()))
    assert [count for count, _ in seen] == [3, 6]
    assert torch.equal(seen[0][1], seen[1][1])


def text_gradients(segment):
    """(embedding, the text encoder's gradients) under dropout masks."""
    given, network = batch(segment.model), segment.network
    with torch.no_grad(), network.dropout.recording(("text",), given.mask_keys):
        network.encode(given.ids)
    with network.dropout.masks(("text",), given.mask_keys):
        embedded = network.encode(given.ids).context.float()
        (embedded * torch.linspace(-1, 1, embedded.numel()).view_as(embedded)).sum().backward()
    segment.working.collect()
    return embedded.detach(), segment.trainables.grads[segment.trainables.groups[1].start :].clone()


def test_the_triton_kernels_compute_the_same_in_half_precision(deep, monkeypatch):
    ops, dtype = triton_ops(), HALF
    with opened(deep, lora_dropout=0.3) as segment:
        expected, expected_grads = text_gradients(segment)
    tier = Tier(ops, False, torch.contiguous_format, {}, ())
    monkeypatch.setattr(segments, "choose_tier", lambda *given: tier)
    monkeypatch.setattr(segments, "resolve", lambda *given: (Precision(CPU, dtype), None))
    with opened(deep, lora_dropout=0.3) as segment:
        got, grads = text_gradients(segment)
    assert (got - expected).norm() < 5e-3 * expected.norm()
    assert (grads - expected_grads).norm() < 1e-2 * expected_grads.norm()


class NoWaiting(TorchDispatchMode):
    """Fails where the host would have to know a number of the device, or give it one: a captured step cannot."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.__name__.split(".")[0] not in ("_local_scalar_dense", "nonzero", "lift_fresh", "masked_select")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("trained", [True, False])
def test_nothing_in_the_step_waits_for_the_device(deep, trained):
    with opened(deep, train_text_encoder=trained) as segment:
        given = batch(segment.model, emphasis=torch.full((2, 2, 77), 1.1))
        segment.forward_backward(given)
        with NoWaiting():
            segment.forward_backward._compute(segment.forward_backward.buffers[given.shape])
        with pytest.raises(AssertionError), NoWaiting():
            given.weight.sum().item()


def test_each_network_has_its_learning_rate(deep):
    for settings, factor in (({}, 0.2), ({"text_encoder_lr": 4e-4}, 0.8)):
        with opened(deep, loraplus_lr_ratio=1, **settings) as segment:
            segment.trainables.set_learning_rate(1e-3)
            rates = {group.name: group.learning_rate.item() for group in segment.trainables.groups}
        assert rates == pytest.approx({"unet": 1e-3, "text_encoder": factor * 1e-3})
    with pytest.raises(ConfigError, match="text_encoder_lr: expected train_text_encoder"):
        build({"base_model": "x", "train_data_dir": "x", "text_encoder_lr": 1e-4})


def test_no_layer_left_is_said(checkpoint):
    with pytest.raises(ConfigError, match="clip_skip: 2 leaves no layer"), opened(checkpoint, clip_skip=2):
        pass


# --- runs


def test_runs_repeat_bit_by_bit_and_checkpointing_changes_no_bit(settings):
    first, second = (train(settings, **TEXT)[1] for _ in range(2))
    assert first == second
    assert weights(train(settings, **TEXT, gradient_checkpointing=True)[1]) == weights(first)


def test_batch_and_accumulation_are_the_same_mathematics(settings):
    """4 = 2 × 2 = 1 × 4, dropout and padding too."""
    whole = []
    for size, accumulation in ((4, 1), (2, 2), (3, 2), (1, 4)):
        changes = {"batch_size": size, "gradient_accumulation_steps": accumulation, "epochs": 1, "resolution": 64}
        events, _ = train(settings, **TEXT, **changes, validation_split=0.33)
        (step,) = of(events, StepDone)
        whole.append(step)
    assert all(abs(step.loss - whole[0].loss) < 1e-5 for step in whole)
    assert all(abs(step.grad_norm - whole[0].grad_norm) < 1e-4 * whole[0].grad_norm for step in whole)


def test_a_segment_ends_and_the_next_goes_on_as_if_nothing_had_happened(settings):
    class Interrupted(AloneLease):
        asked = 0

        def hand_over(self, make_room=None):
            self.asked += 1
            return self.asked % 2 == 1

    assert train(settings, **TEXT, lease=Interrupted())[1] == train(settings, **TEXT)[1]


def test_captions_of_any_length_are_encoded_live_and_validation_begins_at_the_base(settings, pictures):
    (pictures / "metadata.csv").unlink()
    for number, picture in enumerate(sorted(pictures.glob("*.png"))):
        picture.with_suffix(".txt").write_text("a cat " * (60 if number % 2 else 1), encoding="utf-8")
    changes = {"validation_split": 0.4, "learning_rate": 1e-2, "resolution": 64}
    events, data = train(settings, **TEXT, **changes)
    plain, _ = train(settings, **changes)
    (first, last), (theirs, _) = of(events, Validated)[:2], of(plain, Validated)[:2]
    assert first.lora == first.base == pytest.approx(theirs.base, abs=1e-6)
    assert last.lora != last.base
    assert last.base == first.base
    started = of(events, Started)[0]
    assert started.modules == of(plain, Started)[0].modules + 6
    assert started.trainable > of(plain, Started)[0].trainable
    assert all(tensor.any() for name, tensor in load(data).items() if name.startswith("lora_te_"))
    # The UNet's own beginning is that of a run without it.
    assert of(events, StepDone)[0].loss == pytest.approx(of(plain, StepDone)[0].loss, rel=1e-5)


def header(data: bytes) -> dict:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def test_files_hold_both_networks_and_those_of_the_unet_alone_say_nothing_new(settings):
    _, both = train(settings, **TEXT, text_encoder_lr=3e-5)
    _, unet = train(settings)
    added = load(both).keys() - load(unet).keys()
    layer = "lora_te_text_model_encoder_layers_0"
    modules = [f"self_attn_{name}_proj" for name in ("q", "k", "v", "out")] + ["mlp_fc1", "mlp_fc2"]
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert added == {f"{layer}_{module}.{part}" for module in modules for part in parts}
    assert header(both)["ss_text_encoder_lr"] == "3e-05"
    assert json.loads(header(both)["lora_trainer_config"])["train_text_encoder"] is True
    assert header(unet)["ss_text_encoder_lr"] == "None"
    assert "text_encoder" not in header(unet)["lora_trainer_config"]


def test_previews_are_drawn_with_the_trained_encoder(settings, monkeypatch):
    latents, decode = [], sampling.decode
    monkeypatch.setattr(sampling, "decode", lambda vae, x: latents.append(x) or decode(vae, x))
    changes = {"sample_prompts": [LONG], "sample_steps": 2, "text_encoder_lr": 0.1, "save_precision": "fp32"}
    _, data = train(settings, **TEXT, **changes, resolution=64)
    unet = {key: tensor for key, tensor in load(data).items() if key.startswith(UNET_PREFIX)}
    recipe = Recipe((64, 64), steps=2)
    for tensors in (load(data), unet):
        lora = Path(settings["output_dir"]) / "again.safetensors"
        save_file(tensors, lora)
        model = open_model(Path(settings["base_model"]), CPU)
        sampling.apply_lora(model, lora)
        sampling.generate(model, [LONG], recipe, Precision(CPU, torch.float32))
    drawn, both, without = latents
    torch.testing.assert_close(both, drawn, rtol=1e-5, atol=1e-5)
    assert (without - drawn).abs().max() > 1e-3


def test_only_what_is_trained_takes_the_compute_dtype(checkpoint):
    from lora_trainer.hosts.standalone import FileModels

    for trained, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        with FileModels(checkpoint, CPU, torch.bfloat16, train_text=trained).borrow() as model:
            assert next(model.text.module.parameters()).dtype == dtype
            assert (model.unet.dtype, model.vae.dtype) == (torch.bfloat16, torch.float32)
    _, state = place(checkpoint, CPU, torch.bfloat16)
    assert {t.dtype for name, t in state.items() if name.startswith(UNET)} == {torch.bfloat16}


def test_bf16_trains(settings):
    events, data = train(settings, **TEXT, mixed_precision="bf16", epochs=1)
    assert all(step.loss == step.loss for step in of(events, StepDone))
    assert any(tensor.any() for name, tensor in load(data).items() if name.startswith("lora_te_") and "up" in name)
