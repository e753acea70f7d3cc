"""A checkpoint of 64 ranks, written and loaded without their processes: 24 ranks get every row bit for bit.

Each rank's part is planned and written by DCP's own objects, as `trainer.checkpoint.save_load` does, one rank
after the other: a process group of torch's tests stands for the others, which nobody is asked to join.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties
from torch.testing._internal.distributed.fake_pg import FakeStore

from embeddings.private import ShardMetadata
from trainer.checkpoint import files, save_load
from trainer.checkpoint.row_blocks import BlockPlanner
from trainer.checkpoint.writer import HashedWriter

# Of 64 ranks some have no row of the second table, and of 24 the last one fewer than the others.
ROWS = {"large": 1000, "small": 100}
WIDTH = 8


@contextmanager
def rank_of(rank: int, world: int) -> Iterator[None]:
    """A process group of which only this rank is there."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def table(name: str) -> Tensor:
    return torch.randn(ROWS[name], WIDTH, generator=torch.Generator().manual_seed(len(name)))


def state_of(rank: int, world: int, filled: bool) -> dict[str, Any]:
    """A rank's part of the tables, row-wise as TorchRec cuts them, with their state; and dense weights."""
    state: dict[str, Any] = {"dense": torch.arange(5.0) if filled else torch.zeros(5)}
    for name, rows in ROWS.items():
        for kind, whole in (("weight", table(name)), ("momentum", table(name).square().sum(1))):
            height = -(-rows // world)
            cuts = [(min(each * height, rows), min((each + 1) * height, rows)) for each in range(world)]
            rest = list(whole.shape[1:])
            shards = [
                ShardMetadata([low, *[0] * len(rest)], [high - low, *rest], f"rank:{each}/cpu")
                for each, (low, high) in enumerate(cuts)
            ]
            low, high = cuts[rank]
            mine = whole[low:high].clone() if filled else torch.full_like(whole[low:high], -1.0)
            metadata = ShardedTensorMetadata(shards, whole.size(), TensorProperties(dtype=whole.dtype))
            kind_of_tensor: Any = ShardedTensor
            state[f"{name}.{kind}"] = kind_of_tensor._init_from_local_shards_and_global_metadata(
                [Shard(mine, shards[rank])], metadata
            )
    return state


def written(folder: Path, world: int) -> Path:
    """A checkpoint of so many ranks."""
    part, final = folder / "step-00000001.tmp-1", folder / "step-00000001"
    files.prepare(folder, part)
    writer, planners, plans = HashedWriter(part), [], []
    for rank in range(world):
        with rank_of(rank, world):
            planner = BlockPlanner(block_bytes=4 * WIDTH * 6)
            planner.set_up_planner(state_of(rank, world, filled=True), None, is_coordinator=rank == 0)
            plans.append(planner.create_local_plan())
            planners.append(planner)
    writer.set_up_storage_writer(is_coordinator=True)
    plans, metadata = planners[0].create_global_plan([writer.prepare_local_plan(plan) for plan in plans])
    results, entries = [], []
    for planner, plan in zip(planners, writer.prepare_global_plan(plans), strict=True):
        of_rank = HashedWriter(part)
        of_rank.set_up_storage_writer(is_coordinator=False)
        results.append(of_rank.write_data(planner.finish_plan(plan), planner).wait())
        entries.append(of_rank.files.entries)
    writer.finish(metadata, results)
    save_load._finish(part, final, [*entries, writer.files.entries], {"step": 1}, "")
    return final


@pytest.mark.parametrize("after", [24, 1])
def test_64_ranks_become_fewer(tmp_path: Path, after: int) -> None:
    checkpoint = written(tmp_path, 64)
    files.verify(checkpoint)
    assert len(list(checkpoint.glob("*.distcp"))) == 64
    found: dict[str, list[tuple[int, Tensor]]] = {}
    for rank in range(after):
        with rank_of(rank, after):
            state = state_of(rank, after, filled=False)
            save_load.load_tensors(checkpoint, state, distributed=False)
            assert torch.equal(state["dense"], torch.arange(5.0))
            for name, tensor in state.items():
                for shard in tensor.local_shards() if name != "dense" else ():
                    found.setdefault(name, []).append((shard.metadata.shard_offsets[0], shard.tensor))
    for name, rows in ROWS.items():
        parts = [part for _, part in sorted(found[f"{name}.weight"], key=lambda part: part[0])]
        state_parts = [part for _, part in sorted(found[f"{name}.momentum"], key=lambda part: part[0])]
        assert torch.equal(torch.cat(parts), table(name)) and len(torch.cat(parts)) == rows
        assert torch.equal(torch.cat(state_parts), table(name).square().sum(1))
