"""LoRA files and checkpoints from strangers: headers, tensors and pickles."""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
import zipfile

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save

from lora_trainer.adapters.inspect import describe
from lora_trainer.config.sources import HEADER_KEY, read_file
from lora_trainer.errors import ModelError
from lora_trainer.models.checkpoint import PARTS, read_shapes, read_tensors
from lora_trainer.models.detection import detect
from tests.fuzz.harness import fuzz, readable, works_or_refuses
from tests.fuzz.inputs import NUMBERS, SETTINGS, TEXT, UNICODE, VALUES, dumps, file, mutated

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
CPU = torch.device("cpu")
UNET = "model.diffusion_model.input_blocks.0.0.weight"
KNOWN = [
    UNET,
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    "first_stage_model.decoder.conv_in.weight",
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    "alphas_cumprod",
    "conv_in.weight",
]
MODULES = ["lora_unet_mid_block", "lora_unet_down_blocks_1_attn2_to_k", "lora_te1_text_model_layers_3", "lora_x_y"]
MODULES += ["lora_unet_down_blocks_" + "9" * 5000, "lora_te٣_layers_٣", "lora_unet_\x1b[2J"]
PARTS_OF = [".lora_down.weight", ".lora_up.weight", ".alpha", ".lora_A.weight", ".dora_scale"]
DIFFUSERS = [f"{net}.a.{part}.weight" for net in ("unet", "text_encoder") for part in ("lora_A", "lora_B", "lora.down")]
NAMES = st.sampled_from([*KNOWN, *DIFFUSERS, *(module + part for module in MODULES for part in PARTS_OF)])
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8, "F4": 1}
SIZES |= {"I8": 1, "F8_E8M0": 1, "U16": 2, "F6_E2M3": 1, "nonsense": 4}
SHAPES = st.sampled_from([[], [1], [2, 3], [3, 2], [4, 3, 1, 1], [3, 4, 1, 1], [0, 3], [3, 0], [1, 1, 1], [2, 2, 3, 3]])
AMOUNT = NUMBERS | VALUES
PATTERN = st.dictionaries(st.sampled_from(["a", "^a", "unet.a", ""]) | TEXT, AMOUNT, max_size=2)
ALPHA = {"unet.lora_alpha": AMOUNT, "unet.alpha_pattern": PATTERN | VALUES, "unet.use_rslora": VALUES}
METADATA = st.fixed_dictionaries(
    {},
    optional={
        "lora_adapter_metadata": st.fixed_dictionaries({}, optional=ALPHA).map(dumps) | VALUES.map(dumps) | UNICODE,
        "ss_sd_model_name": UNICODE,
        "modelspec.architecture": UNICODE,
        "sshs_model_hash": UNICODE,
        HEADER_KEY: SETTINGS.map(dumps) | UNICODE,
    },
)


@st.composite
def pairs(draw: st.DrawFn) -> dict[str, tuple[str, list[int]]]:
    """(dtype, shape) of the tensors of whole LoRA modules, kohya's or diffusers'."""
    kinds = st.sampled_from(["F32", "F16", "BF16", "F64", "F8_E4M3", "C64"])
    if draw(st.booleans()):
        return {"unet.a.lora_A.weight": (draw(kinds), [2, 3]), "unet.a.lora_B.weight": (draw(kinds), [3, 2])}
    shapes = {".lora_down.weight": [2, 3], ".lora_up.weight": [3, 2], ".alpha": []}
    modules = draw(st.lists(st.sampled_from(MODULES), min_size=1, max_size=2, unique=True))
    return {module + part: (draw(kinds), shape) for module in modules for part, shape in shapes.items()}


ENTRIES = pairs() | st.dictionaries(NAMES, st.tuples(st.sampled_from(list(SIZES)), SHAPES), max_size=6)
ODD = [struct.pack("<d", number) for number in (1e200, 1e308, 5e-324, float("nan"))]
ODD += [struct.pack("<f", number) for number in (1.0, 3e38, float("inf"), -0.0)]


