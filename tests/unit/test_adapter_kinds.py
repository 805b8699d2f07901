"""Kinds of adapters: they train what their files say by the hosts' formulas, as a plain reference does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lora_trainer.adapters.inspect import describe
from lora_trainer.adapters.kinds import KINDS
from lora_trainer.adapters.load import read_adapter, read_lora
from lora_trainer.adapters.lycoris import Rotation, Scales
from lora_trainer.adapters.naming import kohya_name
from lora_trainer.adapters.parts import parts_of, whole_attention
from lora_trainer.config import build
from lora_trainer.errors import ConfigError, ModelError
from lora_trainer.events import Notice
from lora_trainer.hosts.standalone import open_model
from lora_trainer.sampling import apply_lora
from lora_trainer.training.output import _kohya
from lora_trainer.training.segment import open_segment
from tests.formulas import added, modules_of
from tests.tiny_sdxl import tiny_sdxl_checkpoint
from tests.unit.test_run import of, train, weights
from tests.unit.test_text_encoder import NoWaiting, batch

CPU = torch.device("cpu")
NEEDED = {"base_model": "x", "train_data_dir": "x", "mixed_precision": "no", "lora_dropout": 0.0}
OTHER = ("dora", "loha", "lokr", "ia3", "oft")
WIDE = {"target_modules": ["default", "conv"], "train_text_encoder": True, "lora_rank": 3, "lora_alpha": 4}


@pytest.fixture(scope="module")
def xl(tmp_path_factory) -> Path:
    return tiny_sdxl_checkpoint(tmp_path_factory.mktemp("xl"))


def opened(path: Path, **changes):
    return open_segment(build(NEEDED, changes), open_model(path, CPU), None)


def wake(segment) -> None:
    """Adapters that do something, as after some training."""
    for slot in segment.trainables.slots:
        part, noise = slot.of(segment.trainables.masters), torch.Generator().manual_seed(slot.start)
        part.add_(torch.randn(part.shape, generator=noise), alpha=0.02)
    segment.working.refresh()


def response(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the adapter of a layer adds to its answer, in float64."""
    with torch.no_grad():
        return layer(x).double() - layer.get_base_layer()(x).double()


def impulses(weight: torch.Tensor) -> torch.Tensor:
    """Each input of a module alone: for a convolution one pixel, at four places that all taps of any stride see."""
    inputs = torch.eye(weight.shape[1])
    if weight.dim() == 2:
        return inputs
    places = F.one_hot(torch.tensor([5, 6, 9, 10]), 16).view(4, 1, 1, 4, 4)
    return (inputs[None, :, :, None, None] * places).flatten(0, 1)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_says_what_was_trained(checkpoint, xl, kind, family):
    """Each module's change by the WebUI's formula, from the file alone, is the trained module's."""
    with opened(xl if family == "sdxl" else checkpoint, adapter=kind, **WIDE, conv_rank=2) as segment:
        wake(segment)
        modules, parts = modules_of(_kohya(segment)), parts_of(segment.model)
        for network, adapter in segment.adapters.items():
            part = parts[network]
            for name, layer in adapter.layers.items():
                inner = part.named(name.removeprefix("text_encoder_2."))
                base = layer.get_base_layer()
                weight, delta = base.weight.detach(), added(modules.pop(kohya_name(part.prefix, inner)), base.weight)
                assert delta.abs().max() > 1e-4, name
                x = impulses(weight)
                if weight.dim() == 2:
                    expected = delta.t()
                else:
                    expected = F.conv2d(x.double(), delta.detach(), None, base.stride, base.padding)
                assert (response(layer, x) - expected).abs().max() < 1e-6, name
        # What is left is the zeros that complete a packed attention.
        assert not any(added(left, torch.zeros(16, 16)).any() for left in modules.values())


