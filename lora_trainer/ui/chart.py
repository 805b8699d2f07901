"""The loss curve as a small SVG of our own: no script, no library, colors from the page's theme."""

from __future__ import annotations

import math
from collections.abc import Sequence

WIDTH, HEIGHT = 600, 160
MAX_POINTS = 300
_MARGIN = 6

Point = tuple[float, float]


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


def curve(losses: Sequence[Point], held_out: Sequence[Point] = ()) -> str:
    """Each loss faintly, their running mean boldly, the held-out loss dashed; empty under two points.

    Diffusion losses jump with the noise level, so the axis covers the middle 96 % of them.
    """
    points, measured = finite(losses), finite(held_out)
    if len(points) < 2:
        return ""
    trend = smooth(points)
    values = sorted(y for _, y in points)
    cut = len(values) // 50
    inside = [*values[cut : len(values) - cut], *(y for _, y in (*trend, *measured))]
    low, high = min(inside), max(inside)
    steps = [x for x, _ in (points[0], points[-1], *measured)]
    span = (min(steps), max(steps), low, high)
    lines = [_line(points, span, "lt-each"), _line(trend, span, "lt-trend")]
    if len(measured) > 1:
        lines.append(_line(measured, span, "lt-held-out"))
    return (
        f'<svg class="lt-curve" viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="Loss from {trend[0][1]:.4f} to {trend[-1][1]:.4f}">{"".join(lines)}</svg>'
        f'<span class="lt-high">{high:.3g}</span><span class="lt-low">{low:.3g}</span>'
    )


def _line(points: Sequence[Point], span: tuple[float, float, float, float], name: str) -> str:
    left, right, low, high = span
    wide, tall = (right - left) or 1, (high - low) or 1
    every = -(-len(points) // MAX_POINTS)
    spots = []
    for x, y in (*points[:-1:every], points[-1]):
        across = (x - left) / wide * WIDTH
        down = _MARGIN + (1 - (min(max(y, low), high) - low) / tall) * (HEIGHT - 2 * _MARGIN)
        spots.append(f"{across:.1f},{down:.1f}")
    return f'<polyline class="{name}" points="{" ".join(spots)}" vector-effect="non-scaling-stroke"/>'
