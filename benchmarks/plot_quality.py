"""Draws what settings are worth: the held-out losses that `benchmarks.quality` prints, as a picture and a table.

usage: python -m benchmarks.plot_quality RESULTS.jsonl ...

It writes docs/defaults.svg and the table of docs/defaults.md.

A run's value is its held-out loss as a share of the base model's, so that styles can be averaged.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import mean, stdev

from benchmarks.plot import ROOT, Line, read

PAGE, PICTURE = ROOT / "docs" / "defaults.md", ROOT / "docs" / "defaults.svg"
ROW, LEFT, WIDTH, TOP = 30, 200, 860, 48
OURS = "default"


def shares(lines: Sequence[Line]) -> dict[str, dict[tuple[str, int], float]]:
    """settings -> (style, seed) -> held-out loss / the base's; of two lines for one run the later counts. A seed counts
    that has seen all styles, since styles differ far more than settings do."""
    found: dict[str, dict[tuple[str, int], float]] = defaultdict(dict)
    for line in lines:
        found[line["settings"]][line["style"], line["seed"]] = line["final"] / line["base"]
    styles = {style for runs in found.values() for style, _ in runs}
    return {
        name: {run: share for run, share in runs.items() if all((style, run[1]) in runs for style in styles)}
        for name, runs in found.items()
    }


def over_seeds(runs: dict[tuple[str, int], float]) -> list[float]:
    """The mean over styles for each seed."""
    return [mean(share for (_, seen), share in runs.items() if seen == seed) for seed in {seed for _, seed in runs}]


def error(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def against(ours: dict[tuple[str, int], float], theirs: dict[tuple[str, int], float]) -> list[float]:
    """Theirs less ours, run by run."""
    return [theirs[run] - ours[run] for run in theirs if run in ours]


def table(lines: Sequence[Line]) -> str:
    """A row for each settings, best first, in Markdown."""
    found = shares(lines)
    rows = ["| settings | held-out loss / base | worse than ours by | runs |", "|---|---|---|---|"]
    for name, runs in sorted(found.items(), key=lambda entry: mean(entry[1].values())):
        gaps = against(found.get(OURS, {}), runs)
        gap = "" if name == OURS or not gaps else f"{mean(gaps):+.4f} ± {error(gaps):.4f}"
        rows.append(f"| {name} | {mean(runs.values()):.4f} | {gap} | {len(runs)} |")
    return "\n".join(rows) + "\n"


def svg(lines: Sequence[Line]) -> str:
    """A dot with its standard error for each settings, and small dots for the runs."""
    found = sorted(shares(lines).items(), key=lambda entry: mean(entry[1].values()))
    everything = [value for _, runs in found for value in runs.values()]
    low, high = min(everything), max(everything)
    height = TOP + ROW * len(found) + 34

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - 40) * (value - low) / ((high - low) or 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        '<text x="12" y="26" font-size="14" fill="#222222">Held-out loss / the base model\'s, as many pictures seen '
        "(less is better): each run, their mean, its standard error over seeds</text>",
    ]
    for number, (name, runs) in enumerate(found):
        y, values = TOP + ROW * number + ROW / 2, list(runs.values())
        middle, half = mean(values), error(over_seeds(runs))
        colour = "#2f6fde" if name == OURS else "#8d8d8d"
        parts.append(f'<text x="{LEFT - 12}" y="{y + 5}" text-anchor="end" fill="#222222">{escape(name)}</text>')
        parts += [f'<circle cx="{x(value):.1f}" cy="{y}" r="2.5" fill="{colour}" opacity="0.45"/>' for value in values]
        parts += [
            f'<line x1="{x(middle - half):.1f}" y1="{y}" x2="{x(middle + half):.1f}" y2="{y}" stroke="{colour}" '
            'stroke-width="3"/>',
            f'<circle cx="{x(middle):.1f}" cy="{y}" r="6" fill="{colour}"><title>{middle:.4f} ± {half:.4f}</title>'
            "</circle>",
        ]
    for value in (low, (low + high) / 2, high):
        parts.append(
            f'<text x="{x(value):.1f}" y="{height - 12}" text-anchor="middle" fill="#444444">{value:.3f}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def page(text: str, fresh: str) -> str:
    """`text` with a fresh table between its marks."""
    start, end = "<!-- figures:start -->", "<!-- figures:end -->"
    before, rest = text.split(start)
    return f"{before}{start}\n{fresh}{end}{rest.split(end)[1]}"


def main(paths: Sequence[str]) -> None:
    lines = read([Path(path) for path in paths])
    PICTURE.write_text(svg(lines), encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), table(lines)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
