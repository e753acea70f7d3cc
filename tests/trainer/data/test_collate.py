"""Cutting and collating against slow references that go one request at a time."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.helpers.logs import CONTEXT, RICH, Row, enrich, random_rows, write_log
from trainer.config.sections import DataConfig
from trainer.data.batch import RequestBatch, Sizes
from trainer.data.blocks import Block, WindowedRows, cut_blocks, with_windows
from trainer.data.collate import collate
from trainer.data.rows import Columns, PlanRows, read_plan, read_rows
from trainer.log.schema import read_manifest

Cut = tuple[int, int, int, int]  # first request, last, behaviors, candidates


def never() -> WindowedRows:
    raise AssertionError("planning decodes nothing")


def cut_reference(plan: PlanRows, limits: DataConfig) -> list[Cut]:
    """Requests join their user's open block for as long as it stays within its limits."""
    found: list[Cut] = []
    for start, stop in pairwise(plan.request_offsets.tolist()):
        members: list[list[int]] = []
        for request in range(start, stop):
            together = [*members[-1], request] if members else [request]
            behaviors, _ = size(plan, together, limits.history_length)
            fits = len(together) <= limits.requests_per_block and behaviors <= limits.block_limit
            if members and fits:
                members[-1] = together
            else:
                members.append([request])
        for block in members:
            behaviors, candidates = size(plan, block, limits.history_length)
            if candidates:
                found.append((block[0], block[-1] + 1, behaviors, candidates))
    return found


def size(plan: PlanRows, requests: list[int], history_length: int) -> tuple[int, int]:
    ends = [int(plan.history_end[r]) for r in requests]
    starts = [max(0, end - history_length) for end in ends]
    return max(ends) - min(starts), sum(int(plan.candidates[r]) for r in requests)


@settings(max_examples=300, deadline=None)
@given(
    users=st.lists(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 3)), max_size=9), max_size=6),
    ascending=st.booleans(),
    limits=st.builds(
        DataConfig,
        history_length=st.integers(1, 30),
        requests_per_block=st.integers(1, 10),
        behaviors_per_block=st.integers(0, 70),
    ),
)
def test_blocks_are_cut_as_one_request_after_the_other_says(
    users: list[list[tuple[int, int]]], ascending: bool, limits: DataConfig
) -> None:
    users = [sorted(user) for user in users] if ascending else users
    requests = np.array([request for user in users for request in user], dtype=np.int64).reshape(-1, 2)
    offsets = np.cumsum([0, *(len(user) for user in users)])
    plan = PlanRows(offsets, requests[:, 0], requests[:, 1])
    blocks = cut_blocks(plan, (3,), never, limits)
    assert [(b.first, b.last, b.behaviors, b.candidates) for b in blocks] == cut_reference(plan, limits)
    assert {b.owners for b in blocks} <= {(3,)}


def collate_reference(
    blocks: list[tuple[Row, range]], config: DataConfig, step_candidates: int
) -> RequestBatch:
    """The batch put together value by value from the rows as they were written: (row, requests) a block."""
    behaviors: list[tuple[Row, int]] = []
    requests: list[tuple[Row, int]] = []
    windows: list[tuple[int, int]] = []
    for row, members in blocks:
        ends = []
        for r in members:
            limit = row["request_timestamp"][r] - config.ingestion_delay
            ends.append(sum(time < limit for time in row["history_timestamp"]))
        starts = [max(0, end - config.history_length) for end in ends]
        shift = len(behaviors) - min(starts)
        windows += [(start + shift, end + shift) for start, end in zip(starts, ends, strict=True)]
        behaviors += [(row, i) for i in range(min(starts), max(ends))]
        requests += [(row, r) for r in members]
    candidates = [(row, r, c) for row, r in requests for c in range(row["request_num_candidates"][r])]
    bags: dict[str, list[list[int]]] = {}
    for name, info in RICH.items():
        past = [row[f"history_{name}"][i] if info.of_behaviors else [] for row, i in behaviors]
        shown = [row[f"candidate_{name}"][r][c] if info.of_candidates else [] for row, r, c in candidates]
        bags[name] = [x if isinstance(x, list) else [x] for x in past + shown]
    context = {name: [row[f"context_{name}"][r] for row, r in requests] for name in CONTEXT}
    counts = [row["request_num_candidates"][r] for row, r in requests]
    tasks = ("click", "buy")
    return RequestBatch(
        features=jagged(bags),
        behavior_time=torch.tensor([row["history_timestamp"][i] for row, i in behaviors], dtype=torch.int64),
        request_time=torch.tensor([row["request_timestamp"][r] for row, r in requests]),
        window_start=torch.tensor([start for start, _ in windows]),
        window_end=torch.tensor([end for _, end in windows]),
        seen=torch.tensor([end - start for start, end in windows]),
        user_id=torch.tensor([row["user_id"] for row, _ in requests]),
        request_id=torch.tensor([row["request_id"][r] for row, r in requests]),
        candidate_request=torch.tensor([r for r, count in enumerate(counts) for _ in range(count)]),
        labels=torch.tensor([[row[f"label_{task}"][r][c] for task in tasks] for row, r, c in candidates]),
        weight=torch.tensor([row["weight"][r][c] for row, r, c in candidates]),
        numeric=torch.tensor([[row["numeric_price"][r][c]] for row, r, c in candidates]),
        context=jagged({k: [x if isinstance(x, list) else [x] for x in v] for k, v in context.items()}),
        retrieval=None,
        step_candidates=step_candidates,
    )


