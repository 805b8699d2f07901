"""Draws measured steps: a table and a plot of the lines of JSON that the benchmarks print.

usage: python -m benchmarks.plot RESULTS.jsonl ...     writes docs/speed.svg and the tables of docs/speed.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.estimate import estimates

ROOT = Path(__file__).resolve().parent.parent
PAGE, PICTURE = ROOT / "docs" / "speed.md", ROOT / "docs" / "speed.svg"
FAMILIES = {"sd15": "SD1.5", "sdxl": "SDXL"}
COLOURS = {"ours": "#2f6fde", "reference eager": "#8d8d8d", "reference graph": "#b9a14a", "kohya": "#c25b4e"}
ROW, LEFT, WIDTH, TOP = 26, 400, 860, 48

Line = dict[str, Any]


def read(paths: Sequence[Path]) -> list[Line]:
    """All lines, in the order of the files."""
    return [json.loads(text) for path in paths for text in path.read_text(encoding="utf-8").splitlines() if text]


def label(line: Line) -> str:
    """What was measured, in words."""
    dropout = f"dropout {line['dropout']:g}" if line["dropout"] else "no dropout"
    parts = [FAMILIES[line["family"]], f"{line['resolution']}²", f"batch {line['batch']}", dropout]
    parts += ["text encoder"] * bool(line.get("train_text_encoder")) + ["checkpointing"] * bool(line["checkpointing"])
    parts += ["plain torch"] * (line.get("kernels") == "plain") + ["as in a WebUI"] * bool(line.get("webui"))
    parts += ["deterministic"] * bool(line.get("deterministic"))
    parts += [kind for kind in [line.get("adapter", "lora")] if kind != "lora"]
    parts += [f"{parts_of(line)} parts a step"] * (parts_of(line) > 1)
    return ", ".join(parts if line["what"] == "ours" else [line["what"], *parts])


def parts_of(line: Line) -> int:
    """Batches of one step."""
    return line.get("gradient_accumulation_steps", 1)


def gib(line: Line) -> float | None:
    size = line.get("peak_reserved_bytes")
    return None if size is None else size / 2**30


def table(lines: Sequence[Line]) -> str:
    """A row for each line, in Markdown."""
    rows = ["| | ms a step | images/s | reserved, GiB |", "|---|---|---|---|"]
    for line in lines:
        ms, size = line["median_ms"], gib(line)
        speed = line["batch"] * parts_of(line) / ms * 1e3
        rows.append(f"| {label(line)} | {ms:.1f} | {speed:.{0 if speed >= 20 else 1}f} | {size:.2f} |")
    return "\n".join(rows) + "\n"


def svg(lines: Sequence[Line]) -> str:
    """Bars of milliseconds a step, with the memory behind each."""
    longest = max(line["median_ms"] for line in lines)
    height = TOP + ROW * len(lines) + 12
    card, at = lines[0]["card"], lines[0].get("at", "")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="26" font-size="15" fill="#222222">Milliseconds a step, and GPU memory, on one '
        f"{escape(card)} ({escape(at)})</text>",
    ]
    for number, line in enumerate(lines):
        y, ms, size = TOP + ROW * number, line["median_ms"], gib(line)
        bar = max(1.0, (WIDTH - LEFT - 150) * ms / longest)
        told = f"{ms:.1f} ms" + ("" if size is None else f", {size:.1f} GiB")
        parts += [
            f'<text x="{LEFT - 8}" y="{y + 15}" text-anchor="end" fill="#222222">{escape(label(line))}</text>',
            f'<rect x="{LEFT}" y="{y + 2}" width="{bar:.1f}" height="{ROW - 8}" fill="{COLOURS[line["what"]]}"/>',
            f'<text x="{LEFT + bar + 6:.1f}" y="{y + 15}" fill="#444444">{told}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def page(text: str, lines: Sequence[Line]) -> str:
    """`text` with fresh tables between their marks."""
    for name, fresh in (("figures", table(lines)), ("estimates", estimates(lines))):
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        before, rest = text.split(start)
        text = f"{before}{start}\n{fresh}{end}{rest.split(end)[1]}"
    return text


def main(paths: Sequence[str]) -> None:
    lines = read([Path(path) for path in paths])
    PICTURE.write_text(svg(lines), encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), lines), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
