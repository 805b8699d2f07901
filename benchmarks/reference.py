"""The ordinary ways to train the same LoRA: PEFT under accelerate, and the same step captured in a CUDA graph.

    python -m benchmarks.reference --loop eager --batch 4

prints one line of JSON. See README.md for its keys.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks import timing
from benchmarks.workload import LEARNING_RATE, MAX_GRAD_NORM, Networks, Workload, add_loras, forever, load, loader

Result = dict[str, Any]
Step = Callable[[dict[str, Tensor]], float]

# A captured step cannot look whether the scale overflowed; this one is far from it, and any scale costs the same.
GRAD_SCALE = 1024.0
PROFILED = 5
CAPTURE_WARMUP = 3


def accelerate_loop(work: Workload) -> Result:
    """PEFT and accelerate as in diffusers' train_text_to_image_lora.py, on cached latents and embeddings."""
    timing.fresh_memory()
    networks = load(work)
    started = time.perf_counter()
    step, batches = _accelerated(networks, work)
    return _measure(step, batches, work, started) | _health(networks)


def graphed_step(work: Workload) -> Result:
    """The same mathematics with nothing but torch and PEFT, the whole step one CUDA graph.

    What is left when no launch is waited for: the GPU's work alone. `gpu_busy_ms` is the time of a replay by CUDA
    events. On a CPU the step runs as it is.
    """
    if work.checkpointing and work.dropout > 0:
        raise ValueError("a captured step with checkpointing would recompute other dropout masks: use dropout 0")
    timing.fresh_memory()
    networks = load(work)
    started = time.perf_counter()
    add_loras(networks, work)
    if work.checkpointing:
        _checkpoint_without_rng(networks)
    batches = forever(loader(work))
    static = {name: value.to(work.device) for name, value in next(batches).items()}
    compute, loss = _stock_step(networks, static, work)
    replay = _captured(compute) if work.device != "cpu" else compute

    def step(batch: dict[str, Tensor]) -> float:
        for name, value in batch.items():
            static[name].copy_(value, non_blocking=True)
        replay()
        return loss.item()

    result = _measure(step, batches, work, started, profiled=0)
    return result | {"gpu_busy_ms": _replay_ms(replay, work)} | _health(networks)


def _accelerated(networks: Networks, work: Workload) -> tuple[Step, Iterator[dict[str, Tensor]]]:
    """One step of diffusers' example script, and the batches to feed it, on the device."""
    cpu = work.device == "cpu"
    accelerator = Accelerator(mixed_precision="no" if cpu else "fp16", cpu=cpu)
    add_loras(networks, work)
    if work.checkpointing:
        networks.unet.enable_gradient_checkpointing()
        if networks.text is not None:
            networks.text.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = networks.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    schedule = get_scheduler("constant", optimizer)
    text = None if networks.text is None else accelerator.prepare(networks.text)
    unet, optimizer, batches, schedule = accelerator.prepare(networks.unet, optimizer, loader(work), schedule)
    prepared = Networks(unet, text, networks.noise)

    def step(batch: dict[str, Tensor]) -> float:
        with accelerator.accumulate(unet):
            loss = prepared.loss(batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return loss.detach().item()

    return step, forever(batches)


def _stock_step(networks: Networks, static: dict[str, Tensor], work: Workload) -> tuple[Callable[[], None], Tensor]:
    """(a step from the buffers `static` that never asks the device anything, where it leaves its loss)."""
    cuda = work.device != "cpu"
    parameters = networks.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True, capturable=cuda)
    result = torch.zeros((), device=work.device)

    def compute() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(torch.device(work.device).type, dtype=torch.float16, enabled=cuda, cache_enabled=False):
            loss = networks.loss(static)
        (loss * GRAD_SCALE).backward()
        torch._foreach_mul_([p.grad for p in parameters], 1 / GRAD_SCALE)
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM, foreach=True)
        optimizer.step()
        result.copy_(loss.detach())

    return compute, result


def _captured(compute: Callable[[], None]) -> Callable[[], None]:
    """`compute` as a graph, after warm-up steps that really train."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(CAPTURE_WARMUP):
            compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compute()
    return graph.replay


def _checkpoint_without_rng(networks: Networks) -> None:
    """Checkpointing that does not save the random state, which a capture forbids: nothing here needs it."""
    networks.unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
    if networks.text is not None:
        networks.text.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})


def _measure(
    step: Step, batches: Iterator[dict[str, Tensor]], work: Workload, started: float, *, profiled: int = PROFILED
) -> Result:
    """Run the workload's steps; each ends when the host has its loss. `started`: when the networks were loaded."""
    loss = step(next(batches))
    first = time.perf_counter() - started
    for _ in range(work.warmup):
        step(next(batches))
    stamps = [time.perf_counter()]
    for _ in range(work.steps):
        loss = step(next(batches))
        stamps.append(time.perf_counter())
    result = timing.spread(timing.gaps(stamps)) | {"gpu_busy_ms": None}
    result |= {"peak_reserved_bytes": timing.peak_reserved(), "first_step_s": round(first, 3), "loss": loss}
    if profiled and work.device != "cpu":
        with timing.profiler() as record:
            for _ in range(profiled):
                step(next(batches))
            torch.cuda.synchronize()
        result["gpu_busy_ms"] = round(timing.busy_ms(record) / profiled, 3)
    return result


def _replay_ms(replay: Callable[[], None], work: Workload) -> float | None:
    """Mean time of back-to-back replays by CUDA events."""
    if work.device == "cpu":
        return None
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(work.steps):
        replay()
    end.record()
    end.synchronize()
    return round(start.elapsed_time(end) / work.steps, 3)


def _health(networks: Networks) -> Result:
    """Whether it was training at all: how many tensors are trained, and whether all are finite and have moved."""
    parameters = networks.parameters()
    ups = [p for name, p in networks.unet.named_parameters() if "lora_B" in name]
    finite = all(bool(torch.isfinite(p).all()) for p in parameters)
    return {
        "modules": len(parameters) // 2,
        "finite": finite,
        "moved": all(bool(up.abs().max() > 0) for up in ups),
    }


LOOPS = {"eager": accelerate_loop, "graph": graphed_step}


def main() -> None:
    """Measure one workload and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loop", choices=LOOPS, default="eager")
    for field in fields(Workload):
        flag = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=type(field.default), default=field.default)
    options = vars(parser.parse_args())
    loop = options.pop("loop")
    work = Workload(**options)
    result = LOOPS[loop](work)
    print(json.dumps({"what": f"reference {loop}", **asdict(work), **result, **timing.machine()}))


if __name__ == "__main__":
    main()