def jagged(bags: dict[str, list[list[int]]]) -> KeyedJaggedTensor:
    flat = [bag for key in bags for bag in bags[key]]
    return KeyedJaggedTensor(
        keys=list(bags),
        values=torch.tensor([x for bag in flat for x in bag], dtype=torch.int64),
        lengths=torch.tensor([len(bag) for bag in flat], dtype=torch.int32),
        stride=len(next(iter(bags.values()))),
    )


def tensors(batch: RequestBatch) -> dict[str, Tensor]:
    found = {name: part for name, part in vars(batch).items() if isinstance(part, Tensor)}
    for name, kjt in (("features", batch.features), ("context", batch.context)):
        assert kjt is not None
        found |= {f"{name} ids": kjt.values(), f"{name} lengths": kjt.lengths()}
    return found


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    history_length=st.integers(1, 50),
    per_block=st.integers(1, 7),
    limit=st.integers(1, 60),
    delay=st.sampled_from([0, 1, 10, 1000]),
    taken=st.integers(1, 30),
)
def test_a_batch_is_what_putting_it_together_value_by_value_gives(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    history_length: int,
    per_block: int,
    limit: int,
    delay: int,
    taken: int,
) -> None:
    rows = enrich(random_rows(seed), seed)
    log = write_log(tmp_path_factory.mktemp("log") / "log", {"train": rows}, layout=(3, 12), rich=True)
    file = next((log / "train").iterdir())
    cut = {"requests_per_block": per_block, "behaviors_per_block": limit}
    config = DataConfig(log=log, history_length=history_length, ingestion_delay=delay, **cut)
    columns = Columns.of(read_manifest(log))
    blocks: list[tuple[Block, Row, range]] = []
    for group in range(4):
        decoded = with_windows(read_rows(file, group, columns), history_length, delay)
        plan = read_plan(file, group)
        for block in cut_blocks(plan, (), partial(lambda rows: rows, decoded), config):
            user = int(np.searchsorted(plan.request_offsets, block.first, side="right")) - 1
            first = int(plan.request_offsets[user])
            blocks.append((block, rows[3 * group + user], range(block.first - first, block.last - first)))
    order = np.random.default_rng(seed).permutation(len(blocks))[:taken]
    chosen = [blocks[i] for i in order]
    batch = collate([block for block, _, _ in chosen], config, columns, 99)
    wanted = collate_reference([(row, members) for _, row, members in chosen], config, 99)
    assert batch.step_candidates == 99 and batch.retrieval is None
    assert batch.features.keys() == list(RICH) and batch.features.stride() == wanted.features.stride()
    mine, reference = tensors(batch), tensors(wanted)
    assert mine.keys() == reference.keys()
    for name, expected in reference.items():
        assert mine[name].dtype == expected.dtype, name
        assert torch.equal(mine[name], expected), name
    assert batch.sizes == Sizes.of(wanted)
    for kjt, other in ((batch.features, wanted.features), (batch.context, wanted.context)):
        assert kjt is not None and other is not None
        assert kjt.length_per_key_or_none() == other.length_per_key()
