"""`lora-trainer merge`: LoRAs in one LoRA, and in a checkpoint as the WebUI would apply them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_trainer.adapters.load import read_lora
from lora_trainer.adapters.naming import Factors
from lora_trainer.cli import main
from lora_trainer.errors import ConfigError, ModelError
from lora_trainer.hosts.standalone import open_model
from lora_trainer.models.checkpoint import read_header
from lora_trainer.sampling import apply_lora
from lora_trainer.tools.merge import Weighted, merge
from lora_trainer.tools.merge_into import merge_into
from lora_trainer.tools.outline import outline
from lora_trainer.tools.result import kohya_tensors
from tests.tiny import tiny_state
from tests.tiny_sdxl import tiny_sdxl_checkpoint
from tests.unit.test_resize import delta
from tests.unit.test_sd2 import checkpoint as sd2_checkpoint

CPU = torch.device("cpu")
PROJ, CONV, TEXT = (
    "lora_unet_mid_block_attentions_0_proj_in",
    "lora_unet_down_blocks_0_resnets_0_conv1",
    "lora_te_text_model_encoder_layers_0_mlp_fc1",
)


def module(rank, alpha, *, seed, kernel=(), dtype=torch.float16) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, 10, *kernel, generator=generator), torch.randn(12, rank, generator=generator)
    return Factors(down.to(dtype), up.reshape(12, rank, *[1] * len(kernel)).to(dtype), alpha)


def put(path: Path, factors, **metadata) -> Path:
    save_file(kohya_tensors(factors), path, {"ss_base_model_version": "sd_v1", "ss_v2": "False", **metadata})
    return path


@pytest.fixture
def two(tmp_path):
    """Of other ranks, alphas and number formats; one has its 1×1 convolution as a linear layer."""
    a = {PROJ: module(4, 4.0, seed=1, kernel=(1, 1)), CONV: module(4, 2.0, seed=2, kernel=(3, 3))}
    b = {PROJ: module(2, 3.0, seed=3), TEXT: module(2, 3.0, seed=4)}
    words = {"modelspec.trigger_phrase": "old, new", "modelspec.architecture": "stable-diffusion-v1/lora"}
    put(tmp_path / "a.safetensors", a, **words)
    put(tmp_path / "b.safetensors", b, **{**words, "modelspec.trigger_phrase": "new, blue"})
    return tmp_path / "a.safetensors", tmp_path / "b.safetensors"


# --- into one LoRA


def test_the_sum_is_what_both_add(two, tmp_path, capsys):
    a, b = two
    out = tmp_path / "out.safetensors"
    assert main(["merge", str(out), f"{a}:0.8", f"{b}:-0.5", "--precision", "fp32"]) == 0
    assert "2 LoRAs in one, 3 modules of rank 2 to 6" in capsys.readouterr().out
    mine, first, second = (read_lora(path).factors for path in (out, a, b))
    assert mine[PROJ].down.shape == (6, 10, 1, 1)
    expected = {PROJ: 0.8 * delta(first[PROJ]) - 0.5 * delta(second[PROJ])}
    expected |= {CONV: 0.8 * delta(first[CONV]), TEXT: -0.5 * delta(second[TEXT])}
    assert mine.keys() == expected.keys()
    for name, change in expected.items():
        torch.testing.assert_close(delta(mine[name]), change, rtol=1e-6, atol=1e-6)


def test_equal_scales_leave_every_number_as_it_is(two, tmp_path):
    """The weight is then in alpha alone."""
    a, _ = two
    merge([Weighted(a, 0.5), Weighted(a, -0.5)], tmp_path / "out.safetensors")
    mine, first = (read_lora(path).factors[CONV] for path in (tmp_path / "out.safetensors", a))
    assert mine.down.equal(torch.cat([first.down, first.down]))
    assert mine.up.equal(torch.cat([first.up, -first.up], 1))
    assert mine.alpha / mine.rank == 0.5 * first.alpha / first.rank


def test_a_rank_cuts_the_sum_down(two, tmp_path, capsys):
    a, b = two
    out = tmp_path / "out.safetensors"
    assert main(["merge", str(out), f"{a}:0.8", str(b), "--rank", "3", "--precision", "fp32"]) == 0
    assert "of its norm is kept" in capsys.readouterr().out
    mine, first, second = (read_lora(path).factors[PROJ] for path in (out, a, b))
    u, values, v = torch.linalg.svd(0.8 * delta(first) + delta(second), full_matrices=False)
    assert mine.rank == 3
    torch.testing.assert_close(delta(mine), (u[:, :3] * values[:3]) @ v[:3], rtol=1e-5, atol=1e-5)


def test_the_header_says_what_is_in_it(two, tmp_path):
    a, b = two
    merge([Weighted(a, 0.8), Weighted(b, 0.5)], tmp_path / "out.safetensors")
    said = read_lora(tmp_path / "out.safetensors").metadata
    merged = json.loads(said["lora_trainer_merged"])
    assert [(one["name"], one["weight"]) for one in merged] == [("a.safetensors", 0.8), ("b.safetensors", 0.5)]
    assert said["modelspec.trigger_phrase"] == "old, new, blue"
    assert said["modelspec.merged_from"] == "a.safetensors, b.safetensors"
    expected = ("sd_v1", "False", "out", "Dynamic")
    assert tuple(said[f"ss_{key}"] for key in ("base_model_version", "v2", "output_name", "network_dim")) == expected


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors", "a.safetensors", 1.0),
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", 1.0),
        (r"C:\loras\a.safetensors:-1", r"C:\loras\a.safetensors", -1.0),
    ],
)
def test_a_file_and_its_weight(text, path, weight):
    assert Weighted.parse(text) == Weighted(Path(path), weight)


@pytest.mark.parametrize("text", ["a:0", "a:nan", "a:inf", ":0.5", ""])
def test_weights_that_mean_nothing(text):
    with pytest.raises(ConfigError, match="expected FILE or FILE:WEIGHT"):
        Weighted.parse(text)


def test_what_does_not_go_together(two, tmp_path, capsys):
    a, _ = two
    xl = put(tmp_path / "xl.safetensors", {PROJ: module(2, 1.0, seed=1)}, ss_base_model_version="sdxl_base_v1-0")
    out = tmp_path / "out.safetensors"
    with pytest.raises(ModelError, match=r"xl\.safetensors: a LoRA for SDXL; .*a\.safetensors is for Stable Diff"):
        merge([Weighted(a, 1.0), Weighted(xl, 1.0)], out)
    other = Factors(torch.randn(2, 11), torch.randn(12, 2), 1.0)
    wide = put(tmp_path / "wide.safetensors", {PROJ: other})
    with pytest.raises(ModelError, match="made for another base model than .*proj_in has other sizes"):
        merge([Weighted(a, 1.0), Weighted(wide, 1.0)], out)
    assert main(["merge", str(out), str(a), "--into", "x.safetensors", "--rank", "2"]) == 2
    assert "expected no --rank and no --precision with --into" in capsys.readouterr().err
    assert not out.exists()


# --- into a checkpoint


def everywhere(path: Path, target: Path, *, scale: float, seed: int) -> Path:
    """A LoRA on every linear layer and convolution of a checkpoint, by kohya's names."""
    whole, generator = outline(path), torch.Generator().manual_seed(seed)
    found: dict[str, dict[str, Factors]] = {network: {} for network in whole.parts}
    for key, shape in whole.shapes.items():
        for network, name, view in whole.weights(key, torch.empty(shape, device="meta")):
            if view.dim() < 2 or "embedding" in name:
                continue
            shape = view.shape
            up = torch.randn(shape[0], 2, generator=generator).reshape(-1, 2, *[1] * (len(shape) - 2))
            down = torch.randn(2, *shape[1:], generator=generator) / shape[1:].numel() ** 0.5
            found[network][name] = Factors(down, scale * up, 3.0)
    factors = {n: f for network, modules in found.items() for n, f in whole.parts[network].in_files(modules).items()}
    save_file(kohya_tensors(factors), target, {"ss_base_model_version": whole.family.base_version})
    return target


