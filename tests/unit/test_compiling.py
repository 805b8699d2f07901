"""Kernels compiled ahead: what is noted, what is compiled, when a run may use it, and what it says."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from lora_trainer.kernels.ahead import Ahead, Call, NotingOps
from lora_trainer.kernels.choose import Kernels
from lora_trainer.kernels.plain import PlainOps
from lora_trainer.kernels.warm import Warm, triton_cache
from tests.unit.test_kernels import rand, site

ROOT = Path(__file__).parents[2]
CUDA = torch.device("cuda")
SHAPES = [(4, 64, 64, 77), (4, 48, 80, 77)]


class FakeTriton(PlainOps):
    """Plain torch under Triton's name; on meta tensors it says what it was asked."""

    name = "Triton"
    collects = False

    def __init__(self) -> None:
        self.asked: list = []

    def geglu(self, x):
        assert x.is_meta
        if x.shape[0] == 13:
            raise RuntimeError("no such kernel\nand more")
        self.asked.append(tuple(x.shape))
        return super().geglu(x)


@pytest.fixture
def warm(tmp_path) -> Warm:
    return Warm(tmp_path / "triton", {"card": "a card", "triton": "3"})


@pytest.fixture
def kernels(warm):
    """The kernels of a run on an imagined GPU; all are closed in the end."""
    made = []

    def make(wanted: str = "auto", begun_with: str = "", **changes) -> Kernels:
        given = {"probe": lambda *args: FakeTriton(), "warm_of": lambda d: warm, "current": lambda d: nullcontext()}
        made.append(Kernels(wanted, begun_with, **given | changes))
        return made[-1]

    yield make
    for one in made:
        one.close()


def chosen(kernels: Kernels, **changes):
    given = {"work": "a model", "shapes": SHAPES} | changes
    return kernels.ops(CUDA, torch.float16, **given)


def test_a_first_run_stays_on_plain_torch_and_the_next_one_uses_what_was_compiled(kernels):
    first = kernels()
    ops, told = chosen(first)
    assert isinstance(ops, NotingOps)
    assert ops.name == "plain torch"
    assert "compiled for the next run" in told
    x = torch.randn(6, 8, requires_grad=True)
    assert torch.equal(ops.geglu(x), PlainOps().geglu(x))
    first.compiled(SHAPES)
    first._ahead.join()
    # Within the run nothing changes, though all is compiled by now: another segment, another checkpoint.
    assert chosen(first)[0] is ops
    assert first._ahead.ops.asked == [(6, 8)]
    assert first.close() == ["the Triton kernels are compiled: the next run uses them"]

    second = kernels()
    ops, told = chosen(second)
    assert (ops.name, told) == ("Triton", None)
    assert second.close() == []


@pytest.mark.parametrize("changes", [{"work": "another model"}, {"shapes": [*SHAPES, (2, 64, 64, 77)]}])
def test_what_was_compiled_for_something_else_is_cold(kernels, warm, changes):
    for shape in SHAPES:
        warm.add(("a model", shape))
    assert chosen(kernels())[0].name == "Triton"
    assert chosen(kernels(), shapes=SHAPES[:1])[0].name == "Triton"
    assert chosen(kernels(), **changes)[0].name == "plain torch"


@pytest.mark.parametrize("fact", [{"card": "another"}, {"triton": "3.1"}, {"kernels": "other sources"}])
def test_another_card_version_or_kernel_is_cold(kernels, warm, fact):
    for shape in SHAPES:
        warm.add(("a model", shape))
    other = Warm(warm.folder, dict(warm.facts) | fact)
    assert chosen(kernels(warm_of=lambda device: other))[0].name == "plain torch"


def test_a_cache_that_was_emptied_is_cold(kernels, warm):
    for shape in SHAPES:
        warm.add(("a model", shape))
    shutil.rmtree(warm.folder)
    assert chosen(kernels())[0].name == "plain torch"


