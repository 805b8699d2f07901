"""The file format: canonical bytes, publishing, hashes, metadata, reading back, inspection."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from lora_trainer import files
from lora_trainer.adapters.hashes import checkpoint_hashes, model_hash
from lora_trainer.adapters.inspect import describe
from lora_trainer.adapters.load import match, read_lora
from lora_trainer.adapters.metadata import BaseFacts, DataFacts, Folder, RunFacts, build_metadata
from lora_trainer.adapters.naming import Factors, kohya_name, to_diffusers, to_kohya
from lora_trainer.adapters.save import assemble
from lora_trainer.adapters.targets import select
from lora_trainer.adapters.writer import serialize
from lora_trainer.errors import ConfigError, ModelError, OutputError
from lora_trainer.files import publish

ROOT = Path(__file__).parents[2]


def factors(rank=4, alpha=2.0):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "mid_block.attentions.0.proj_in": Factors(random(rank, 6, 1, 1), random(5, rank, 1, 1), alpha),
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": Factors(random(rank, 6), random(5, rank), alpha),
    }


def facts(**changes):
    run = {
        "name": "style",
        "session_id": 7,
        "started_at": 1.7e9,
        "finished_at": 1.7e9 + 60,
        "steps": 12,
        "epoch": 2,
        "trigger_words": "mystyle",
        "config_json": "{}",
        "settings": {"network_dim": 4, "network_alpha": "2", "seed": 42, "clip_skip": None},
    }
    data = DataFacts({"pictures": Folder(["a cat, red", "a dog, red"])}, {(512, 512): 1, (448, 576): 1}, 512, 1)
    base = BaseFacts("v1-5", "sd_v1", "stable-diffusion-v1", "epsilon", "12345678", None)
    return RunFacts(**{**run, **changes}), data, base


# --- writer


def test_serialize_is_readable_and_complete():
    tensors = {
        "b": torch.arange(6, dtype=torch.float16).view(2, 3),
        "a": torch.tensor(3.5),
        "c": torch.ones(3, dtype=torch.bfloat16),
        "d": torch.arange(3),
        "t": torch.arange(6.0).view(2, 3).t(),
    }
    read = safetensors.torch.load(serialize(tensors, {"x": "é", "a": "1"}))
    assert set(read) == set(tensors)
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)


def test_serialize_gives_equal_bytes_in_every_process():
    code = (
        "import torch,hashlib;from lora_trainer.adapters.writer import serialize;"
        "m={str(k):'v' for k in set('abcdefgh')};t={k:torch.ones(2) for k in set('xyz')};"
        "print(hashlib.sha256(serialize(t,m)).hexdigest())"
    )
    seen = set()
    for seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        seen.add(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout)
    assert len(seen) == 1


def test_publish_replaces_whole(tmp_path):
    target = tmp_path / "new" / "a.safetensors"
    publish(b"one", target)
    publish(b"two", target)
    assert target.read_bytes() == b"two"
    assert [p.name for p in target.parent.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "Permission denied"), (errno.EIO, "Input/output")],
)
def test_a_failed_publish_changes_nothing(tmp_path, monkeypatch, step, number, words):
    target = tmp_path / "a.safetensors"
    target.write_bytes(b"old")

    def fail(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(OutputError, match=words) as caught:
        publish(b"new", target)
    assert "\n" not in str(caught.value)
    assert str(target) in str(caught.value)
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


# --- hashes


def test_hashes_are_what_the_webui_and_kohya_compute():
    tensors = {f"t{n}": torch.randn(300_000) for n in range(2)}
    metadata = {"ss_seed": "1", "modelspec.title": "x", "lora_trainer_config": "{}"}
    data = assemble(tensors, metadata)
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]
    # The WebUI's addnet_hash_safetensors over the file as it lies on the disk.
    file = io.BytesIO(data)
    start = struct.unpack("<Q", file.read(8))[0] + 8
    file.seek(start)
    assert header["sshs_model_hash"] == hashlib.sha256(file.read()).hexdigest() == model_hash(data)
    # kohya's addnet_hash_legacy over the file serialised with its ss_ metadata alone.
    bare = serialize(tensors, {"ss_seed": "1"})
    assert len(bare) > 0x110000
    assert header["sshs_legacy_hash"] == hashlib.sha256(bare[0x100000:0x110000]).hexdigest()[:8]


def test_checkpoint_hashes(tmp_path):
    data = os.urandom(0x120000)
    path = tmp_path / "base.safetensors"
    path.write_bytes(data)
    window = hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    assert checkpoint_hashes(path) == (window, hashlib.sha256(data).hexdigest())


# --- metadata


def test_metadata_shows_in_the_webuis_editor_and_card():
    metadata = build_metadata(*facts())
    assert all(isinstance(value, str) for value in metadata.values())
    expected = {
        "ss_output_name": "style",
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_network_dim": "4",
        "ss_clip_skip": "None",
        "ss_sd_model_name": "v1-5",
        "ss_sd_model_hash": "12345678",
        "ss_num_train_images": "2",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.date": "2023-11-14T22:14:20",
        "modelspec.trigger_phrase": "mystyle",
        "modelspec.resolution": "512x512",
    }
    assert {key: metadata[key] for key in expected} == expected
    assert "ss_new_sd_model_hash" not in metadata
    assert json.loads(metadata["ss_tag_frequency"]) == {"pictures": {"a cat": 1, "red": 2, "a dog": 1}}
    assert json.loads(metadata["ss_dataset_dirs"]) == {"pictures": {"n_repeats": 1, "img_count": 2}}
    assert json.loads(metadata["ss_bucket_info"])["buckets"]["0"] == {"resolution": [448, 576], "count": 1}


# --- reading


def write(path, tensors, metadata=None):
    path.write_bytes(assemble(tensors, metadata or build_metadata(*facts())))
    return path


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_what_is_written_is_read_back(tmp_path, form):
    original = factors()
    tensors = to_kohya("lora_unet", original) if form == "kohya" else to_diffusers(original)
    lora = read_lora(write(tmp_path / "a.safetensors", tensors))
    for name, f in original.items():
        got = lora.factors[kohya_name("lora_unet", name)]
        assert got.rank == f.rank
        mine, theirs = ((x.alpha / x.rank) * (x.up.flatten(1) @ x.down.flatten(1)) for x in (f, got))
        torch.testing.assert_close(theirs, mine)


def test_match_names_modules_and_what_is_left_over(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mid_block = nn.ModuleDict({"to_q": nn.Linear(6, 5)})

    f = factors()["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    tensors = to_kohya("lora_unet", {"mid_block.to_q": f, "elsewhere": f}) | to_kohya("lora_te", {"x": f})
    matched, unmatched = match(read_lora(write(tmp_path / "a.safetensors", tensors)), Net())
    assert list(matched) == ["mid_block.to_q"]
    assert unmatched == ["lora_unet_elsewhere"]


def test_files_that_are_no_lora_are_named(tmp_path):
    whole = assemble(to_kohya("lora_unet", factors()), {})
    half = {name: tensor for name, tensor in to_kohya("lora_unet", factors()).items() if "lora_up" not in name}
    cases = {
        "checkpoint": (serialize({"model.diffusion_model.x": torch.ones(2)}, {}), "a checkpoint, not a LoRA"),
        "other": (serialize({"x": torch.ones(2)}, {}), "not a LoRA"),
        "loha": (
            serialize({**to_kohya("lora_unet", factors()), "lora_unet_x.hada_w1_a": torch.ones(2)}, {}),
            "lacks its hada_w1_b",
        ),
        "half": (serialize(half, {}), "lacks its lora_up"),
        "short": (whole[:-10], "truncated"),
        "text": (b"hello there", "not a .safetensors file"),
        "huge": (struct.pack("<Q", 2**60) + b"{}", "not a .safetensors file"),
    }
    for name, (data, words) in cases.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(data)
        with pytest.raises(ModelError, match=words) as caught:
            read_lora(path)
        assert name in str(caught.value)
    with pytest.raises(ModelError, match="no such file"):
        read_lora(tmp_path / "missing.safetensors")


def test_inspect_tells_norms_hashes_and_trouble(tmp_path):
    original = factors()
    path = write(tmp_path / "a.safetensors", to_kohya("lora_unet", original))
    report = describe(path)
    deltas = [(f.alpha / f.rank) * (f.up.flatten(1) @ f.down.flatten(1)) for f in original.values()]
    expected = torch.cat([delta.flatten() for delta in deltas]).norm().item()
    assert report.norms == {"unet mid_block": pytest.approx(expected, rel=1e-5)}
    assert report.hash_matches is True
    assert report.ranks == {4: 2}
    assert report.warnings == ()
    assert any("trigger words: mystyle" in line for line in report.lines())
    assert json.loads(report.to_json())["modules"] == {"unet": 2}
    damaged = bytearray(path.read_bytes())
    damaged[-4:] = b"\x00\x00\xc0\x7f"  # a NaN at the end of the last fp32 tensor
    path.write_bytes(damaged)
    report = describe(path)
    assert report.hash_matches is False
    assert "not finite" in report.warnings[0]


# --- targets


def test_targets_by_ending_alias_and_set():
    from diffusers import UNet2DConditionModel

    from tests.tiny import UNET

    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
    query = select(unet, ["to_q"])
    assert query == select(unet, ["q_proj"])
    assert all(name.endswith(".to_q") for name in query)
    both = select(unet, ["conv", "default"])
    assert set(query) < set(select(unet, ["default"])) < set(both)
    assert list(both) == [name for name, _ in unet.named_modules() if name in set(both)]
    assert "conv_in" not in both
    with pytest.raises(ConfigError, match="'to_z'; near it: .*to_"):
        select(unet, ["default", "to_z"])
