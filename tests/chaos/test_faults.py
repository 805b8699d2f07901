"""Each operation on files fails in turn, and each allocation of a run: all end in a good state.

Printed at the end: what fails, how, and what the job came to. Afterwards the job goes on and comes to the same bytes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_trainer.errors import UserError
from lora_trainer.jobs.store import EVENTS, SETTINGS
from lora_trainer.training.states import FINISHED, FOLDER
from tests.chaos import world as worlds
from tests.chaos.world import LORA, Operations, World, forked, fresh

POINTS = {
    "the job's settings": lambda path: path.name.startswith(f".{SETTINGS}"),
    "the job's first line": lambda path: path.name == EVENTS and not path.stat().st_size,
    "the job's history": lambda path: path.name == EVENTS and path.stat().st_size > 0,
    "a full state": lambda path: path.parent.parent.name == FOLDER and path.name.startswith(".step"),
    "a LoRA on the way": lambda path: path.name.startswith(".tiny-step"),
    # Not where it is rescued to.
    "the finished LoRA": lambda path: path.name.startswith(f".{LORA}") and path.parent.name == "out",
    "its settings": lambda path: path.name.startswith(".tiny.yaml"),
    "the end of the run": lambda path: path.name.startswith(f".{FINISHED}"),
}
FAULTS = {
    "the disk is full": ("_write", errno.ENOSPC),
    "it fills up in the middle": ("_write", -errno.ENOSPC),
    "an error of the disk": ("_flush", errno.EIO),
    "not allowed": ("_rename", errno.EACCES),
}
# What a job comes to when the fault lasts. Only what the user asked for fails it: everything else is done without.
FAILS = {"the job's settings": "refused", "the job's first line": "refused", "the finished LoRA": "failed"}
IN_CI = {("a full state", "it fills up in the middle"), ("the finished LoRA", "the disk is full")}


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    rows: list[str] = []
    yield rows
    print("\n" + "\n".join(sorted(rows)))


def breaking(point: str, fault: str):
    """An operation of `Operations` that fails whenever it is about `point`."""
    kind, number = FAULTS[fault]

    def operation(_: int, name: str, arguments: tuple, real: object) -> object:
        first = arguments[0]
        path = first if isinstance(first, Path) else Path(first.name)
        if name != kind or not POINTS[point](path):
            return real(*arguments)
        if number < 0:
            file, data = arguments
            real(file, bytes(data)[: len(data) // 2])
            file.flush()
        raise OSError(abs(number), os.strerror(abs(number)))

    return operation


def cases() -> list:
    return [
        pytest.param(point, fault, marks=[] if (point, fault) in IN_CI else pytest.mark.chaos)
        for point in POINTS
        for fault in FAULTS
        if not (point in ("the job's history", "the job's first line") and FAULTS[fault][0] == "_rename")
    ]


@pytest.mark.parametrize(("point", "fault"), cases())
def test_a_fault_of_the_disk(undisturbed, tmp_path, table, point, fault):
    world = fresh(undisturbed, tmp_path / "world")

    def body() -> None:
        import tempfile

        tempfile.tempdir = str(tmp_path)
        with Operations(breaking(point, fault)):
            try:
                job = world.begin()
                came_to = f"{job.state}: {job.error}" if job.error else job.state
            except UserError as error:
                came_to = f"refused: {error}"
        (tmp_path / "outcome").write_text(came_to.replace(str(world.folder), ""), encoding="utf-8")

    assert forked(body) == 0
    outcome = (tmp_path / "outcome").read_text(encoding="utf-8")
    assert outcome.split(":")[0] == FAILS.get(point, "done"), outcome
    assert world.lora in (None, undisturbed.lora)
    if point == "the finished LoRA":
        (rescued,) = tmp_path.glob(f"lora-trainer-*/{LORA}")
        assert rescued.read_bytes() == undisturbed.lora
    assert not list(world.folder.rglob("*.tmp"))
    if FAILS.get(point) == "refused":
        assert not list((world.folder / "jobs").iterdir())
    # The disk is mended, and the job goes on.
    assert forked(world.begin) == 0
    assert world.lora == undisturbed.lora
    table.append(f"| {point} | {fault} | {outcome.split(':')[0]} | then done, the same bytes |")


class Short(TorchDispatchMode):
    """The operation `at` of torch, counted from the first step on, finds no memory. Reads and views need none."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.count, self.struck = at, 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.at >= 0 and self.count == self.at:
            self.struck = str(func)
            self.count += 1
            raise torch.cuda.OutOfMemoryError("simulated")
        self.count += 1
        return func(*args, **(kwargs or {}))


def counted(world: World, at: int) -> tuple[int, str, str]:
    """(operations of torch in training, the one that failed, what the job came to) of a run that fails at `at`."""
    outcome = world.folder / "outcome"

    def body() -> None:
        from lora_trainer.training import job

        real_fit, real_work, short = job.fit, worlds.work, Short(at)

        def fit(*args: object, **kwargs: object) -> object:
            job.fit = real_fit
            short.__enter__()
            return real_fit(*args, **kwargs)

        def work(*args: object) -> object:
            try:
                return real_work(*args)
            finally:
                if job.fit is real_fit:
                    short.__exit__(None, None, None)

        job.fit, worlds.work = fit, work
        seen = world.begin()
        outcome.write_text(f"{short.count}\n{short.struck}\n{seen.state} {seen.error or ''}\n" + "\n".join(seen.log))

    assert forked(body) == 0
    count, struck, *came_to = outcome.read_text().splitlines()
    return int(count), struck, "\n".join(came_to)


@pytest.fixture(scope="module")
def allocations(undisturbed, tmp_path_factory) -> int:
    return counted(fresh(undisturbed, tmp_path_factory.mktemp("counted") / "world"), -1)[0]


POINTS_OF_MEMORY, IN_CI_OF_MEMORY = 60, 3


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(n, marks=[] if n % (POINTS_OF_MEMORY // IN_CI_OF_MEMORY) == 9 else pytest.mark.chaos)
        for n in range(POINTS_OF_MEMORY)
    ],
)
def test_memory_runs_out(undisturbed, allocations, tmp_path, table, part):
    """Evenly spread over the run: forward, backward, update, validation, state, file."""
    world = fresh(undisturbed, tmp_path / "world")
    _, struck, came_to = counted(world, allocations * part // POINTS_OF_MEMORY)
    assert came_to.startswith("done"), came_to
    assert world.lora == undisturbed.lora
    assert world.leftovers() == []
    how = "a rung lower" if "goes on with" in came_to else "in smaller batches"
    table.append(f"| operation {part}/{POINTS_OF_MEMORY} of the run ({struck}) | out of memory | done, {how} | |")
