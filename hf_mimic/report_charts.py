"""Charts of a report's page as inline SVG: no script, colours by CSS class, so that they follow light and dark.

All text goes through markupsafe. The same charts for papers are in report_figures.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

_WIDTH = 360
_MOST_MARKS, _MOST_NAMES = 40, 12
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 18, 34


def _ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers in [low, high]."""
    raw = (high - low) / most
    power = 10.0 ** np.floor(np.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = int(np.ceil(low / step)), int(np.floor(high / step + 1e-6))
    return [float(f"{i * step:.6g}") for i in range(first, last + 1)]


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = float(np.min(values)), float(np.max(values))
    margin = (high - low) * 0.06 or max(abs(low), 1e-6) * 0.05
    return low - margin, high + margin


def _svg(height: float, title: str, parts: Sequence[Any]) -> Markup:
    inner = Markup("").join(parts)
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, height, title, inner
    )


def _text(x: float, y: float, text: str, kind: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" class="{}">{}</text>').format(x, y, kind, text)


def ridges(distribution: Mapping[str, Any], name: str) -> Markup:
    """Return the histogram of each epoch, one below the other, with its mean.

    Args:
        distribution: Of `report_numbers.distributions`.
        name: Of the score.
    """
    edges, rows = np.asarray(distribution["edges"]), distribution["epochs"]
    step, low, high = 34, edges[0], edges[-1]
    bottom = _TOP + step * len(rows) + 6

    def across(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    parts = [_axis(across, _ticks(low, high), bottom, name)]
    for i, row in enumerate(rows):
        base = _TOP + step * (i + 1)
        counts = np.asarray(row["counts"], dtype=float)
        heights = base - counts / max(counts.max(), 1) * (step - 4)
        outline = " ".join(
            f"{across(a):.1f},{y:.1f} {across(b):.1f},{y:.1f}"
            for a, b, y in zip(edges[:-1], edges[1:], heights, strict=True)
        )
        points = f"{across(low):.1f},{base} {outline} {across(high):.1f},{base}"
        parts.append(Markup('<polygon class="area" points="{}"/>').format(points))
        mean = across(min(max(row["mean"], low), high))
        mark = '<line class="mean" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>'
        parts.append(Markup(mark).format(mean, mean, base, base - step + 4))
        parts.append(_text(_LEFT - 6, base - 3, f"{row['epoch']}", "end"))
    parts.append(_text(2, _TOP + 6, "epoch", "start soft"))
    return _svg(bottom + _BOTTOM, f"Distribution of {name} in {len(rows)} epochs; the line is the mean.", parts)


def _axis(across: Any, ticks: Sequence[float], y: float, name: str) -> Markup:
    parts = [Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(_LEFT, _WIDTH - _RIGHT, y, y)]
    parts += [_text(across(tick), y + 13, f"{tick:g}", "middle") for tick in ticks]
    return Markup("").join([*parts, _text((_LEFT + _WIDTH - _RIGHT) / 2, y + 28, name, "middle soft")])


def plot(
    x: Sequence[float],
    y: Sequence[float],
    *,
    names: tuple[str, str],
    band: tuple[Sequence[float], Sequence[float]] | None = None,
    points: Sequence[str] | None = None,
) -> Markup:
    """Return a line with marks, in the order of x.

    Args:
        x: (K,), finite.
        y: (K,), finite.
        names: Of the axes.
        band: Lower and upper end at each x: a band, or bars where points are named.
        points: Names of the points (K,): then there is no line between them.
    """
    low, high = (y, y) if band is None else band
    (left, right), (floor, top) = _span(x), _span([*y, *low, *high])
    height = 220
    base = height - _BOTTOM

    def across(value: float) -> float:
        return _LEFT + (value - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)

    def down(value: float) -> float:
        return base - (value - floor) / (top - floor) * (base - _TOP)

    parts = [_axis(across, _ticks(left, right), base, names[0])]
    for tick in _ticks(floor, top):
        grid = '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
        parts.append(Markup(grid).format(_LEFT, _WIDTH - _RIGHT, down(tick), down(tick)))
        parts.append(_text(_LEFT - 5, down(tick) + 4, f"{tick:g}", "end"))
    place = [(across(a), down(b), down(c), down(d)) for a, b, c, d in sorted(zip(x, y, low, high, strict=True))]
    if points is None:
        parts += _curve(place, band=band is not None)
    else:
        named = zip(x, y, low, high, points, strict=True)
        parts += [_point(across(a), down(b), down(c), down(d), n, len(points)) for a, b, c, d, n in named]
    return _svg(height, f"{names[1]} against {names[0]}", [*parts, _text(4, 8, names[1], "start soft")])


def _curve(place: Sequence[tuple[float, float, float, float]], *, band: bool) -> list[Markup]:
    """Return a line through (x, y, low, high), in pixels, from left to right, with its band."""
    parts = []
    if band:
        outline = " ".join([f"{x:.1f},{high:.1f}" for x, _, _, high in place])
        back = " ".join([f"{x:.1f},{low:.1f}" for x, _, low, _ in place[::-1]])
        parts.append(Markup('<polygon class="band" points="{} {}"/>').format(outline, back))
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in place)
    parts.append(Markup('<polyline class="line" points="{}"/>').format(line))
    marks = place if len(place) <= _MOST_MARKS else ()
    return parts + [
        Markup('<circle class="mark" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(x, y) for x, y, _, _ in marks
    ]


def _point(x: float, y: float, low: float, high: float, name: str, of: int) -> Markup:
    """Return a point, in pixels, with a bar from low to high, and its name where there is room."""
    bar = Markup('<line class="mean" x1="{0:.1f}" x2="{0:.1f}" y1="{1:.1f}" y2="{2:.1f}"/>').format(x, low, high)
    mark = Markup('<circle class="mark" cx="{:.1f}" cy="{:.1f}" r="3"><title>{}</title></circle>').format(x, y, name)
    right = x > _WIDTH * 0.7
    word = _text(x + (-6 if right else 6), y - 5, name, "end" if right else "start") if of <= _MOST_NAMES else ""
    return Markup("").join([bar, mark, word])
