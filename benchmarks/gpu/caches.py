"""Tables behind the device's memory: in host memory, with a cache of it, and with that cache filled ahead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheAlgorithm
from torchrec.distributed.types import CacheParams, ShardingPlan

import embeddings.lookup.sharding
import trainer.assemble
from benchmarks.gpu.check import Answer, Check, Row, answer, each_way, skipped
from benchmarks.gpu.loops import Change, Way, loops_of, shares, with_model
from benchmarks.inputs.cells import Cell
from trainer.ranks.process_group import process_group
from trainer.run_config import Config

Kernel = Literal["fused", "fused_uvm", "fused_uvm_caching"]
CELL = Cell(items=8_000_000, length=200, dim=64, users=288)
TINY = Cell(items=2_000, length=30, users=3)
_SHARE, _LARGEST = 0.2, 1e-4


@dataclass(frozen=True)
class Place:
    """Where the rows of items lie.

    Attributes:
        kernel: TorchRec's; pipeline: `train.pipeline`.
        own: cache parameters that the check sets itself; None: as the product sets them.
    """

    kernel: Kernel
    pipeline: str = "sparse_dist"
    own: CacheParams | None = None


def _cache(prefetch: bool) -> CacheParams:
    return CacheParams(CacheAlgorithm.LRU, load_factor=_SHARE, prefetch_pipeline=prefetch)


PLACES: Mapping[str, Place] = {
    "device memory": Place("fused"),
    "host memory": Place("fused_uvm"),
    "host memory, cache of 0.2": Place("fused_uvm_caching", own=_cache(False)),
    "the same, filled ahead": Place("fused_uvm_caching", "prefetch", _cache(True)),
    "cache as the product sets it": Place("fused_uvm_caching"),
    "the same, train.pipeline = prefetch": Place("fused_uvm_caching", "prefetch"),
}


def caches(check: Check) -> Answer:
    """What a step costs where items' rows lie in host memory, with a cache on the device, and with that
    cache filled while the step before is computed; and whether each trains to the same losses.

    Expected: losses within 1e-4 of those in device memory (`different` names places that are not); a cache
    far above host memory alone, and filling it ahead near device memory.
    """
    wanted: list[float] = []
    places = {name: place for name, place in PLACES.items() if there(check, place)}
    with process_group(60) as ranks:
        rows = each_way(
            places,
            lambda place: _measure(check, place, ranks, wanted),
            lambda rows: check.keep(_judge(rows)),
        )
    if not check.on_cuda and not check.dry:
        return skipped("TorchRec has these kernels on CUDA only")
    return _judge(rows)


def there(check: Check, place: Place) -> bool:
    """Whether TorchRec has the place's kernel on this device: a CPU has one of them."""
    return check.on_cuda or place.kernel == "fused"


def _measure(check: Check, place: Place, ranks: Any, wanted: list[float]) -> Row:
    cell = CELL if check.on_cuda else TINY
    with (
        place_tables(place),
        loops_of(
            cell, ranks, count=check.size(4, 2), rounds=check.size(3, 1), change=change_of(place)
        ) as loops,
    ):
        way = Way(place.pipeline)
        # First, for what is trained before decides what comes after.
        losses = loops.losses(way)
        if not wanted:
            wanted += losses
        apart = max(abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True))
        kernels = sorted({found.kernel for found in loops.job.sharded.placements})
        return {"kernels": ", ".join(kernels), **loops.train_steps(way), "losses apart": apart}


def change_of(place: Place) -> Change:
    """The config with the items' tables there."""

    def change(config: Config) -> Config:
        # So that both tables of items are asked for every behavior.
        config = with_model(config, lookup="full")
        if place.kernel == "fused":
            return config
        names = [f"{group}__item_id" for group in config.groups]
        tables = {name: {"kernels": (place.kernel,)} for name in names}
        plan = type(config.plan).model_validate({"allow_unified_memory": True, "tables": tables})
        train = config.train.model_copy(update={"pipeline": place.pipeline})
        return config.model_copy(update={"plan": plan, "train": train})

    return change


@contextmanager
def place_tables(place: Place) -> Iterator[None]:
    """Within it models are sharded with the place's own cache parameters, if any, and host memory is mapped.

    Mapped, because managed memory is not to be had on every machine (in some containers it is not).
    """
    shard, sharders = trainer.assemble.shard, embeddings.lookup.sharding.sharders

    def sharded(model: Any, groups: Any, plan: ShardingPlan, *given: Any, **more: Any) -> Any:
        for tables in plan.plan.values():
            for table in tables.values():
                if place.own is not None and table.compute_kernel == "fused_uvm_caching":
                    table.cache_params = place.own
        return shard(model, groups, plan, *given, **more)

    def mapped(*given: Any, **more: Any) -> Any:
        made = sharders(*given, **more)
        for sharder in made:
            sharder._fused_params = {**(sharder.fused_params or {}), "uvm_host_mapped": True}
        return made

    with (
        mock.patch.object(trainer.assemble, "shard", sharded),
        mock.patch.object(embeddings.lookup.sharding, "sharders", mapped),
    ):
        yield


def _judge(rows: list[Row]) -> Answer:
    different = [row["way"] for row in rows if "error" in row or row["losses apart"] > _LARGEST]
    return answer(shares(rows), different)
