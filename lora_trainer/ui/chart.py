"""Curves as small SVGs of our own: no script, no library, colors from the page's theme."""

from __future__ import annotations

import math
from collections.abc import Sequence

WIDTH, HEIGHT = 600, 160
MAX_POINTS = 300
_MARGIN = 6

Point = tuple[float, float]
# First and last step, lowest and highest value.
Span = tuple[float, float, float, float]


def smooth(points: Sequence[Point], window: float = 20.0) -> list[Point]:
    """The points as a running mean that follows the last `window` or so; the start is not pulled towards zero."""
    kept, weight, smoothed = 0.0, 0.0, []
    for x, y in points:
        kept = kept * (1 - 1 / window) + y / window
        weight = weight * (1 - 1 / window) + 1 / window
        smoothed.append((x, kept / weight))
    return smoothed


def finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def curve(losses: Sequence[Point]) -> str:
    """Each loss faintly, their running mean boldly; empty under two points.

    Diffusion losses jump with the noise level, so the axis covers the middle 96 % of them.
    """
    points = finite(losses)
    if len(points) < 2:
        return ""
    trend = smooth(points)
    values = sorted(y for _, y in points)
    cut = len(values) // 50
    inside = [*values[cut : len(values) - cut], *(y for _, y in trend)]
    span = (points[0][0], points[-1][0], min(inside), max(inside))
    lines = [_line(points, span, "lt-each"), _line(trend, span, "lt-trend")]
    return (
        f"{_svg(lines, f'Loss from {trend[0][1]:.4f} to {trend[-1][1]:.4f}')}"
        f'<span class="lt-high">{span[3]:.3g}</span><span class="lt-low">{span[2]:.3g}</span>'
    )


def judged(held_out: Sequence[Point], train: Sequence[Point], mark: Point) -> str:
    """How far losses are from those of the base model, as shares of it (-0.3 is 30 % lower): held-out pictures boldly,
    training pictures dashed, the base as a line at zero, and a dot at `mark`."""
    lines_of = {"lt-held-out": finite(held_out), "lt-watched": finite(train)}
    points = [point for line in lines_of.values() for point in line]
    steps, shares = [x for x, _ in points], [0.0, *(y for _, y in points)]
    span = (min(steps), max(steps), min(shares), max(shares))
    lines = [_line([(span[0], 0.0), (span[1], 0.0)], span, "lt-zero")]
    lines += [_line(line, span, name) for name, line in lines_of.items() if len(line) > 1]
    across, down = _place(mark, span)
    dot = f'<span class="lt-best" style="left:{across / WIDTH:.1%};top:{down / HEIGHT:.1%}"></span>'
    words = f"Held-out loss against the base model, now {lines_of['lt-held-out'][-1][1]:+.0%}"
    top = _place((span[0], 0.0), span)[1] / HEIGHT
    low = f'<span class="lt-low">{span[2]:+.0%}</span>' if top < 0.85 else ""
    high = f'<span class="lt-high">{span[3]:+.0%}</span>' if top > 0.15 else ""
    zero = f'<span class="lt-zero" style="top:{top:.1%}">base</span>'
    return f'<div class="lt-plot">{_svg(lines, words)}{dot}</div>{zero}{high}{low}'


def swept(tried: Sequence[Point], mark: float | None = None) -> str:
    """Losses over learning rates, by their logarithm, against the first one, the base model's, as a line; `mark` is a
    rate that is pointed out. Empty under two points."""
    # Where it blows up would else flatten all that matters.
    points = [(math.log10(rate), min(loss, 1.1 * tried[0][1])) for rate, loss in finite(tried)]
    if len(points) < 2:
        return ""
    losses = [loss for _, loss in points]
    base, span = points[0][1], (points[0][0], points[-1][0], min(losses), max(losses))
    lines = [_line([(span[0], base), (span[1], base)], span, "lt-zero"), _line(points, span, "lt-held-out")]
    if mark is not None:
        lines.append(_line([(math.log10(mark), span[2]), (math.log10(mark), span[3])], span, "lt-mark"))
    words = f"Loss from {base:.4f} at the base to {span[2]:.4f} at the best learning rate"
    powers = range(math.ceil(span[0] - 1e-9), math.floor(span[1] + 1e-9) + 1)
    ticks = "".join(
        f'<span style="left:{_place((power, base), span)[0] / WIDTH:.1%}">1e{power}</span>' for power in powers
    )
    top = _place((span[0], base), span)[1] / HEIGHT
    high = f'<span class="lt-high">{span[3]:.3g}</span>' if top > 0.15 else ""
    low = f'<span class="lt-low" style="top:{HEIGHT - 16}px;bottom:auto">{span[2]:.3g}</span>' if top < 0.85 else ""
    return (
        f'<div class="lt-plot">{_svg(lines, words)}</div><div class="lt-ticks">{ticks}</div>'
        f'<span class="lt-zero" style="top:{top * HEIGHT:.0f}px">base</span>{high}{low}'
    )


def _svg(lines: Sequence[str], words: str) -> str:
    return (
        f'<svg class="lt-curve" viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{words}">{"".join(lines)}</svg>'
    )


def _place(point: Point, span: Span) -> Point:
    """Where a point lies in the picture."""
    left, right, low, high = span
    wide, tall = (right - left) or 1, (high - low) or 1
    across = (point[0] - left) / wide * WIDTH
    return across, _MARGIN + (1 - (min(max(point[1], low), high) - low) / tall) * (HEIGHT - 2 * _MARGIN)


def _line(points: Sequence[Point], span: Span, name: str) -> str:
    every = -(-len(points) // MAX_POINTS)
    spots = (_place(point, span) for point in (*points[:-1:every], points[-1]))
    corners = " ".join(f"{across:.1f},{down:.1f}" for across, down in spots)
    return f'<polyline class="{name}" points="{corners}" vector-effect="non-scaling-stroke"/>'
