"""Which rank takes which blocks of a step, and whether ranks may decode row groups apart."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from trainer.config.sections import DataConfig
from trainer.data.blocks import ANYONE, Block

# `data.sharding = "auto"` decodes a window of row groups apart where no rank has so many times its share of
# it, and where chance leaves no rank with so much of a step: of W ranks that draw n blocks each on average,
# the fullest has about sqrt(2 ln W / n) more, at most.
_UNEVEN = 1.25


def deal(costs: Sequence[int], world_size: int, owners: Sequence[int] = ()) -> list[int]:
    """Which rank takes what: the costliest goes to the least loaded rank. Deterministic.

    Args:
        owners: the rank that must take each, or ANYONE; none given: anyone may take all.
    """
    if world_size == 1:
        return [0] * len(costs)
    owner = list(owners) or [ANYONE] * len(costs)
    loads = [0] * world_size
    for cost, rank in zip(costs, owner, strict=True):
        if rank != ANYONE:
            loads[rank] += cost
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    free = [index for index, rank in enumerate(owner) if rank == ANYONE]
    for index in sorted(free, key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(heap)
        owner[index] = rank
        heapq.heappush(heap, (load + costs[index], rank))
    return owner


def spread(blocks: Sequence[Block], config: DataConfig, world_size: int) -> bool:
    """Whether the blocks of a window, each with its owner, keep all ranks about equally busy in each step."""
    if not blocks:
        return True
    loads = [0] * world_size
    for block in blocks:
        loads[block.owner] += block.cost
    steps = sum(block.candidates for block in blocks) / config.batch_candidates
    if config.batch_behaviors:
        steps = max(steps, sum(block.behaviors for block in blocks) / config.batch_behaviors)
    # Fewer blocks than one step takes are all of it.
    each = len(blocks) / max(steps, 1) / world_size
    chance = math.sqrt(2 * math.log(world_size) / each)
    return max(loads) * world_size <= _UNEVEN * sum(loads) and 1 + chance <= _UNEVEN