def test_a_cache_that_cannot_be_written_ends_no_run(warm, tmp_path):
    warm.folder.parent.mkdir(exist_ok=True)
    warm.folder.write_text("not a folder")
    warm.add(("a model", SHAPES[0]))
    assert ("a model", SHAPES[0]) not in warm


@pytest.mark.parametrize(
    ("wanted", "begun_with", "cold", "expected"),
    [
        ("triton", "", True, "Triton"),
        ("triton", "plain torch", True, "Triton"),
        ("plain", "", False, "plain torch"),
        ("plain", "Triton", False, "plain torch"),
        ("auto", "Triton", True, "Triton"),
        ("auto", "plain torch", False, "plain torch"),
        ("auto", "plain torch", True, "plain torch"),
    ],
)
def test_a_resumed_run_stays_on_its_tier_unless_told_otherwise(kernels, warm, wanted, begun_with, cold, expected):
    for shape in () if cold else SHAPES:
        warm.add(("a model", shape))
    run = kernels(wanted, begun_with)
    ops, told = chosen(run)
    assert ops.name == expected
    assert ("about a minute" in (told or "")) == (cold and expected == "Triton")


def test_kernels_compiled_in_a_run_are_remembered(kernels):
    run = kernels("triton")
    chosen(run)
    run.compiled(SHAPES)
    assert chosen(kernels())[0].name == "Triton"


def test_without_triton_or_a_gpu_it_is_plain_torch(kernels):
    def missing(*args):
        raise ImportError("No module named 'triton'")

    ops, told = chosen(kernels(probe=missing))
    assert type(ops) is PlainOps
    assert "No module named 'triton'" in told
    assert type(kernels().ops(torch.device("cpu"), torch.float32)[0]) is PlainOps
    assert type(chosen(kernels(), deterministic=True)[0]) is PlainOps


def test_a_kernel_that_cannot_be_compiled_is_told_and_marks_nothing(kernels, warm):
    run = kernels()
    ops, _ = chosen(run)
    ops.geglu(torch.randn(13, 8))
    run.compiled(SHAPES)
    run._ahead._thread.join(20)
    assert "no such kernel" in run.close()[0]
    assert chosen(kernels())[0].name == "plain torch"


def test_a_run_that_ends_early_stops_compiling_and_says_how_far_it_came(kernels):
    gate, began = threading.Event(), threading.Event()

    class Slow(FakeTriton):
        def geglu(self, x):
            began.set()
            gate.wait(20)
            return super().geglu(x)

    run = kernels(probe=lambda *args: Slow())
    ops, _ = chosen(run)
    for rows in range(1, 6):
        ops.geglu(torch.randn(rows, 8))
    run.compiled(SHAPES)
    assert began.wait(20)
    thread = run._ahead._thread
    assert "0 of 5 kernels are compiled" in run.close()[0]
    gate.set()
    thread.join(20)
    assert not thread.is_alive()
    assert chosen(kernels())[0].name == "plain torch"


