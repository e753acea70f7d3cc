"""How many windows a layer of many numbers a pair works on at once, by device.

DIN's attention has E numbers between its layers for every candidate and behavior. Which windows stand side
by side changes no score but by rounding (property test); it decides where these numbers lie meanwhile, and
how many operators a step has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tiling:
    """How many windows stand side by side.

    Attributes:
        cells: numbers between two layers that a group of windows has at most; a single window may have more.
        spare: so many of them may be of no candidate, whatever their share.
        always_again: a backward pass computes the layers again; else only where there are several groups.
    """

    cells: int
    spare: int
    always_again: bool

    def groups(self, counts: Sequence[int], cells: int) -> list[slice]:
        """Cut windows into runs, `cells` numbers for each candidate of each window.

        Within a run all windows have room for as many candidates as the one with most, so that a run also
        ends where half of that room, and more than is spare, would be empty.

        Args:
            counts: candidates of each window.
        """
        groups, begin, most, held = [], 0, 0, 0
        for window, count in enumerate(counts):
            room, full = (window + 1 - begin) * max(most, count, 1), max(held + count, 1)
            empty = room > 2 * full and (room - full) * cells > self.spare
            if window > begin and (room * cells > self.cells or empty):
                groups.append(slice(begin, window))
                begin, most, held = window, 0, 0
            most, held = max(most, count), held + count
        return [*groups, slice(begin, len(counts))] if counts else []


# 2 MB, which stay in a core's cache between the layers. A backward pass that read [C, X, E] back from
# memory would take longer than one that computes it again.
CPU = Tiling(cells=1 << 19, spare=0, always_again=True)
# A device is as slow to be told of an operator as to do a small one, and reads memory fast: as few groups
# as bounded memory allows, 1 GiB a layer. One group is kept for the backward pass, for that is what it
# needs in any case; of several, only one at a time is held, as on the CPU. Empty room is left where
# computing it takes no longer than some operators' starts, 64 MiB.
DEVICE = Tiling(cells=1 << 28, spare=1 << 24, always_again=False)


def tiling_of(device: torch.device) -> Tiling:
    """The one that serves a device."""
    return CPU if device.type == "cpu" else DEVICE