def reference(segment, path: Path, given) -> dict[str, torch.Tensor]:
    """Gradients by the parameters' names of a step on a plain float64 network whose weights are W + ΔW."""
    (adapter,) = segment.adapters.values()
    plain = open_model(path, CPU).unet.double()
    leaves, changed = {}, {}
    for name, f in adapter.factors().items():
        weight = plain.get_submodule(name).weight.detach()
        parts = {key: tensor.double().requires_grad_() for key, tensor in f.parts().items() if tensor.dim()}
        called = {"lora_down.weight": "lora_A", "lora_up.weight": "lora_B", "dora_scale": "magnitude"}
        called |= {"weight": "ia3_weight"}
        leaves |= {f"{name}.{called.get(key, key)}": leaf for key, leaf in parts.items()}
        held = {**f.parts(), **parts} | ({} if f.alpha is None else {"alpha": torch.tensor(f.alpha)})
        scale = held.pop("dora_scale", None)
        merged = weight + added(held, weight)
        if scale is not None:
            dims = [dim for dim in range(merged.dim()) if dim != 1]
            merged = merged * scale / merged.detach().square().sum(dim=dims, keepdim=True).sqrt()
        changed[f"{name}.weight"] = merged
    abar = segment.model.noise.alphas_cumprod.double()[given.t].view(-1, 1, 1, 1)
    noisy = abar.sqrt() * given.latents.double() + (1 - abar).sqrt() * given.eps.double()
    told = given.condition()
    out = functional_call(
        plain, changed, (noisy, given.t), {"encoder_hidden_states": told["encoder_hidden_states"].double()}
    )
    loss = ((out.sample - given.eps).square().mean(dim=(1, 2, 3)) * given.weight).sum()
    loss.backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_a_plain_reference(checkpoint, kind, checkpointing):
    """Through the fused blocks, convolutions and flat gradients. DoRA's norm is a constant to the gradient."""
    changes = {"target_modules": ["default", "conv"], "gradient_checkpointing": checkpointing}
    with opened(checkpoint, adapter=kind, lora_rank=3, **changes) as segment:
        wake(segment)
        given = batch(segment.model)
        with torch.no_grad():
            context = torch.randn(2, 77, 16, generator=torch.Generator().manual_seed(1))
        given = replace(given, ids=None, context=context)
        segment.forward_backward(given)
        grads = {slot.name: slot.of(segment.trainables.grads).double() for slot in segment.trainables.slots}
        expected = reference(segment, checkpoint, given)
    assert grads.keys() == expected.keys()
    least = 1e-6 * max(grad.norm() for grad in expected.values())
    for name, theirs in expected.items():
        assert (grads[name] - theirs.view(grads[name].shape)).norm() <= 1e-4 * theirs.norm() + least, name


@pytest.mark.parametrize("kind", OTHER)
def test_runs_repeat_checkpointing_changes_nothing_and_files_are_applied(settings, kind):
    changes = {"adapter": kind, "save_precision": "fp32", "learning_rate": 1e-2, "resolution": 64}
    changes |= {"target_modules": ["default", "conv"], "rank_dropout": 0.2, "module_dropout": 0.1}
    _, first = train(settings, **changes)
    _, again = train(settings, **changes, gradient_checkpointing=True)
    assert weights(again) == weights(first)
    path, given = Path(settings["output_dir"]) / "tiny.safetensors", torch.randn(2, 77, 16)
    noisy, t, unets = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), []
    model = open_model(Path(settings["base_model"]), CPU)

    @torch.no_grad()
    def answer(network):
        return network(noisy, t, encoder_hidden_states=given).sample

    base, modules = answer(model.unet), modules_of(load(first))
    applied = apply_lora(model, path)
    for strength in (1.0, 0.5, 0.0):
        changed = {}
        plain = open_model(Path(settings["base_model"]), CPU).unet
        for name, module in plain.named_modules():
            parts = modules.get(kohya_name("lora_unet", name))
            if parts is not None:
                changed[f"{name}.weight"] = (module.weight + strength * added(parts, module.weight)).float()
        with torch.no_grad():
            expected = functional_call(plain, changed, (noisy, t), {"encoder_hidden_states": given}).sample
        with applied.weight(strength):
            unets.append(answer(model.unet))
        assert (unets[-1] - expected).abs().max() < 1e-4, strength
    assert torch.equal(unets[2], base)
    assert (unets[0] - base).abs().max() > 1e-3
    assert len(changed) == len(modules)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_in_the_step_waits_for_the_device(checkpoint, kind):
    """A captured step cannot."""
    changes = {"rank_dropout": 0.2, "module_dropout": 0.1, "lora_dropout": 0.1, **WIDE}
    with opened(checkpoint, adapter=kind, **changes) as segment:
        given = batch(segment.model)
        segment.forward_backward(given)
        with NoWaiting():
            segment.forward_backward._compute(segment.forward_backward.buffers[given.shape])
            segment.update._compute()
        segment.trainables.verify_views()


