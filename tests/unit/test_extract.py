"""`lora-trainer extract`: the difference of two checkpoints as a LoRA, per family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_trainer.adapters.hashes import checkpoint_hashes
from lora_trainer.adapters.load import read_lora
from lora_trainer.cli import main
from lora_trainer.errors import ModelError
from lora_trainer.hosts.standalone import open_model
from lora_trainer.models.families import SD2, SD2_V
from lora_trainer.sampling import apply_lora
from lora_trainer.tools.extract import Recipe, extract
from lora_trainer.tools.merge import Weighted
from lora_trainer.tools.merge_into import merge_into
from lora_trainer.tools.outline import outline
from tests.tiny import tiny_checkpoint, tiny_state
from tests.tiny_sdxl import tiny_sdxl_checkpoint
from tests.unit.test_resize import delta
from tests.unit.test_sd2 import checkpoint as sd2_checkpoint

CPU = torch.device("cpu")
QUERY = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
QUERY_NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def run(original: Path, tuned: Path, target: Path, **recipe) -> list[str]:
    return extract(
        original, tuned, target, Recipe(**{"rank": 4, "precision": "fp32", **recipe}), sink=lambda event: None
    )


def tuned(base: Path, target: Path, scale: float = 0.02) -> Path:
    """The checkpoint with something added to every tensor."""
    generator = torch.Generator().manual_seed(1)
    state = {
        name: t + scale * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
        for name, t in load_file(base).items()
    }
    save_file(state, target)
    return target


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def base(request, tmp_path) -> Path:
    makers = {"sd1": tiny_checkpoint, "sd2": sd2_checkpoint, "sdxl": tiny_sdxl_checkpoint}
    return makers[request.param](tmp_path)


@pytest.mark.parametrize("conv_rank", [None, 3])
def test_each_module_is_the_best_of_its_rank(base, tmp_path, conv_rank):
    other, out = tuned(base, tmp_path / "tuned.safetensors"), tmp_path / "out.safetensors"
    (told,) = run(base, other, out, conv_rank=conv_rank)
    found, whole = read_lora(out).factors, outline(base)
    before, after, seen = load_file(base), load_file(other), 0
    for key in before:
        changed = after[key] - before[key] if before[key].is_floating_point() else before[key]
        for network, module, view in whole.weights(key, changed):
            f = next((found[name] for name in whole.names(network, module) if name in found), None)
            if f is None:
                continue
            wide = view.dim() == 4 and view.shape[2] > 1
            u, values, v = torch.linalg.svd(view.double().flatten(1), full_matrices=False)
            rank = min(conv_rank if wide else 4, len(values))
            assert (f.rank, f.alpha) == (rank, rank)
            torch.testing.assert_close(delta(f), (u[:, :rank] * values[:rank]) @ v[:rank], rtol=1e-4, atol=1e-6)
            seen += 1
    assert seen == len(found)
    assert any("conv1" in n or "in_layers_2" in n for n in found) == bool(conv_rank)
    assert "of the norm of their difference is kept" in told


def test_a_full_rank_gives_the_tuned_model(base, tmp_path):
    """All layers that a LoRA can hold; the rest of the tuned model is the base's here."""
    state, everything = load_file(base), tuned(base, tmp_path / "all.safetensors", 0.05)
    run(base, everything, tmp_path / "first.safetensors", rank=10_000, conv_rank=10_000)
    merge_into(base, [Weighted(tmp_path / "first.safetensors", 1.0)], tmp_path / "tuned.safetensors")
    out = tmp_path / "out.safetensors"
    run(base, tmp_path / "tuned.safetensors", out, rank=10_000, conv_rank=10_000)
    merge_into(base, [Weighted(out, 1.0)], tmp_path / "again.safetensors")
    mine, theirs = load_file(tmp_path / "again.safetensors"), load_file(tmp_path / "tuned.safetensors")
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-5, atol=1e-5)
    assert sum(not theirs[name].equal(state[name]) for name in state) > 20
    models = [open_model(path, CPU) for path in (base, tmp_path / "tuned.safetensors")]
    apply_lora(models[0], out)
    contexts = [model.text.read("a cat").context.detach() for model in models]
    torch.testing.assert_close(*contexts, rtol=1e-3, atol=1e-3)