def webui(weight, tensors, name, multiplier):
    """WebUI 1.10.1, network_lora.py calc_updown and network.py finalize_updown, without half precision."""
    up, down = (tensors[f"{name}.lora_{part}.weight"].float() for part in ("up", "down"))
    updown = up.reshape(up.size(0), -1) @ down.reshape(down.size(0), -1)
    updown = updown.reshape(weight.shape)
    updown = updown * (tensors[f"{name}.alpha"].item() / down.shape[0])
    return updown * multiplier


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def base(request, tmp_path) -> Path:
    if request.param == "sd1":
        path = tmp_path / "tiny.safetensors"
        save_file(tiny_state(), path, {"title": "tiny ü", "modelspec.hash_sha256": "0" * 64})
        return path
    return sd2_checkpoint(tmp_path) if request.param == "sd2" else tiny_sdxl_checkpoint(tmp_path)


def test_a_checkpoint_is_what_the_webui_would_draw_with(base, tmp_path):
    """Bit by bit, and the same model as with the LoRAs applied."""
    loras = [everywhere(base, tmp_path / f"{n}.safetensors", scale=0.1, seed=n) for n in (1, 2)]
    out = tmp_path / "merged.safetensors"
    merge_into(base, [Weighted(loras[0], 0.8), Weighted(loras[1], -0.3)], out)
    before, after, whole = load_file(base), load_file(out), outline(base)
    tensors, changed = [load_file(path) for path in loras], 0
    for key, tensor in before.items():
        expected = tensor.clone()
        for network, name, view in whole.weights(key, expected):
            for known in whole.names(network, name):
                for one, weight in zip(tensors, (0.8, -0.3), strict=True):
                    if f"{known}.alpha" in one:
                        view += webui(view, one, known, weight)
                        changed += 1
        assert after[key].equal(expected), key
    assert changed == 2 * sum(name.endswith(".alpha") for name in tensors[0])
    assert not after.keys() - before.keys()