@pytest.mark.parametrize("kind", KINDS)
def test_a_segments_adapter_acts_in_proportion_to_its_strength(checkpoint, kind):
    """As sliders want it, at -1 too, through the fused products and beside them."""
    with opened(checkpoint, adapter=kind, target_modules=["default", "conv"]) as segment:
        wake(segment)
        (adapter,) = segment.adapters.values()
        for name, layer in adapter.layers.items():
            x = impulses(layer.get_base_layer().weight)
            whole = response(layer, x)
            assert whole.abs().max() > 1e-4, name
            for strength in (-1.0, 0.5):
                with adapter.weight(strength):
                    assert (response(layer, x) - strength * whole).abs().max() < 1e-6, name


def test_a_fresh_adapter_changes_nothing(checkpoint):
    for kind in KINDS:
        with opened(checkpoint, adapter=kind, **WIDE) as segment:
            for adapter in segment.adapters.values():
                for layer in adapter.layers.values():
                    assert response(layer, impulses(layer.get_base_layer().weight)).abs().max() < 1e-6


def test_loha_leaves_out_whole_outputs_of_a_sample(checkpoint):
    with opened(checkpoint, adapter="loha", rank_dropout=0.5) as segment:
        wake(segment)
        name = next(iter(segment.adapters["unet"].layers))
        keys = batch(segment.model).mask_keys
        dropout, change = segment.network.dropout, segment.adapters["unet"].computed[name]
        x = torch.randn(2 * 5, change.layer.get_base_layer().weight.shape[1])
        with torch.no_grad(), dropout.masks(("any",), keys):
            kept = change.linear(x).view(2, 5, -1)
        with torch.no_grad():
            whole = change.linear(x).view(2, 5, -1)
        share = (kept / whole).round(decimals=4)
        assert (share == share[:, :1]).all()
        assert set(share.unique().tolist()) == {0.0, 2.0}
        assert not torch.equal(share[0], share[1])


# --- files


def test_files_have_the_names_of_lycoris_and_inspection_tells_the_kind(settings):
    parts = {
        "dora": {"lora_down.weight", "lora_up.weight", "dora_scale", "alpha"},
        "loha": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"},
        "lokr": {"lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "alpha"},
        "ia3": {"weight", "on_input"},
        "oft": {"oft_blocks", "alpha"},
    }
    algorithms = {"dora": "lora", "oft": "diag-oft"}
    names = {"dora": "DoRA", "loha": "LoHa", "lokr": "LoKr", "ia3": "IA3", "oft": "OFT"}
    for kind in OTHER:
        events, data = train(settings, adapter=kind, max_train_steps=2, resolution=64)
        path = Path(settings["output_dir"]) / "tiny.safetensors"
        assert {key.partition(".")[2] for key in load(data)} == parts[kind]
        assert all(t.dtype == torch.float32 for name, t in load(data).items() if name.endswith(("alpha", "dora_scale")))
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        assert header["ss_network_module"] == "lycoris.kohya"
        algorithm = json.loads(header["ss_network_args"])
        assert algorithm["algo"] == algorithms.get(kind, kind)
        name = names[kind]
        report, factors = describe(path), read_adapter(path).factors
        assert report.kind == name
        assert report.warnings == ()
        if kind != "dora":
            # Of kinds whose change depends on the weight that of an identity.
            sizes = {name: [size for size in f.sizes if size] for name, f in factors.items()}
            like = {name: torch.eye(*of) if len(of) == 1 else torch.zeros(of) for name, of in sizes.items()}
            if kind == "ia3":
                like = {name: of[(...,) + (None,) * (factors[name].weight.dim() - 2)] for name, of in like.items()}
            norms = [added(modules_of(load(data))[name], weight).norm() for name, weight in like.items()]
            assert sum(norm**2 for norm in report.norms.values()) == pytest.approx(sum(n.item() ** 2 for n in norms))
        told = any("lora_dropout" in notice.text for notice in of(events, Notice))
        assert told == (kind != "dora")
        with pytest.raises(ModelError, match=f"expected a LoRA, found {name}"):
            read_lora(path)


def test_lokr_is_whole_where_a_product_would_not_be_smaller(checkpoint):
    with opened(checkpoint, adapter="lokr", lora_rank=64, lora_alpha=1) as segment:
        f = next(iter(segment.adapters["unet"].factors().values()))
        assert f.w2 is not None
        assert f.scale == 1
    with opened(checkpoint, adapter="lokr", lora_rank=2, lora_alpha=1, lokr_factor=4) as segment:
        f = next(iter(segment.adapters["unet"].factors().values()))
        assert f.w1.shape == (4, 4)
        assert f.scale == 0.5


def test_oft_turns_by_any_angle_and_is_read_with_a_constraint(tmp_path):
    """A rotation keeps lengths; kohya's names and constraint, which no run here has."""
    for size in (0.01, 0.1, 0.4):
        blocks = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1)) * size
        weight = torch.randn(32, 5, dtype=torch.float64)
        turn = Rotation(blocks).turn() + torch.eye(8)
        assert (turn @ turn.transpose(1, 2) - torch.eye(8)).abs().max() < 1e-5, size
        for constraint in (0.0, 0.05, 1e3):
            file = tmp_path / "oft.safetensors"
            held = {"oft_blocks": blocks, "alpha": torch.tensor(constraint)}
            save_file({f"oft_unet_input_blocks_1_1_proj_in.{part}": tensor for part, tensor in held.items()}, file)
            (f,) = read_adapter(file).factors.values()
            assert (f.kind, f.rank, f.sizes) == ("OFT", 8, (32, None))
            expected = added({part: tensor.double() for part, tensor in held.items()}, weight)
            assert (f.delta(weight) - expected).abs().max() < 1e-5, (size, constraint)


