"""When early stopping would have ended long runs, and whether the score of fidelity against drift ranks checkpoints as
the held-out loss and the pictures do.

usage: python -m benchmarks.stopping RESULTS.jsonl [PICTURES.jsonl] [--by distance] [--patience 3] [--every 1]

RESULTS are lines of `benchmarks.quality`, run to their end, PICTURES those of `benchmarks.pictures`, looked at by one
of their measures. Every `every`-th measurement is looked at.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean

from benchmarks.plot import Line, read
from lora_trainer.curve import Point, best, risen, waited
from lora_trainer.training.fidelity import score


def curve(line: Line, every: int) -> list[Point]:
    return [Point(step, line["base"], lora, train) for step, lora, train in line["curve"][::every]]


def picked(points: Sequence[Point], patience: int) -> tuple[Point, Point]:
    """The best point when the run would have ended, and the one at which it would."""
    for count in range(1, len(points) + 1):
        if waited(points[:count]) >= patience:
            return best(points[:count]), points[count - 1]
    return best(points), points[-1]


def stops(lines: Sequence[Line], patience: int, every: int) -> Iterator[str]:
    """A row for each run, in Markdown."""
    yield "| run | ends after | its best | best of all | worse by | risen by 5 % |"
    yield "|---|---|---|---|---|---|"
    for line in sorted(lines, key=lambda line: (line["style"], line["seed"])):
        points = curve(line, every)
        (best_then, end), least = picked(points, patience), best(points)
        yield (
            f"| {line['style']} {line['seed']} | {end.step / line['steps']:.0%} | {best_then.lora:.4f} | "
            f"{least.lora:.4f} | {best_then.lora / least.lora - 1:+.1%} | {'yes' if risen(points) else 'no'} |"
        )


def ranks(values: Sequence[float]) -> list[float]:
    """From 0; equals share the mean of theirs."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2 for value in values
    ]


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation."""
    a, b = ranks(one), ranks(other)
    ma, mb = mean(a), mean(b)
    covariance = sum((x - ma) * (y - mb) for x, y in zip(a, b, strict=True))
    return covariance / (sum((x - ma) ** 2 for x in a) * sum((y - mb) ** 2 for y in b)) ** 0.5


def correlations(lines: Sequence[Line], pictures: Sequence[Line], by: str = "distance") -> Iterator[str]:
    """Rank correlations within each run: of the score with the held-out loss and with the pictures' distance, `by` one
    of their measures (their signs turned, so that 1 is agreement), of those two with each other, and of every other
    draw of the pictures with the rest of them, which is how far their order can be trusted; last the mean. The score is
    by its formula of now, of what was measured then."""
    drawn = {(p["style"], p["seed"], p["step"]): p for p in pictures}
    columns = (
        "run",
        "checkpoints",
        "score, held-out loss",
        "score, pictures",
        "held-out loss, pictures",
        "pictures' own",
    )
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    rows = []
    for line in sorted(lines, key=lambda line: (line["style"], line["seed"])):
        loss = {step: lora for step, lora, _ in line["curve"]}
        shown = [
            (step, score(likeness, drift, 1 - loss[step] / line["base"]))
            for step, likeness, drift, _ in line["compared"]
            if step > 0 and step in loss
        ]
        at = {
            step: drawn.get((line["style"], line["seed"], None if step == line["steps"] else step)) for step, _ in shown
        }
        seen = [(value, -loss[step], at[step]) for step, value in shown if at[step] is not None]
        if len(seen) < 3:
            continue
        scored, held_out, found = zip(*seen, strict=True)
        near = [-each[by] for each in found]
        own = trust([each.get(f"{by}_draws", []) for each in found])
        rows.append([spearman(scored, held_out), spearman(scored, near), spearman(held_out, near), own])
        yield f"| {line['style']} {line['seed']} | {len(seen)} | " + _row(rows[-1])
    if rows:
        yield "| mean | | " + _row([mean(column) for column in zip(*rows, strict=True)])


def trust(draws: Sequence[Sequence[float]]) -> float:
    """Rank correlation of two halves of the draws of each checkpoint; of fewer than two not a number."""
    if min(map(len, draws)) < 2:
        return math.nan
    return spearman([mean(each[::2]) for each in draws], [mean(each[1::2]) for each in draws])


def _row(values: Sequence[float]) -> str:
    return " | ".join("" if math.isnan(value) else f"{value:.2f}" for value in values) + " |"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("pictures", type=Path, nargs="?")
    parser.add_argument("--patience", type=int, default=3)
    parser.add_argument("--by", choices=("distance", "perceptual"), default="distance")
    parser.add_argument("--every", type=int, default=1)
    asked = parser.parse_args(arguments)
    lines = read([asked.results])
    print("\n".join(stops(lines, asked.patience, asked.every)))
    if asked.pictures:
        print("\n" + "\n".join(correlations(lines, read([asked.pictures]), asked.by)))


if __name__ == "__main__":
    main(sys.argv[1:])
