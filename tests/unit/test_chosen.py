"""What is trained: which modules, how large, how fast, and what is left out at random or held short."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from lora_trainer.adapters.inspect import describe
from lora_trainer.adapters.parts import ldm_names
from lora_trainer.adapters.targets import block_of
from lora_trainer.config import build
from lora_trainer.errors import ConfigError
from lora_trainer.events import Notice, Started, StepDone
from lora_trainer.hosts.standalone import open_model
from lora_trainer.training.chosen import step_notices, unet_sizes
from lora_trainer.training.segment import open_segment
from tests.tiny_sdxl import tiny_sdxl_checkpoint
from tests.unit.test_run import of, train
from tests.unit.test_text_encoder import batch

CPU = torch.device("cpu")
NEEDED = {"base_model": "x", "train_data_dir": "x", "mixed_precision": "no"}
ALONE = {"train_unet": False, "train_text_encoder": True}


@pytest.fixture
def unet(checkpoint):
    return open_model(checkpoint, CPU).unet


def sizes(unet, **changes):
    return unet_sizes(build(NEEDED, changes), unet)


def problems(**changes):
    with pytest.raises(ConfigError) as caught:
        build(NEEDED, changes)
    return caught.value.problems


def test_blocks_are_counted_as_kohya_counts_them(unet):
    """Of SD1 the number is 1 + 3 level + position on the way down, 3 level + position on the way up; here a level has
    one block less."""
    ldm = ldm_names(unet)
    names = {
        "down_blocks.0.attentions.0.proj_in": "IN01",
        "down_blocks.0.downsamplers.0.conv": "IN02",
        "down_blocks.1.resnets.0.conv1": "IN03",
        "mid_block.attentions.0.proj_in": "MID01",
        "up_blocks.0.upsamplers.0.conv": "OUT01",
        "up_blocks.1.attentions.1.proj_out": "OUT03",
        "conv_out": "",
    }
    assert {name: block_of(ldm(name)) for name in names} == names


def test_ranks_and_rates_of_blocks(unet):
    plain = sizes(unet)
    found = sizes(unet, block_ranks=["MID=2", "OUT=6", "OUT03=0"], block_lrs=["IN=0.5", "OUT02=0"], lora_alpha=4)
    ldm = ldm_names(unet)
    by_block: dict[str, set] = {}
    for name, size in found.items():
        by_block.setdefault(block_of(ldm(name)), set()).add((size.rank, size.alpha, size.rate))
    assert by_block["IN01"] == {(8, 4.0, 0.5)}
    assert by_block["MID01"] == {(2, 1.0, 1.0)}
    assert set(by_block) == {"IN01", "MID01"}
    assert list(found) == [name for name in plain if name in found]
    own = sizes(unet, block_alphas=["MID=3"], block_ranks=["MID=2"])
    assert {size.alpha for name, size in own.items() if name.startswith("mid")} == {3.0}
    with pytest.raises(ConfigError, match=r"block_ranks: expected blocks that the model has \(IN00, .*found IN09"):
        sizes(unet, block_ranks=["IN09=4"])


def test_patterns_leave_out_and_keep(unet):
    kept = sizes(unet, include_modules=["*.attn2.*"], exclude_modules=["mid_block.*", "*.to_out.0"])
    assert kept
    assert all(".attn2.to_" in name and not name.startswith("mid") for name in kept)
    assert not any(name.endswith("to_out.0") for name in kept)
    with pytest.raises(
        ConfigError, match="include_modules: expected patterns that leave a module of the UNet, such as"
    ):
        sizes(unet, include_modules=["*.attn7.*"])


def test_convolutions_have_their_own_rank(unet):
    found = sizes(unet, conv_rank=2, lora_rank=4, lora_alpha=2)
    conv = {name for name in found if name.endswith((".conv1", ".conv2", ".conv"))}
    assert set(found) == set(sizes(unet, target_modules=["default", "conv"]))
    assert {(found[name].rank, found[name].alpha) for name in conv} == {(2, 1.0)}
    assert {(found[name].rank, found[name].alpha) for name in found.keys() - conv} == {(4, 2.0)}
    assert {found[n].alpha for n in conv if sizes(unet, conv_rank=2, conv_alpha=9)[n].alpha == 9.0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_ranks": ["IN4"]}, "block_ranks: expected IN04=16, MID=8 or OUT=0, found 'IN4'"),
        ({"block_ranks": ["IN04=2.5"]}, "block_ranks: expected whole numbers from 0 to 1024, found IN04=2.5"),
        ({"block_ranks": ["IN4=2", "IN04=3"]}, "expected each block once, found IN04 with 2 and 3"),
        ({"block_lrs": ["MID=-1"]}, "block_lrs: expected IN04=16"),
        ({"block_alphas": ["MID=0"]}, "block_alphas: expected more than 0"),
        ({"rank_stabilized": True}, "rank_stabilized: expected lora_alpha beside it"),
        ({"conv_alpha": 1}, "conv_alpha: expected conv_rank beside it"),
        ({"train_unet": False}, "train_unet: expected train_text_encoder beside it"),
        ({"text_encoder_rank": 4}, "text_encoder_rank: expected train_text_encoder beside it"),
        ({**ALONE, "conv_rank": 4}, "conv_rank: expected train_unet beside it"),
        ({"optimizer": "prodigy", "loraplus_lr_ratio": 4}, "loraplus_lr_ratio: expected 1, since prodigy"),
        ({"optimizer": "prodigy", "block_lrs": ["IN=2"]}, "block_lrs: expected none, since prodigy"),
        ({"optimizer": "adamwschedulefree", "scale_weight_norms": 1}, "scale_weight_norms: expected 0, since"),
    ],
)
def test_what_does_not_go_together_is_said(changes, words):
    assert any(words in problem for problem in problems(**changes))


# --- steps


def opened(path: Path, **changes):
    return open_segment(build(NEEDED, changes), open_model(path, CPU), None)


def test_up_matrices_learn_faster(checkpoint):
    changes = {"train_text_encoder": True, "block_lrs": ["MID=0.5"], "learning_rate": 2e-4}
    with opened(checkpoint, loraplus_lr_ratio=16, text_encoder_lr=1e-4, **changes) as segment:
        trainables = segment.trainables
        trainables.set_learning_rate(1e-3)
        for slot in trainables.slots:
            (group,) = (g for g in trainables.groups if g.start <= slot.start < g.stop)
            rate = 16e-3 if slot.name.endswith("lora_B") else 1e-3
            share = 0.5 if slot.name.startswith(("mid_block", "text_model")) else 1.0
            assert group.learning_rate.item() == pytest.approx(rate * share), slot.name


def test_the_text_encoders_have_their_own_sizes_and_rates(tmp_path):
    changes = {"train_text_encoder": True, "text_encoder_rank": 2, "text_encoder_lr": 1e-4, "text_encoder_2_lr": 3e-4}
    changes |= {"loraplus_lr_ratio": 1}
    with opened(tiny_sdxl_checkpoint(tmp_path), learning_rate=1e-3, **changes) as segment:
        segment.trainables.set_learning_rate(1e-3)
        rates = {group.name: group.learning_rate.item() for group in segment.trainables.groups}
        assert rates == pytest.approx({"unet": 1e-3, "text_encoder": 1e-4, "text_encoder_2": 3e-4})
        for network, adapter in segment.adapters.items():
            rank = 8 if network == "unet" else 2
            assert {(f.rank, f.alpha) for f in adapter.factors().values()} == {(rank, 2.0 * rank)}


def test_the_text_encoder_alone(settings):
    events, data = train(settings, **ALONE, learning_rate=1e-2)
    names = load(data).keys()
    assert names
    assert all(name.startswith("lora_te_") for name in names)
    assert of(events, Started)[0].modules == len(names) // 3
    assert len({step.loss for step in of(events, StepDone)}) > 1


def test_rank_stabilised_files_come_out_right_by_alpha_over_rank(settings):
    scales = {}
    for rank in (4, 16):
        _, data = train(settings, lora_rank=rank, lora_alpha=3, rank_stabilized=True, max_train_steps=1)
        alphas = {tensor.item() / rank for name, tensor in load(data).items() if name.endswith(".alpha")}
        scales[rank] = alphas.pop()
        assert not alphas
        assert scales[rank] == pytest.approx(3 / math.sqrt(rank), rel=1e-6)


def test_no_module_grows_beyond_the_norm(settings):
    changes = {"learning_rate": 0.05, "save_precision": "fp32", "conv_rank": 2}
    longest = {}
    for most in (0.0, 0.5):
        _, data = train(settings, **changes, scale_weight_norms=most)
        tensors, norms = load(data), []
        for name in tensors:
            if name.endswith("lora_up.weight"):
                down = tensors[name.replace("lora_up", "lora_down")].double()
                alpha = tensors[name.replace("lora_up.weight", "alpha")].item()
                product = torch.einsum("or,ri->oi", tensors[name].double().flatten(1), down.flatten(1))
                norms.append((alpha / len(down) * product).norm().item())
        longest[most] = max(norms)
    assert longest[0.0] > 1
    assert 0.3 < longest[0.5] <= 0.5 * (1 + 1e-5)


def grads(segment, given):
    segment.trainables.grads.zero_()
    segment.forward_backward(given)
    return {slot.name: slot.of(segment.trainables.grads).clone() for slot in segment.trainables.slots}


@pytest.mark.parametrize("kind", ["rank_dropout", "module_dropout"])
def test_ranks_and_modules_are_left_out_for_whole_samples(checkpoint, kind):
    """Of one sample, a rank or module that is off has no gradient at all; the share of those is the setting's."""
    changes = {kind: 0.4, "lora_dropout": 0.0, "target_modules": ["default", "conv"], "train_text_encoder": True}
    with opened(checkpoint, **changes) as segment:
        for slot in segment.trainables.slots:
            slot.of(segment.trainables.masters).normal_(std=0.1, generator=torch.Generator().manual_seed(slot.start))
        segment.working.refresh()
        given = batch(segment.model, ("a cat",))
        first, again = grads(segment, given), grads(segment, given)
        assert all(torch.equal(first[name], again[name]) for name in first)
        ups = {name: grad.flatten(1) for name, grad in first.items() if name.endswith("lora_B")}
        off = {name: (grad == 0).all(dim=0) for name, grad in ups.items()}
        if kind == "module_dropout":
            assert all(each.all() or not each.any() for each in off.values())
        share = torch.cat(list(off.values())).float().mean().item()
        assert 0.25 < share < 0.55
        both = batch(segment.model, ("a cat", "a dog"))
        alone = [both.split(2)[index] for index in (0, 1)]
        whole, parts = grads(segment, both), [grads(segment, part) for part in alone]
        for name, grad in whole.items():
            torch.testing.assert_close(grad, parts[0][name] + parts[1][name], rtol=1e-3, atol=1e-6)