def test_ia3_scales_inner_values_where_they_come_in_and_channels_where_they_go_out(checkpoint):
    changes = {"adapter": "ia3", "target_modules": ["default", "conv"], "train_text_encoder": True}
    with opened(checkpoint, **changes) as segment:
        learned = {name: f for adapter in segment.adapters.values() for name, f in adapter.factors().items()}
        inputs = {name for name, f in learned.items() if f.on_input}
        convs = {name for name, f in learned.items() if f.weight.dim() == 4}
        assert convs < inputs
        assert all(name.endswith(("ff.net.2", "mlp.fc2")) for name in inputs - convs)
        assert len(inputs - convs) == sum(name.endswith(("ff.net.2", "mlp.fc2")) for name in learned)


def test_ia3_of_a_convolutions_outputs_is_refused(settings):
    """The WebUI would not apply it."""
    train(settings, adapter="ia3", max_train_steps=1, resolution=64, conv_rank=1)
    path = Path(settings["output_dir"]) / "tiny.safetensors"
    turned = load(path.read_bytes())
    key = min(key for key in turned if key.endswith("resnets_0_conv1.on_input"))
    turned[key] = torch.tensor(0)
    name = key.removesuffix(".on_input")
    weight = open_model(Path(settings["base_model"]), CPU).unet.get_submodule("down_blocks.0.resnets.0.conv1").weight
    assert name == "lora_unet_down_blocks_0_resnets_0_conv1"
    turned[f"{name}.weight"] = torch.ones(1, len(weight), 1, 1)
    save_file(turned, path)
    with pytest.raises(ModelError, match="conv1 scales a convolution's outputs, as the WebUI does not"):
        apply_lora(open_model(Path(settings["base_model"]), CPU), path)


@pytest.mark.parametrize("f", [Scales(torch.ones(8, 1)), Scales(torch.ones(1, 8)), Rotation(torch.ones(2, 4, 4))])
def test_a_packed_attention_is_completed_by_zeros_of_its_width(f):
    """The WebUI applies all four or none."""
    whole = whole_attention({"layers.0.self_attn.q_proj": f, "layers.0.mlp.fc1": f})
    added = {name.rpartition(".")[2]: of for name, of in whole.items() if of is not f}
    assert added.keys() == {"k_proj", "v_proj", "out_proj"}
    assert all((of.kind, of.sizes, bool(of.up.any())) == ("LoRA", (8, 8), False) for of in added.values())


