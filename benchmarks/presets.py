"""What settings for few pictures are worth, and when: a table of long runs of `benchmarks.quality`.

usage: python -m benchmarks.presets RESULTS.jsonl [--epochs 20 40]

Of each setting the held-out loss as a share of the base's, mean over its runs, after so many epochs and at its best.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, median

from benchmarks.plot import Line, read


def after(line: Line, epochs: int) -> float:
    """The held-out loss of a run when each picture had been seen so often, as a share of the base's; of the last
    measurement until then."""
    per_epoch = line["pictures"] * line["steps"] / line["visits"]
    return [lora for step, lora, _ in line["curve"] if step <= epochs * per_epoch][-1] / line["base"]


def best(line: Line) -> tuple[float, int]:
    """The lowest one, and its step."""
    step, lora, _ = min(line["curve"], key=lambda point: point[1])
    return lora / line["base"], step


def rows(lines: Sequence[Line], epochs: Sequence[int]) -> Iterator[str]:
    """A row for each setting, in Markdown, the lowest first."""
    yield "| settings | " + " | ".join(f"{count} epochs" for count in epochs) + " | best | at step | runs |"
    yield "|---|" + "---|" * (len(epochs) + 3)
    of: dict[str, list[Line]] = {}
    for line in lines:
        of.setdefault(line["settings"], []).append(line)
    for name, runs in sorted(of.items(), key=lambda one: mean(best(run)[0] for run in one[1])):
        then = " | ".join(f"{mean(after(run, count) for run in runs):.3f}" for count in epochs)
        lowest, steps = zip(*map(best, runs), strict=True)
        yield f"| {name} | {then} | {mean(lowest):.3f} | {median(steps):.0f} | {len(runs)} |"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--epochs", type=int, nargs="+", default=[20, 40])
    asked = parser.parse_args(arguments)
    print("\n".join(rows(read([asked.results]), asked.epochs)))


if __name__ == "__main__":
    main(sys.argv[1:])