def test_what_is_equal_gets_no_module(tmp_path, checkpoint, capsys):
    """Nor what only another number format makes unequal."""
    state = tiny_state()
    state[QUERY] = state[QUERY] + 0.1
    save_file({name: tensor.half() for name, tensor in state.items()}, tmp_path / "tuned.safetensors")
    out = tmp_path / "out.safetensors"
    arguments = ["extract", str(checkpoint), str(tmp_path / "tuned.safetensors"), str(out), "--rank", "2"]
    assert main(arguments) == 0
    assert "1 of unet; 99" in capsys.readouterr().out.replace("100.0%", "99")
    lora = read_lora(out)
    assert (set(lora.factors), lora.precision) == ({QUERY_NAME}, "F16")
    said = lora.metadata
    legacy, sha256 = checkpoint_hashes(checkpoint)
    assert (said["ss_sd_model_hash"], said["ss_new_sd_model_hash"]) == (legacy, sha256)
    expected = {
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_sd_model_name": "tiny.safetensors",
        "ss_output_name": "out",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "2",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.prediction_type": "epsilon",
        "modelspec.title": "out",
    }
    assert {key: said.get(key) for key in expected} == expected
    assert json.loads(said["lora_trainer_extracted"])["from"] == "tuned.safetensors"
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


def test_a_packed_attention_is_written_whole(tmp_path):
    """Of which only the values differ: the WebUI ignores a partial set."""
    base, name = sd2_checkpoint(tmp_path), "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
    state = load_file(base)
    state[name][-len(state[name]) // 3 :] += 0.1 * torch.randn(len(state[name]) // 3, state[name].shape[1])
    save_file(state, tmp_path / "tuned.safetensors")
    run(base, tmp_path / "tuned.safetensors", tmp_path / "out.safetensors", rank=100)
    found = read_lora(tmp_path / "out.safetensors").factors
    parts = {n.rsplit("self_attn_")[1]: bool(f.up.any()) for n, f in found.items()}
    assert parts == {"q_proj": False, "k_proj": False, "v_proj": True, "out_proj": False}


@pytest.mark.parametrize(("yaml", "family"), [("eps", SD2), ("v", SD2_V), (None, SD2)])
def test_what_2_x_predicts_is_said_where_a_yaml_says_it(tmp_path, yaml, family):
    base = sd2_checkpoint(tmp_path, yaml=yaml)
    run(base, tuned(base, tmp_path / "tuned.safetensors"), tmp_path / "out.safetensors", text=False)
    said = read_lora(tmp_path / "out.safetensors").metadata
    assert (said["ss_v2"], said["ss_base_model_version"]) == ("True", family.base_version)
    assert said.get("modelspec.prediction_type") == (family.prediction if yaml else None)
    assert all(name.startswith("lora_unet_") for name in read_lora(tmp_path / "out.safetensors").factors)


def test_what_is_refused(tmp_path, checkpoint, capsys):
    xl, out = tiny_sdxl_checkpoint(tmp_path), tmp_path / "out.safetensors"
    for other, words in ((checkpoint, "its weights are those of"), (xl, "expected Stable Diffusion 1.x as")):
        with pytest.raises(ModelError, match=words):
            run(checkpoint, other, out)
    state = tiny_state()
    key = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    partly = {name: tensor for name, tensor in state.items() if name != key}
    for other, words in ((partly, "not a whole checkpoint"), ({**state, QUERY: torch.zeros(8, 64)}, "has no place")):
        save_file(other, tmp_path / "other.safetensors")
        with pytest.raises(ModelError, match=rf"other\.safetensors: .*{words}"):
            run(checkpoint, tmp_path / "other.safetensors", out)
    save_file(tiny_state(text_layers=2), tmp_path / "deeper.safetensors")
    with pytest.raises(ModelError, match=r"layers\.1\..*: expected \[.*\] as in .*, found nothing"):
        run(tmp_path / "deeper.safetensors", checkpoint, out)
    assert main(["extract", str(checkpoint), str(checkpoint), str(out), "--rank", "0"]) == 2
    assert "rank: expected a whole number of at least 1" in capsys.readouterr().err
    assert not out.exists()
