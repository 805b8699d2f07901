"""A process is killed anywhere; the next one comes to the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

import pytest

from tests.chaos.world import Operations, World, child, forked, fresh, kill_me

# `make test-chaos` runs them all; CI those without the mark.
KILLS, IN_CI = 50, 3


def cases(count: int) -> list:
    return [pytest.param(n, marks=[] if n < IN_CI else pytest.mark.chaos) for n in range(count)]


@pytest.fixture(scope="session")
def operations(undisturbed, tmp_path_factory) -> int:
    """How many operations on files the undisturbed job needs."""
    world = fresh(undisturbed, tmp_path_factory.mktemp("counted") / "world")
    counted = world.folder / "count"

    def body() -> None:
        with Operations(lambda number, name, arguments, real: real(*arguments)) as operations:
            world.begin()
            counted.write_text(str(operations.count))

    assert forked(body) == 0
    return int(counted.read_text())


def recovers(world: World, undisturbed: World) -> None:
    """The next process ends the job as if nothing had happened."""
    assert forked(world.begin) == 0
    assert world.lora == undisturbed.lora
    assert world.leftovers() == []
    assert world.lifecycle() >= undisturbed.lifecycle()


@pytest.mark.parametrize("case", cases(KILLS // 2))
def test_killed_at_an_operation_on_files(undisturbed, operations, tmp_path, case):
    """Before the operation or, while writing, in the middle of it."""
    world = fresh(undisturbed, tmp_path / "world")
    chosen = random.Random(case)
    # Writes are by far the most numerous: half of the kills are for what comes between them.
    at, only = chosen.randrange(operations), chosen.choice((None, ("_flush", "_rename", "_unlink")))

    def strike(number: int, name: str, arguments: tuple, real: object) -> object:
        if number >= at and (only is None or name in only):
            if name == "_write":
                file, data = arguments
                real(file, bytes(data)[: len(data) // 2])
                file.flush()
            kill_me()
        return real(*arguments)

    def body() -> None:
        with Operations(strike):
            world.begin()

    assert forked(body) in (-9, 0)
    recovers(world, undisturbed)


@pytest.mark.parametrize("case", cases(KILLS // 2))
def test_killed_at_a_time(undisturbed, tmp_path, case):
    world = fresh(undisturbed, tmp_path / "world")
    process = child(world.begin)
    time.sleep(random.Random(case).uniform(0.01, 1.0))
    process.kill()
    process.join()
    recovers(world, undisturbed)


def test_killed_again_and_again(undisturbed, tmp_path):
    world = fresh(undisturbed, tmp_path / "world")
    for case in range(4):
        process = child(world.begin)
        time.sleep(random.Random(100 + case).uniform(0.1, 0.7))
        process.kill()
        process.join()
    recovers(world, undisturbed)


@pytest.fixture(scope="session")
def recorded(undisturbed, tmp_path_factory) -> list[tuple]:
    """The operations of an undisturbed job in order: (name, path in the world, data or new path)."""
    import pickle

    world = fresh(undisturbed, tmp_path_factory.mktemp("recorded") / "world")
    tape, log = world.folder.parent / "tape", []

    def record(number: int, name: str, arguments: tuple, real: object) -> object:
        first = arguments[0]
        path = os.path.relpath(first if isinstance(first, Path) else first.name, world.folder)
        if name == "_write":
            log.append((name, path, bytes(arguments[1])))
        elif name == "_rename":
            log.append((name, path, os.path.relpath(arguments[1], world.folder)))
        else:
            log.append((name, path, None))
        return real(*arguments)

    def body() -> None:
        with Operations(record):
            world.begin()
            tape.write_bytes(pickle.dumps(log))

    assert forked(body) == 0
    return _joined(pickle.loads(tape.read_bytes()))


def _joined(log: list[tuple]) -> list[tuple]:
    """Runs of writes to one file as three: the first, the middle ones, the last."""
    joined: list[tuple] = []
    run: list[tuple] = []
    for entry in [*log, ("end", "", None)]:
        if entry[0] == "_write" and (not run or run[-1][1] == entry[1]):
            run.append(entry)
            continue
        if len(run) > 3:
            run = [run[0], ("_write", run[0][1], b"".join(data for _, _, data in run[1:-1])), run[-1]]
        joined += run
        run = [entry] if entry[0] == "_write" else []
        joined += [] if entry[0] in ("_write", "end") else [entry]
    return joined


def replay(world: World, log: list[tuple], *, lost: bool) -> None:
    """The disk after these operations and a power cut; `lost`: without what was written and not flushed."""
    written: dict[str, bytes] = {}
    flushed: dict[str, bytes] = {}
    for name, path, more in log:
        if name == "_write":
            written[path] = written.get(path, b"") + more
        elif name == "_flush":
            flushed[path] = written.get(path, b"")
        elif name == "_rename":
            written[more], flushed[more] = written.pop(path), flushed.pop(path, b"")
        else:
            written.pop(path, None)
            flushed.pop(path, None)
    for path, data in written.items():
        target = world.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(flushed.get(path, b"") if lost else data)


PREFIXES = 400


@pytest.mark.parametrize(
    "case", [pytest.param(n, marks=[] if n in (7, 46, 91) else pytest.mark.chaos) for n in range(PREFIXES)]
)
def test_power_cut_after_any_operation(undisturbed, recorded, tmp_path, case):
    number, lost = divmod(case, 2)
    if number > len(recorded):
        pytest.skip(f"the job has only {len(recorded)} operations")
    world = fresh(undisturbed, tmp_path / "world")
    replay(world, recorded[:number], lost=bool(lost))
    moved(world)
    recovers(world, undisturbed)
    shutil.rmtree(world.folder)


def moved(world: World) -> None:
    """The history names the folder of the world that was recorded: this one is it now."""
    for path in (world.folder / "jobs").glob("*/*"):
        data = path.read_bytes()
        at = data.find(b"/world/out")
        if at >= 0:
            start = data.rfind(b'"', 0, at) + 1
            path.write_bytes(data.replace(data[start : at + len(b"/world")], str(world.folder).encode()))