GOOD = {"hada_w1_a": (5, 2), "hada_w1_b": (2, 6), "hada_w2_a": (5, 2), "hada_w2_b": (2, 6)}


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({**GOOD, "hada_w2_b": None}, "lacks its hada_w2_b"),
        ({**GOOD, "hada_w1_b": (3, 6)}, r"shapes \[5, 2\] and \[3, 6\]"),
        ({**GOOD, "hada_w2_a": (4, 2)}, "expected equal ones"),
        ({**GOOD, "lora_up.weight": (5, 2)}, "holds two kinds of adapter"),
        ({**GOOD, "dora_scale": (1, 6)}, "dora_scale beside hada"),
        ({"lokr_w1": (2, 2)}, "lacks its lokr_w2, or lokr_w2_a and lokr_w2_b"),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (3, 2)}, "lacks its lokr_w2"),
        ({"lokr_w1": (2,), "lokr_w2": (3, 2)}, "no matrices"),
        ({"lora_up.weight": (5, 2), "lora_down.weight": (2, 6), "hada_t1": (2, 2, 3, 3)}, "of another adapter"),
        ({"lora_up.weight": (5, 2), "lora_down.weight": (2, 6), "lora_mid.weight": (2, 2, 3, 3)}, "of another adapter"),
        ({"weight": (5,)}, "lacks its on_input"),
        ({"on_input": ()}, "lacks its weight"),
        ({"weight": (5,), "on_input": (2,)}, "on_input has 2 numbers"),
        ({"weight": (5, 2), "on_input": ()}, r"shape \[5, 2\]; expected one number a channel"),
        ({"oft_blocks": (2, 3, 4)}, r"shape \[2, 3, 4\]; expected \[k, n, n\]"),
        ({"oft_blocks": (1, 2, 4, 4)}, "as BOFT has them"),
        ({"oft_blocks": (2, 4, 4), "rescale": (8, 1)}, "of another adapter"),
        ({"oft_blocks": (2, 4, 4), "weight": (8,)}, "holds two kinds of adapter"),
    ],
)
def test_broken_files_are_named(tmp_path, parts, words):
    path = tmp_path / "a.safetensors"
    shaped = {part: shape for part, shape in parts.items() if shape is not None}
    save_file({f"lora_unet_x.{part}": torch.ones(shape) for part, shape in shaped.items()}, path)
    with pytest.raises(ModelError, match=words):
        read_adapter(path)


def test_a_dora_of_the_outputs_is_refused(settings):
    train(settings, adapter="dora", max_train_steps=1, resolution=64)
    path = Path(settings["output_dir"]) / "tiny.safetensors"
    turned = load(path.read_bytes())
    # A file's tensors come in any order.
    key = min(key for key in turned if key.endswith("ff_net_0_proj.dora_scale"))
    turned[key] = torch.ones(len(turned[key.replace("dora_scale", "lora_up.weight")]), 1)
    save_file(turned, path)
    with pytest.raises(ModelError, match="expected 32, one for each input"):
        apply_lora(open_model(Path(settings["base_model"]), CPU), path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter": "loha", "loraplus_lr_ratio": 4}, "loraplus_lr_ratio: expected 1, since loha"),
        (
            {"adapter": "dora", "scale_weight_norms": 1},
            "scale_weight_norms: expected adapter lora beside it, found dora",
        ),
        ({"adapter": "dora", "output_format": "both"}, "output_format: expected webui, since diffusers reads no dora"),
        ({"adapter": "loha", "initial_lora": "x"}, "initial_lora: expected adapter lora beside it, found loha"),
        ({"lokr_factor": 4}, "lokr_factor: expected adapter lokr beside it, found lora"),
        ({"adapter": "oft", "loraplus_lr_ratio": 4}, "loraplus_lr_ratio: expected 1, since oft"),
        ({"adapter": "ia3", "conv_rank": 2, "conv_alpha": 2.0}, "conv_alpha: expected none, since ia3 has no alpha"),
        (
            {"adapter": "oft", "text_encoder_rank": 1, "train_text_encoder": True},
            "text_encoder_rank: expected 2 or more",
        ),
        ({"adapter": "lohr"}, "adapter: expected lora, dora, loha, lokr, ia3 or oft, found 'lohr'; did you mean lo"),
    ],
)
def test_what_a_kind_does_not_do_is_said(changes, words):
    with pytest.raises(ConfigError, match=words):
        build(NEEDED, changes)
