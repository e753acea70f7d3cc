"""What stage two looks up: the behaviors that any branch kept, each once.

How many these are is known only once they are found, and a host that asks a device waits for all that it has
still to do. On a device the host uses a bound instead, and other behaviors fill up what is missing: the
result is the same, for no candidate points at them and their gradient is zero, which leaves a row as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from trainer.data.batch import Sizes
from trainer.model.windows import Selection, Windows


def union_of(kept: Sequence[Selection | Windows], behaviors: int) -> tuple[Tensor, Tensor]:
    """The behaviors that anything kept, ascending; asks the device how many.

    Args:
        behaviors: N.

    Returns:
        int64 [S], the behaviors to look up, each once; and int64 [N], where each of the batch's behaviors is
        among them, N at least 1. Places of behaviors that nobody kept are 0.
    """
    if kept[0].index.device.type == "cpu":
        return _union_by_numpy(kept, behaviors)
    touched = touched_by(kept, behaviors)
    place = torch.where(touched, torch.cumsum(touched, 0) - 1, 0)
    return torch.nonzero(touched[:behaviors]).squeeze(1), place


def _union_by_numpy(kept: Sequence[Selection | Windows], behaviors: int) -> tuple[Tensor, Tensor]:
    """The same on the CPU, in half the time: numpy writes to places and finds them faster."""
    touched = np.zeros(max(behaviors, 1), dtype=bool)
    for each in kept:
        index, mask = each.index.numpy(), each.mask.numpy()
        touched[index if mask.all() else index[mask]] = True
    behavior = np.flatnonzero(touched)
    place = np.zeros(touched.size, dtype=np.int64)
    place[behavior] = np.arange(behavior.size)
    return torch.from_numpy(behavior), torch.from_numpy(place)


def padded_union(
    kept: Sequence[Selection | Windows], behaviors: int, bound: int
) -> tuple[Tensor, Tensor] | None:
    """The same followed by other behaviors, `bound` in all, without asking; None where these are all.

    `bound`: of `most_kept`.
    """
    if bound >= behaviors:
        return None
    touched = touched_by(kept, behaviors)
    # Stable: those that were kept come first, as many as they are, all in ascending order.
    order = (~touched).to(torch.int8).sort(stable=True).indices
    return order[:bound], torch.where(touched, torch.cumsum(touched, 0) - 1, 0)


def touched_by(kept: Sequence[Selection | Windows], behaviors: int) -> Tensor:
    """Which behaviors anything kept: bool [N], at least 1."""
    behaviors = max(behaviors, 1)
    # Padding marks one more place, so that no mask has to be counted; all write the same value.
    touched = torch.zeros(behaviors + 1, dtype=torch.bool, device=kept[0].index.device)
    for each in kept:
        touched.index_fill_(0, torch.where(each.mask, each.index, behaviors).flatten(), True)
    return touched[:behaviors]


def most_kept(sizes: Sizes, branches: Iterable[tuple[int, int | None]]) -> int:
    """At least as many as the behaviors that all branches keep together, known without looking at any.

    A branch keeps of each request at most its window, or K behaviors for each of its candidates; requests
    whose windows overlap keep no more than what their windows cover.

    Args:
        branches: of each, the newest behaviors of a request that it looks at (0 = all), and how many of them
            a candidate keeps at most; None: whole windows are kept, with candidates or without.
    """
    start_R, window_R, candidates_R = (
        np.array(part, dtype=np.int64) for part in (sizes.starts, sizes.windows, sizes.candidates)
    )
    if not start_R.size:
        return 0
    kept_R = np.zeros_like(window_R)
    for newest, k in branches:
        seen_R = np.minimum(window_R, newest) if newest else window_R
        kept_R += seen_R if k is None else np.minimum(seen_R, candidates_R * k)
    end_R = start_R + window_R
    # Where a request begins after all before it have ended, it shares no behavior with them.
    first = np.flatnonzero(np.r_[True, start_R[1:] >= np.maximum.accumulate(end_R)[:-1]])
    covered = np.maximum.reduceat(end_R, first) - np.minimum.reduceat(start_R, first)
    return int(np.minimum(np.add.reduceat(np.minimum(kept_R, window_R), first), covered).sum())