@st.composite
def tensors(draw: st.DrawFn) -> bytes:
    """A file whose offsets fit, mostly, so that it is read to the end."""
    header: dict[str, object] = {}
    at = 0
    for name, (kind, shape) in draw(ENTRIES).items():
        size = SIZES[kind] * math.prod(shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
        at += size
        if not draw(st.integers(0, 15)):
            header[name][draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = draw(VALUES)
    if draw(st.booleans()):
        header["__metadata__"] = draw(METADATA)
    numbers = draw(st.sampled_from(ODD) | st.binary(min_size=4, max_size=16))
    return with_length(dumps(header)) + (numbers * (at // 4 + 1))[:at]


def with_length(header: str) -> bytes:
    return struct.pack("<Q", len(header.encode())) + header.encode()


def lora(rank: int = 2, name: str = "lora_unet_down_blocks_0_attentions_0_proj_in", **metadata: str) -> bytes:
    return save(
        {
            f"{name}.lora_down.weight": torch.ones(rank, 3),
            f"{name}.lora_up.weight": torch.ones(3, rank),
            f"{name}.alpha": torch.tensor(1.0),
        },
        metadata={"ss_steps": "10", HEADER_KEY: '{"lora_rank": 2}', **metadata},
    )


CHECKPOINT = {name: torch.ones(4, 4, 1, 1) for name in KNOWN[:5]}
SEEDS = [lora(), save(CHECKPOINT), save({"unet.a.lora_A.weight": torch.ones(1)})]
ANY_HEADER = (VALUES | st.dictionaries(NAMES, VALUES, max_size=4)).map(dumps).map(with_length)


def use(path) -> None:
    with works_or_refuses():
        report = describe(path)
        for line in report.lines():
            readable(line)
        json.loads(report.to_json())
        report.to_json().encode()
    with works_or_refuses():
        detect(read_shapes(path), path.name)
    with works_or_refuses():
        found = read_tensors(path, CPU, lambda name: torch.float32)
        assert all(name.startswith(PARTS) for name in found)
    with works_or_refuses():
        read_file(path)


PAIR = {"unet.a.lora_A.weight": torch.ones(2, 3), "unet.a.lora_B.weight": torch.ones(3, 2)}
HUGE = '{"unet.use_rslora": true, "unet.lora_alpha": 1' + "0" * 400 + "}"
HARD = [lora(name=MODULES[-3]), lora(ss_sd_model_name="\x1b[2J\n"), save(PAIR, {"lora_adapter_metadata": HUGE})]


@fuzz("safetensors", 150, [{"content": content} for content in HARD], content=tensors())
def test_any_tensors(content):
    use(file("tensors.safetensors", content))


@fuzz("safetensors", 100, content=mutated(SEEDS, front=1000) | ANY_HEADER | st.binary(max_size=40))
def test_damaged_headers(content):
    use(file("damaged.safetensors", content))


def pickled(value: object, zipped: bool) -> bytes:
    with io.BytesIO() as buffer:
        torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
        return buffer.getvalue()


class Evil:
    def __reduce__(self):
        return (open, ("evil.txt", "w"))


STATE = {"state_dict": dict(CHECKPOINT), "epoch": 3}
STATE["state_dict"]["model.diffusion_model.x"] = torch.ones(1).expand(10**10)
PICKLES = [pickled(STATE, True), pickled(STATE, False), pickle.dumps({"state_dict": {1: 2}}), pickle.dumps(Evil())]
PICKLES += [pickled({"a": Evil()}, False), pickled({"a": Evil()}, True), pickled([1], True), pickled({}, False)]


@fuzz("pickles", 80, content=mutated(PICKLES, front=600), suffix=st.sampled_from([".ckpt", ".pt", ".PTH"]))
def test_damaged_pickles(content, suffix):
    path = file(f"damaged{suffix}", content)
    with works_or_refuses():
        detect(read_shapes(path), path.name)
    with works_or_refuses():
        read_tensors(path, CPU, lambda name: torch.float16)


def test_a_packed_checkpoint_is_refused(tmp_path):
    path = tmp_path / "bomb.ckpt"
    with (
        zipfile.ZipFile(io.BytesIO(pickled({"a": torch.zeros(1000)}, True))) as whole,
        zipfile.ZipFile(path, "w") as bomb,
    ):
        for entry in whole.infolist():
            bomb.writestr(entry.filename, whole.read(entry), zipfile.ZIP_DEFLATED)
    with pytest.raises(ModelError, match="is compressed"):
        read_shapes(path)


def test_few_numbers_that_are_named_as_many_are_left_out(tmp_path):
    path = tmp_path / "wide.ckpt"
    path.write_bytes(pickled(STATE, True))
    assert set(read_tensors(path, CPU, lambda name: torch.float32)) == set(KNOWN[:5])


def test_a_rank_larger_than_the_layer_takes_no_memory(tmp_path):
    path = tmp_path / "rank.safetensors"
    path.write_bytes(lora(rank=100_000))
    assert describe(path).ranks == {100_000: 1}
    assert describe(path).norms["unet down_blocks_0"] == pytest.approx(3.0)