def test_its_layout_and_metadata_stay(tmp_path):
    path, out = tmp_path / "tiny.safetensors", tmp_path / "merged.safetensors"
    state = {
        name: t.half() if t.dim() == 4 else t.bfloat16() if "norm" in name else t for name, t in tiny_state().items()
    }
    save_file(state, path, {"title": "tiny ü", "modelspec.hash_sha256": "0" * 64})
    lora = everywhere(path, tmp_path / "a.safetensors", scale=0.1, seed=1)
    for source, target in ((path, out), (out, tmp_path / "twice.safetensors")):
        assert main(["merge", str(target), f"{lora}:0.5", "--into", str(source)]) == 0
    before, after, twice = (read_header(file) for file in (path, out, tmp_path / "twice.safetensors"))
    assert before.pop("__metadata__")["title"] == (said := after.pop("__metadata__"))["title"]
    assert before == after
    assert "modelspec.hash_sha256" not in said
    assert len(json.loads(said["lora_trainer_merged"])) == 1
    assert len(json.loads(twice["__metadata__"]["lora_trainer_merged"])) == 2
    mine, theirs = load_file(path), load_file(out)
    key = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    assert theirs[key].equal((mine[key].float() + webui(mine[key], load_file(lora), name, 0.5)).half())
    assert not theirs[key].equal(mine[key])


def test_the_merged_model_is_the_model_with_the_lora(base, tmp_path):
    lora = everywhere(base, tmp_path / "a.safetensors", scale=0.1, seed=1)
    merge_into(base, [Weighted(lora, 1.0)], tmp_path / "merged.safetensors")
    plain, applied, merged = (open_model(path, CPU) for path in (base, base, tmp_path / "merged.safetensors"))
    apply_lora(applied, lora)
    said = [model.text.read("a cat").context.detach() for model in (plain, applied, merged)]
    torch.testing.assert_close(said[1], said[2], rtol=1e-4, atol=1e-4)
    assert (said[0] - said[2]).abs().max() > 1e-2


def test_a_lora_by_any_names_fits(checkpoint, tmp_path):
    lora = everywhere(checkpoint, tmp_path / "a.safetensors", scale=0.1, seed=1)
    merge_into(checkpoint, [Weighted(lora, 1.0)], tmp_path / "m1.safetensors")
    tensors, whole = load_file(lora), outline(checkpoint)
    part = whole.parts["unet"]
    dotted = {name: n for n, m in part.module.named_modules() for name in [f"lora_unet_{n.replace('.', '_')}"]}
    ldm = {
        key.replace(name, f"lora_unet_{part.ldm(dotted[name]).replace('.', '_')}") if name in dotted else key: tensor
        for key, tensor in tensors.items()
        for name in [key.split(".")[0]]
    }
    assert ldm.keys() != tensors.keys()
    save_file(ldm, tmp_path / "ldm.safetensors", {"ss_base_model_version": "sd_v1"})
    merge_into(checkpoint, [Weighted(tmp_path / "ldm.safetensors", 1.0)], tmp_path / "m2.safetensors")
    mine, theirs = (load_file(tmp_path / name) for name in ("m1.safetensors", "m2.safetensors"))
    assert all(tensor.equal(theirs[name]) for name, tensor in mine.items())
    # And the trainer draws with it.
    apply_lora(open_model(checkpoint, CPU), tmp_path / "ldm.safetensors")


def test_nothing_is_written_of_what_does_not_fit(checkpoint, two, tmp_path):
    out = tmp_path / "out.safetensors"
    (tmp_path / "old.ckpt").write_bytes(b"")
    xl = put(tmp_path / "xl.safetensors", {PROJ: module(2, 1.0, seed=1)}, ss_base_model_version="sdxl_base_v1-0")
    huge = everywhere(checkpoint, tmp_path / "huge.safetensors", scale=1e36, seed=1)
    strange = put(tmp_path / "strange.safetensors", {"lora_unet_down_blocks_9_x": module(2, 1.0, seed=1)})
    for base, lora, words in (
        (checkpoint, two[0], "made for another base model: lora_unet_"),
        (checkpoint, xl, r"xl\.safetensors: a LoRA for SDXL; .* is Stable Diffusion 1"),
        (checkpoint, strange, "has no place for lora_unet_down_blocks_9_x"),
        (checkpoint, huge, "too large for its numbers"),
        (two[0], two[1], "this is a LoRA, not a checkpoint"),
        (tmp_path / "old.ckpt", two[0], "expected a .safetensors file"),
    ):
        with pytest.raises(ModelError, match=words):
            merge_into(base, [Weighted(lora, 1e3)], out)
    assert not list(tmp_path.glob(".*"))
    assert not out.exists()
