"""A drawing of the shares that each merge took of its branches: one bar a merge, as SVG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape

# Distinct for most eyes (Okabe and Ito, 2008); the target's own branch has the first.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
_WIDTH, _HEIGHT = 720, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 72, 52
_MOST_TICKS, _WIDEST = 10, 64
_LEGEND_STEP = 160


def shares_plot(names: Sequence[str], history: Sequence[tuple[int, Mapping[str, float]]]) -> str:
    """The drawing.

    Args:
        names: of all branches; history: of each merge, its step and the share of each branch that took part.
    """
    colours = {name: _COLOURS[place % len(_COLOURS)] for place, name in enumerate(names)}
    rows = -(-len(names) // 4)
    top = _TOP + 20 * (rows - 1)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT + top - _TOP}" '
            'font-family="system-ui, sans-serif" font-size="12" fill="#333">',
            f'<rect width="{_WIDTH}" height="{_HEIGHT + top - _TOP}" fill="#fff"/>',
            f'<text x="{_LEFT}" y="24" font-size="15" font-weight="600">',
            "Shares of the branches in each merge</text>",
            *_legend(colours),
            *_axis(top),
            *_bars(colours, history, top),
            f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2:g}" y="{_bottom(top) + 42}" text-anchor="middle">'
            "step of the run</text>",
            "</svg>",
            "",
        ]
    )


def _bottom(top: int) -> int:
    return top + _HEIGHT - _TOP - _BOTTOM


def _legend(colours: Mapping[str, str]) -> Iterator[str]:
    for place, (name, colour) in enumerate(colours.items()):
        x, y = _LEFT + place % 4 * _LEGEND_STEP, 42 + place // 4 * 20
        yield f'<rect x="{x}" y="{y - 9}" width="11" height="11" rx="2" fill="{colour}"/>'
        shown = name if len(name) <= 20 else f"{name[:19]}…"
        yield f'<text x="{x + 17}" y="{y + 1}">{escape(shown)}</text>'


def _axis(top: int) -> Iterator[str]:
    """Lines at every quarter, with their shares."""
    bottom = _bottom(top)
    for quarter in range(5):
        y = bottom - quarter / 4 * (bottom - top)
        yield f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:g}" y2="{y:g}" stroke="#ddd"/>'
        yield f'<text x="{_LEFT - 8}" y="{y + 4:g}" text-anchor="end">{quarter / 4:g}</text>'


def _bars(
    colours: Mapping[str, str], history: Sequence[tuple[int, Mapping[str, float]]], top: int
) -> Iterator[str]:
    bottom, each = _bottom(top), (_WIDTH - _LEFT - _RIGHT) / max(1, len(history))
    wide, labelled = min(each * 0.8, _WIDEST), -(-len(history) // _MOST_TICKS)
    for place, (step, shares) in enumerate(history):
        middle, y = _LEFT + (place + 0.5) * each, float(bottom)
        for name, share in shares.items():
            height = share * (bottom - top)
            y -= height
            if share:
                yield (
                    f'<rect x="{middle - wide / 2:.2f}" y="{y:.2f}" width="{wide:.2f}" height="{height:.2f}" '
                    f'fill="{colours[name]}"><title>step {step:,}: {share:.3g} {escape(name)}</title></rect>'
                )
        if place % labelled == 0:
            yield f'<text x="{middle:.2f}" y="{bottom + 18}" text-anchor="middle">{step:,}</text>'
