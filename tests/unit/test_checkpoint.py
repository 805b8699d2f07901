"""Reading .safetensors files without a mapping."""

from __future__ import annotations

import gc
import json
import struct
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_trainer.errors import ModelError
from lora_trainer.models.checkpoint import DTYPES, stored_tensors

SHAPES = [(), (3,), (4, 5), (0, 2)]


@pytest.fixture
def file(tmp_path):
    """A tensor of every number format in every shape."""
    tensors = {
        f"{name}{shape}": (torch.randn(shape) * 9).to(dtype) for name, dtype in DTYPES.items() for shape in SHAPES
    }
    save_file(tensors, tmp_path / "all.safetensors")
    return tmp_path / "all.safetensors"


def raw(tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_it_reads_what_the_official_library_reads(file):
    expected = load_file(file)
    got = dict(stored_tensors(file))
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape, raw(got[name])) == (tensor.dtype, tensor.shape, raw(tensor))
    assert [name for name, _ in stored_tensors(file, lambda name: name.startswith("F64"))] == [
        name for name in got if name.startswith("F64")
    ]


def test_reading_leaves_nothing_behind(file):
    for _ in range(2):
        dict(stored_tensors(file))
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(20):
        dict(stored_tensors(file))
    gc.collect()
    # The official reader leaves two objects a tensor.
    assert sys.getallocatedblocks() - before < 20 * len(DTYPES) * len(SHAPES) / 4


def test_a_file_that_does_not_fit_its_header_is_an_error(file, tmp_path):
    whole = file.read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ModelError, match="truncated"):
        dict(stored_tensors(tmp_path / "short.safetensors"))
    header = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "strange.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"x")
    with pytest.raises(ModelError, match="strange"):
        dict(stored_tensors(tmp_path / "strange.safetensors"))


def test_a_file_that_is_cut_while_it_is_read_is_an_error(file):
    tensors = stored_tensors(file)
    next(tensors)
    with file.open("r+b") as other:
        other.truncate(600)
    with pytest.raises(ModelError, match="truncated"):
        list(tensors)
