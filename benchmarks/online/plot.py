"""A drawing of several lines over common places, as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

# Distinct for most eyes (Okabe and Ito, 2008).
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00")
_WIDTH, _HEIGHT = 760, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 72, 48
_MOST_LABELS = 11


def line_plot(
    title: str,
    along: str,
    places: Sequence[str],
    lines: Mapping[str, Sequence[float]],
    mark: tuple[int, str] | None = None,
) -> str:
    """The drawing.

    Args:
        along: what the places are; places: a word for each; lines: name -> a value for each place, NaN where
            there is none.
        mark: a place with a line down, and what happens there.
    """
    values = [value for line in lines.values() for value in line if not math.isnan(value)]
    ticks = ticks_of(min(values), max(values))
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
            'font-family="system-ui, sans-serif" font-size="12" fill="#333">',
            f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
            f'<text x="{_LEFT}" y="24" font-size="15" font-weight="600">{escape(title)}</text>',
            *_axis(ticks),
            *_words(places),
            *_mark(mark, len(places)),
            *_lines(lines, ticks),
            f'<text x="{middle:g}" y="{_HEIGHT - 10}" text-anchor="middle">{escape(along)}</text>',
            "</svg>",
            "",
        ]
    )


def ticks_of(low: float, high: float) -> list[float]:
    """Round numbers that enclose a range; at least two."""
    wide = max(high - low, 1e-9)
    step = 10 ** math.floor(math.log10(wide / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if wide / (factor * step) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _x(place: int, places: int) -> float:
    return _LEFT + (place + 0.5) * (_WIDTH - _LEFT - _RIGHT) / max(1, places)


def _y(value: float, ticks: Sequence[float]) -> float:
    bottom = _HEIGHT - _BOTTOM
    return bottom - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - _TOP)


def _axis(ticks: Sequence[float]) -> Iterator[str]:
    for tick in ticks:
        y = _y(tick, ticks)
        yield f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        yield f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.6g}</text>'


def _words(places: Sequence[str]) -> Iterator[str]:
    each = -(-len(places) // _MOST_LABELS)
    for place in range(0, len(places), each):
        at = f'x="{_x(place, len(places)):.1f}" y="{_HEIGHT - _BOTTOM + 18}"'
        yield f'<text {at} text-anchor="middle">{escape(places[place])}</text>'


def _mark(mark: tuple[int, str] | None, places: int) -> Iterator[str]:
    if mark is not None:
        x = _x(mark[0], places)
        yield (
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" stroke="#888" '
            'stroke-dasharray="4 3"/>'
        )
        yield f'<text x="{x + 5:.1f}" y="{_TOP + 10}" fill="#666">{escape(mark[1])}</text>'


def _lines(lines: Mapping[str, Sequence[float]], ticks: Sequence[float]) -> Iterator[str]:
    for number, (name, line) in enumerate(lines.items()):
        colour, left = _COLOURS[number % len(_COLOURS)], _LEFT + number * 170
        yield f'<rect x="{left}" y="38" width="14" height="4" fill="{colour}"/>'
        yield f'<text x="{left + 20}" y="45">{escape(name)}</text>'
        there = [(place, value) for place, value in enumerate(line) if not math.isnan(value)]
        points = " ".join(f"{_x(place, len(line)):.1f},{_y(value, ticks):.1f}" for place, value in there)
        yield f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.8"/>'