def test_a_kept_rank_is_scaled_up_for_those_left_out(checkpoint):
    with opened(checkpoint, rank_dropout=0.5, lora_dropout=0.0) as segment:
        keys = batch(segment.model, ("a cat",)).mask_keys
        dropout = segment.network.dropout
        name = next(iter(segment.adapters["unet"].layers))
        with dropout.masks(("any",), keys):
            mask = dropout.draw(name, 8, 5).mask()
        assert mask.shape == (5, 8)
        assert (mask == mask[:1]).all()
        assert set(mask.unique().tolist()) == {0.0, 2.0}


def test_headers_and_inspection_tell_what_is_not_ordinary(settings):
    changes = {"conv_rank": 2, "block_ranks": ["MID=2"], "loraplus_lr_ratio": 4, "scale_weight_norms": 1}
    _, data = train(settings, **changes, max_train_steps=1)
    path = Path(settings["output_dir"]) / "tiny.safetensors"
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    expected = {"conv_dim": "2", "conv_alpha": "4", "loraplus_lr_ratio": "4.0", "block_dims": "MID=2"}
    assert json.loads(header["ss_network_args"]) == expected
    assert header["ss_scale_weight_norms"] == "1.0"
    assert json.loads(header["lora_trainer_config"])["conv_rank"] == 2
    assert set(describe(path).ranks) == {2, 4}
    _, data = train(settings, max_train_steps=1, loraplus_lr_ratio=1)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    assert "ss_network_args" not in header
    assert "conv_rank" not in header["lora_trainer_config"]


def test_few_steps_are_said_to_be_few(settings):
    events, _ = train(settings)
    assert sum("steps are few" in event.text for event in of(events, Notice)) == 1
    config = build(NEEDED, {"epochs": 10})
    (told,) = step_notices(config, 40)
    assert told.startswith("40 steps are few")
    assert told.endswith("epochs=40 gives as many")
    assert not [*step_notices(config, 100)]
    assert not [*step_notices(build(NEEDED, {"max_train_steps": 40}), 40)]
