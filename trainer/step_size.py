"""What one step asks of the tables: behaviors and candidates of a step, and the bags each table is asked for.

The planner weighs sharding types by it and `plan` prints the bytes that follow from it. It is an estimate:
the true numbers differ from step to step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

from embeddings.errors import DataError
from embeddings.groups import TableGroup
from embeddings.plan.traffic import Lookup
from trainer.config.model import CONTEXT_ROLES
from trainer.config.sections import DataConfig
from trainer.data.blocks import LazyRows, WindowedRows, cut_blocks
from trainer.data.files import RowGroup
from trainer.data.row_group import read_footer
from trainer.data.rows import read_plan
from trainer.data.similarity.encoding import features_of_tables
from trainer.data.stream.source import SPLIT
from trainer.log.schema import LogManifest
from trainer.model.settings import BranchConfig, ModelConfig
from trainer.run_config import Config

# Lengths of so many row groups are read: seconds at most, whatever the log's size.
_SAMPLED = 16


@dataclass(frozen=True)
class StepSize:
    """N, C and R of one step, over all ranks; `source` says where N comes from.

    `blocks`: behaviors and candidates of each of the blocks that were looked at; `window`: of all the row
    groups among which blocks are shuffled, on average.
    """

    behaviors: int
    candidates: int
    requests: int
    blocks: tuple[tuple[int, int], ...]
    source: str
    window: int = 0


def step_size(config: DataConfig, manifest: LogManifest, behaviors: int | None = None) -> StepSize:
    """Estimate a step from the lengths in the first row groups of the train split.

    A hard search or clusters deliver fewer behaviors than these blocks hold.

    Args:
        behaviors: N as the user knows it, instead of the estimate.

    Raises:
        DataError: the log's train split is missing, unreadable or without candidates.
    """
    totals, blocks, costs = [0, 0, 0], [], []
    # That of a window has no other split.
    split = "train" if "train" in manifest.splits else SPLIT
    files = manifest.splits[split].files if split in manifest.splits else []
    # An iterator, so that no more files are opened than are needed.
    places = (
        RowGroup(config.log / entry.path, group)
        for entry in files
        for group in range(read_footer(config.log / entry.path).num_row_groups)
    )
    for place in islice(places, _SAMPLED):
        plan = read_plan(place.file, place.row_group)
        costs.append(plan.cost)
        for block in cut_blocks(plan, (), LazyRows(place, _undecoded), config):
            totals[0] += block.behaviors
            totals[1] += block.candidates
            totals[2] += block.last - block.first
            blocks.append((block.behaviors, block.candidates))
    if not totals[1]:
        raise DataError("no request of split 'train' has a candidate", file=config.log)
    c = config.batch_candidates
    n, source = round(totals[0] / totals[1] * c), "estimated from the log"
    if config.batch_behaviors and n > config.batch_behaviors:
        # Behaviors close the step first.
        c, n = round(c * config.batch_behaviors / n), config.batch_behaviors
    if behaviors is not None:
        n, source = behaviors, "as given"
    together = (
        config.shuffle_row_groups if len(costs) == _SAMPLED else min(len(costs), config.shuffle_row_groups)
    )
    window = round(sum(costs) / len(costs) * together)
    return StepSize(n, c, max(1, round(totals[2] / totals[1] * c)), tuple(blocks), source, window)


def kept_behaviors(config: ModelConfig, size: StepSize, device: str = "cpu") -> int:
    """S: behaviors that are looked up because some branch keeps them, or on another device than the CPU, may.

    Candidates of a block keep many in common. As if each chose by itself, anywhere in its block: of N_b
    behaviors each is missed by all C_b candidates with probability (1 - K / N_b) ** C_b. Candidates that are
    alike, or all drawn to the newest behaviors, keep fewer. Where S must be known before that, it is K for
    each candidate of each branch, or the whole block (`trainer.model.union`).
    """
    behaviors, candidates = (sum(part) for part in zip(*size.blocks, strict=True))
    # Blocks are taken to be as much longer as the step was said to be.
    longer = size.behaviors * candidates / max(size.candidates * behaviors, 1)
    kept = 0.0
    branches = config.all_branches().values()
    for n, c in size.blocks:
        long = max(n * longer, 1.0)
        if device == "cpu":
            share = 1 - math.prod(_missed(branch, long, c, size) for branch in branches)
        else:
            share = min(1.0, sum(_most(branch, long, c, size) for branch in branches))
        kept += n * share
    return int(size.behaviors * kept / max(behaviors, 1) + 0.5)


def lookups(
    config: Config,
    groups: Mapping[str, TableGroup],
    manifest: LogManifest,
    size: StepSize,
    lookup: str,
    device: str = "cpu",
) -> dict[str, Lookup]:
    """Bags and ids of every table in one step, over all ranks.

    Mirrors `TwoStageModel`: attention groups are looked up for all N + C; representation groups for those as
    well (`full`) or for the S kept behaviors and the candidates (`selected`), all sets and lanes of a group
    alike; a prior for candidates alone, unless it serves another role too; groups of the context for R
    requests. Multi-valued features of the log count as one id a bag; a part of an encoded number, as the
    most ids that it can have, which is what all numbers have but for their sign.

    Args:
        lookup: `full` or `selected`, whatever `config.model.lookup` says; device: see `kept_behaviors`.
    """
    early: set[str] = set()
    represent: set[str] = set()
    for branch in config.model.all_branches().values():
        roles = branch.roles
        early |= {roles.attention_target, roles.attention_behavior} if branch.attend != () else set()
        early |= {roles.cross} if roles.cross else set()
        represent |= {roles.representation_target, roles.representation_behavior}
    # Groups that are looked up before the search, and those after it.
    early, late = (early | represent, set()) if lookup == "full" else (early, represent - early)
    kept = kept_behaviors(config.model, size, device)
    of_requests = [getattr(config.model.roles, role) for role in CONTEXT_ROLES]
    of_table, infos, contexts = {}, features_of_tables(config.data, manifest), manifest.table_context
    for name, group in groups.items():
        for table in group.all_tables:
            feature = table.feature
            if feature in contexts and name in of_requests:
                ids = size.requests * contexts[feature].most_ids
                of_table[group.table_name(table)] = Lookup(size.requests, ids)
                continue
            behaviors = size.behaviors if name in early else kept if name in late else 0
            info = infos[feature]
            bags = behaviors * info.of_behaviors + size.candidates * info.of_candidates
            of_table[group.table_name(table)] = Lookup(behaviors + size.candidates, bags * info.most_ids)
    return of_table


def _missed(branch: BranchConfig, behaviors: float, candidates: int, size: StepSize) -> float:
    """The share of a block's behaviors that a branch is not expected to keep."""
    if not branch.searches:
        return 0.0
    requests = size.requests / max(size.behaviors, 1)
    return branch.search_kind.missed_share(branch, behaviors, candidates, requests)


def _most(branch: BranchConfig, behaviors: float, candidates: int, size: StepSize) -> float:
    """The share of a block's behaviors that a branch keeps at most."""
    if not branch.searches or branch.search_kind.keeps_all:
        return 1 - _missed(branch, behaviors, candidates, size)
    return min(1.0, candidates * branch.k / behaviors)


def _undecoded() -> WindowedRows:
    raise AssertionError("cutting needs lengths only")
