"""How long the compared configs were trained, where that differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def steps_apart(steps: Mapping[str, Sequence[int]]) -> str:
    """The steps of each config, to be put behind a sentence that compares them; empty where all are alike.

    Args:
        steps: label -> steps of its runs.
    """
    if len({step for own in steps.values() for step in own}) < 2:
        return ""
    return f" (steps trained: {' against '.join(f'{label} {_range(own)}' for label, own in steps.items())})"


def _range(steps: Sequence[int]) -> str:
    low, high = min(steps), max(steps)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
