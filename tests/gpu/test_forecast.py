"""On a CUDA device: what a rehearsal measures and leaves behind, and kernels compiled ahead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.step import config_of, model_of
from benchmarks.workload import Workload
from lora_trainer.training import segment as segments
from lora_trainer.training.feed import Feed
from lora_trainer.training.forecast import Gpu, rehearse
from lora_trainer.training.segment import Segment
from lora_trainer.training.settings import torch_settings
from tests.unit.test_forecast import feed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ROOT = Path(__file__).parents[2]
WORK = Workload(batch=4, dropout=0.1)
BUCKETS = [(512, 512), (576, 448), (448, 576), (640, 384), (384, 640), (704, 320), (320, 704), (512, 448)]


def rehearsed(given: Feed, segment: Segment):
    return rehearse(segment, given, Gpu(torch.device("cuda", 0)), lambda done, total: None)


def steps(given: Feed, segment: Segment, count: int) -> list[float]:
    """Seconds of each of the first updates, the GPU's work included."""
    times = []
    for number, (_, batches) in enumerate(given.stream(0, pinned=True)):
        if number == count:
            return times
        torch.cuda.synchronize()
        began = time.perf_counter()
        segment.trainables.set_learning_rate(1e-4)
        for batch in batches:
            segment.forward_backward(batch)
        segment.update()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return times


def test_a_rehearsal_changes_nothing_and_foretells_memory_and_time():
    given = feed({(512, 512): 8, (448, 576): 8})
    with torch_settings(None), segments.open_segment(config_of(WORK), model_of(WORK), None) as segment:
        before = {name: tensor.clone() for name, tensor in segment.live().items()}
        need = rehearsed(given, segment)
        assert segment.captures.count == 3, segment.captures.reason
        assert all(torch.equal(tensor, before[name]) for name, tensor in segment.live().items())
        assert not segment.trainables.grads.any()
        assert segment.update.loss == 0
        times = sorted(steps(given, segment, 40))
        peak = torch.cuda.max_memory_reserved()
        print(
            f"{need}; a step {need.step * 1e3:.1f} ms foretold, {times[20] * 1e3:.1f} ms taken, {peak / 2**30:.2f} GiB"
        )
        assert need.fits
        assert peak <= 1.02 * need.memory
        assert need.step == pytest.approx(times[20], rel=0.25)


def test_eight_buckets_take_little_more_memory_than_the_largest_and_pause_nowhere():
    used = []
    for buckets in (BUCKETS[:1], BUCKETS):
        given = feed(dict.fromkeys(buckets, 8))
        with torch_settings(None), segments.open_segment(config_of(WORK), model_of(WORK), None) as segment:
            used.append(rehearsed(given, segment).memory)
            longest = max(steps(given, segment, 2 * given.steps_per_epoch))
            used[-1] = max(used[-1], torch.cuda.max_memory_reserved())
            # A generation wanted the memory: all is captured again, without more of it.
            segment.captures.release()
            steps(given, segment, given.steps_per_epoch)
            again = torch.cuda.max_memory_reserved()
    print(f"one shape {used[0] / 2**30:.2f} GiB, eight {used[1] / 2**30:.2f}, after a release {again / 2**30:.2f}")
    assert used[1] <= 1.15 * used[0]
    assert again <= 1.15 * used[0]
    assert longest < 1


TRAIN = """
import json, sys, time
from functools import partial
from pathlib import Path
from benchmarks.step import config_of, model_of
from benchmarks.workload import Workload
from lora_trainer.kernels.choose import Kernels
from lora_trainer.kernels.warm import triton_cache
from lora_trainer.training import segment as segments
from tests.gpu.test_forecast import rehearsed, steps
from tests.unit.test_forecast import feed

work = Workload(batch=2, dropout=0.1)
given, kernels, began = feed({(256, 256): 4, (320, 192): 4}), Kernels(), time.perf_counter()
choose = partial(kernels.ops, shapes=given.shapes)
with segments.open_segment(config_of(work), model_of(work), None, None, choose) as segment:
    rehearsed(given, segment)
    ready = time.perf_counter() - began
    kernels.compiled(given.shapes)
    steps(given, segment, 8)
    if kernels._ahead is not None:
        kernels._ahead.join()
    result = {
        "ops": segment.tier.ops.name, "captured": segment.captures.count, "reason": segment.captures.reason,
        "ready": ready, "told": kernels.close(), "all": time.perf_counter() - began,
        "kept": sorted(path.name for path in triton_cache().rglob("*.cubin")),
    }
print(json.dumps(result))
"""


def test_a_first_run_compiles_exactly_what_the_second_one_uses(tmp_path):
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths}
    seen = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", TRAIN], env=environment, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
        seen.append(json.loads(done.stdout.splitlines()[-1]))
    first, second = seen
    for one in seen:
        print({key: value for key, value in one.items() if key != "kept"}, len(one["kept"]), "kernels")
    assert [one["ops"] for one in seen] == ["plain torch", "Triton"]
    assert first["told"] == ["the Triton kernels are compiled: the next run uses them"]
    assert second["kept"] == first["kept"]
    assert [one["captured"] for one in seen] == [3, 3]