def test_a_call_is_noted_once_and_asked_again_without_memory():
    calls = []
    ops = NotingOps(calls.append)
    s = site(64, 96, 8, batch=2, rows=64, dropout=0.3, dtype=torch.float32)
    x = rand(64, 64, dtype=torch.float32).requires_grad_()
    weight, bias = rand(96, 64, dtype=torch.float32), rand(96, dtype=torch.float32)
    for _ in range(2):
        y = ops.lora_linear(x, weight, bias, s)
    assert torch.equal(y, PlainOps().lora_linear(x, weight, bias, s))
    norm = torch.nn.GroupNorm(32, 64).requires_grad_(False)
    picture = rand(2, 64, 4, 4, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    ops.group_norm(picture.requires_grad_(), norm, silu=True)
    ops.layer_norm(x, torch.nn.LayerNorm(64).requires_grad_(False))
    ops.add(picture, None, picture)
    ops.geglu(x)
    assert len(set(calls)) == 5

    seen = []

    class Asked(PlainOps):
        collects = False

        def lora_linear(self, x, weight, bias, site, residual=None):
            draw = site.draw(64)
            seen.append((x.requires_grad, site.grad_up.dtype, tuple(site.up.stride()), draw.dropout, draw.offset % 16))
            return super().lora_linear(x, weight, bias, site, residual)

    for call in set(calls):
        call.compile(Asked())
    assert seen == [(True, torch.float32, (1, 96), 0.3, 0)]


def test_the_thread_ends_and_keeps_what_went_wrong():
    ahead = Ahead(FakeTriton(), nullcontext)
    ahead.note(Call.of("geglu", torch.randn(13, 8)))
    ahead._thread.join(20)
    assert ahead.failure == "RuntimeError: no such kernel"


# Triton needs none of NVIDIA's cards to compile for one: only to be told of it.
COMPILE = """
import os, sys, torch
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
driver.set_active(SimpleNamespace(
    get_current_device=lambda: 0, get_current_stream=lambda device: 0,
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_active_torch_device=lambda: torch.device("cpu"), map_python_to_cpp_type=str,
))
torch.cuda.get_device_capability = lambda device=None: (9, 0)
from lora_trainer.kernels import triton_group_norm, triton_lora
from lora_trainer.kernels.ahead import Ahead, NotingOps
from lora_trainer.kernels.triton_ops import TritonOps
from tests.unit.test_kernels import rand, site

half = torch.float16
tensors = rand(64, 64, dtype=half).requires_grad_(), rand(96, 64, dtype=half), rand(96, dtype=half)
norm = torch.nn.GroupNorm(32, 64).requires_grad_(False).half()
picture = rand(2, 64, 4, 4, dtype=half).contiguous(memory_format=torch.channels_last).requires_grad_()

def step(ops):
    place = site(64, 96, 8, batch=2, rows=64, dropout=0.1, direct=not ops.collects, dtype=half)
    y = ops.lora_linear(*tensors, place)
    z, passed = ops.group_norm(picture, norm, silu=True)
    (y.sum() + z.sum() + passed.sum()).backward()

def kept():
    return sorted(path.name for path in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin"))

ahead = Ahead(TritonOps(), nullcontext)
step(NotingOps(ahead.note))
ahead.join()
print(ahead.done, ahead.failure)
print(*kept())
ahead.close()
# What a launch on a card would look up, from real tensors.
for module in (triton_lora, triton_group_norm):
    module.launch = lambda kernel, grid: partial(kernel.warmup, grid=grid)
triton_lora._bulk_copies = lambda device: True
step(TritonOps())
print(*kept())
"""


def test_exactly_the_kernels_of_a_step_are_compiled_for_a_card_that_is_not_there(tmp_path):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no triton here")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, cwd=ROOT)
    told, compiled, after_a_step = done.stdout.splitlines() or [done.stderr[-2000:], "", ""]
    assert told == "2 None"
    assert after_a_step == compiled
    # One product forwards and one backwards; a norm with and without the gradient of what it hands on.
    assert [name.removesuffix(".cubin") for name in compiled.split()] == [
        *("_gn_apply", "_gn_back_apply", "_gn_back_apply", "_gn_back_sums", "_gn_sums", "gradients_kernel"),
        *("product_kernel", "product_kernel"),
    ]


def test_the_cache_is_where_triton_has_it(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert triton_cache() == tmp_path
    monkeypatch.delenv("TRITON_CACHE_DIR")
    assert triton_cache().parts[-2:] == (".triton", "cache")


def test_the_facts_of_a_machine(monkeypatch):
    """A card that is there only by its name."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    facts = Warm.of(CUDA).facts
    assert (facts["card"], facts["capability"]) == ("a card", "9.0")
    assert all(facts.values())
    assert set(facts) == {"card", "capability", "driver", "torch", "triton", "kernels"}
