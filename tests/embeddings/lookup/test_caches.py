"""Caches that are filled ahead: who gets one, and what is left of it where its batch is not trained."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
    CacheAlgorithm,
    EmbeddingLocation,
)
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn
from torchrec.distributed.embedding_sharding import _prefetch_and_cached
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import (
    CacheParams,
    EmbeddingModuleShardingPlan,
    ParameterSharding,
    ShardingPlan,
)
from torchrec.distributed.utils import add_params_from_parameter_sharding

from benchmarks.gpu.check import Check
from benchmarks.gpu.training import small_job
from embeddings.errors import ConfigError
from embeddings.lookup.caches import _kernels, fills_caches, forget_prefetched, with_prefetch
from embeddings.plan.file import SavedPlan, from_tree, to_tree
from tests.helpers.launching import launched
from tests.helpers.logs import Shape, random_rows, write_log
from trainer.assemble import fit_caches
from trainer.loop.pipeline import Pipeline, kind_for, remark_on
from trainer.ranks.process_group import process_group

CUDA = torch.device("cuda")
FIRST, LATE = "collections.attention", "collections.representation"


def entry(kernel: str, cache: CacheParams | None = None) -> ParameterSharding:
    return ParameterSharding("table_wise", kernel, [0], cache_params=cache)


def plan(cache: CacheParams | None = None) -> ShardingPlan:
    """Two cached tables, one of them looked up after the search, and a table without a cache."""
    first = {"a__item_id": entry("fused_uvm_caching", cache), "a__category_id": entry("fused")}
    late = {"r__item_id": entry("fused_uvm_caching", CacheParams(load_factor=0.3))}
    return ShardingPlan({FIRST: EmbeddingModuleShardingPlan(first), LATE: EmbeddingModuleShardingPlan(late)})


def ahead(found: ShardingPlan) -> dict[str, bool]:
    """What TorchRec makes of the entries: whether FBGEMM is to know that a table's cache is filled ahead."""
    asked = {}
    for tables in found.plan.values():
        for name, part in tables.items():
            fused = add_params_from_parameter_sharding({}, part)
            kernel = EmbeddingComputeKernel(part.compute_kernel)
            table: Any = SimpleNamespace(compute_kernel=kernel, fused_params=fused)
            asked[name] = bool(_prefetch_and_cached(table))
    return asked


def test_caches_of_what_is_known_ahead_are_filled_ahead() -> None:
    found, changed = with_prefetch(plan(), [FIRST])
    assert ahead(found) == {"a__item_id": True, "a__category_id": False, "r__item_id": False}
    assert changed == ["a__item_id"] and fills_caches(found) and not fills_caches(plan())
    # What else is known of a cache stays.
    assert found.plan[LATE]["r__item_id"].cache_params == CacheParams(load_factor=0.3)
    again, changed = with_prefetch(found, [FIRST])
    assert again.plan == found.plan and not changed


def test_a_plan_keeps_the_flag_in_its_file_and_loses_it_in_a_run_without() -> None:
    made, _ = with_prefetch(plan(CacheParams(CacheAlgorithm.LRU, 0.2)), [FIRST])
    saved = SavedPlan(made, "cuda", 1, 1, {})
    read = from_tree(to_tree(saved), "here")
    assert read.plan.plan == made.plan and fills_caches(read.plan)
    model: Any = SimpleNamespace(collections=["attention", "representation"], late=["representation"])
    assert fit_caches(read, True, model) == (read, "")
    without, line = fit_caches(read, False, model)
    assert line == "train.pipeline: caches are no longer filled ahead of their batch: a__item_id"
    assert not fills_caches(without.plan)
    assert without.plan.plan[FIRST]["a__item_id"].cache_params.load_factor == 0.2
    with_them, line = fit_caches(without, True, model)
    assert line == "train.pipeline: caches are filled ahead of their batch: a__item_id"
    assert with_them.plan.plan == made.plan


def test_only_lru_caches_can_be_filled_ahead() -> None:
    with pytest.raises(ConfigError, match=r"table a__item_id: .* LFU, but only LRU"):
        with_prefetch(plan(CacheParams(CacheAlgorithm.LFU)), [FIRST])


def test_without_a_cache_to_fill_the_other_pipeline_is_used_and_that_is_said() -> None:
    assert kind_for("prefetch", CUDA, caches=False) == "sparse_dist"
    assert kind_for("prefetch", CUDA, caches=True) == "prefetch"
    used: Any = SimpleNamespace(kind="sparse_dist")
    assert '"prefetch" has no cache to fill, so that "sparse_dist" is used' in remark_on("prefetch", used)
    assert remark_on("auto", used) == "" == remark_on("prefetch", SimpleNamespace(kind="prefetch"))  # type: ignore[arg-type]


def kernel() -> SplitTableBatchedEmbeddingBagsCodegen:
    """With what a batch has left there that was not trained."""
    made = SplitTableBatchedEmbeddingBagsCodegen(
        [(10, 4, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_SGD,
        prefetch_pipeline=True,
    )
    made.timesteps_prefetched.append(1)
    made.lxu_cache_locations_list.append(torch.ones(3, dtype=torch.int32))
    made.lxu_cache_locking_counter = torch.ones(2, 32, dtype=torch.int32)
    made.prefetch_stream = object()
    return made


def test_rows_of_batches_that_are_not_trained_are_forgotten() -> None:
    """By the names that FBGEMM gives what it keeps: places of rows, and locks on them."""
    cached = kernel()
    forget_prefetched(nn.ModuleList([cached, nn.Linear(1, 1)]))
    assert cached.timesteps_prefetched == cached.lxu_cache_locations_list == []
    assert int(cached.lxu_cache_locking_counter.sum()) == 0
    # Else backward passes would wait for a stream that no longer fills the cache.
    assert cached.prefetch_stream is None
    out = cached(torch.tensor([1, 2, 3]), torch.tensor([0, 3]))
    out.sum().backward()
    assert cached.timesteps_prefetched == cached.lxu_cache_locations_list == []


def test_they_are_forgotten_by_the_tables_of_a_sharded_model(tmp_path: Path) -> None:
    """Whose kernels are no submodules of it."""
    check = Check(True, tmp_path / "out", tmp_path)
    with process_group(60, "cpu") as ranks:
        made = small_job(check, ranks, tmp_path)
        of_tables = list(_kernels(made.sharded.model))
        lookups = [
            lookup for part in made.sharded.model.modules() for lookup in getattr(part, "_lookups", ())
        ]
        assert len(lookups) == len(made.sharded.groups) and len(set(map(id, of_tables))) == len(of_tables)
        assert len(of_tables) >= len(lookups)
        for kernel in of_tables:
            kernel.timesteps_prefetched.append(1)
            kernel.lxu_cache_locations_list.append(torch.ones(3, dtype=torch.int32))
        forget_prefetched(made.sharded.model)
        for kernel in of_tables:
            assert kernel.timesteps_prefetched == kernel.lxu_cache_locations_list == []
        # What a batch had left would be taken for the next one's.
        assert len(made.train(islice(made.reader("train", 3).steps(), 2))) == 2


def test_no_model_is_measured_while_caches_wait_for_a_batch() -> None:
    pipeline = Pipeline.__new__(Pipeline)
    pipeline._step, pipeline.kind = SimpleNamespace(settle=lambda: None), "prefetch"  # type: ignore[assignment]
    pipeline._inner = SimpleNamespace(batches=[None])
    with pytest.raises(RuntimeError, match="when to pause"), pipeline.paused():
        pass
    told: list[str] = []
    pipeline._model = nn.ModuleList([cached := kernel()])  # type: ignore[assignment]
    pipeline._inner = SimpleNamespace(
        batches=[],
        detach=lambda: told.append("detach"),
        attach=lambda sparse_dist: told.append("attach"),
    )
    assert cached.lock_cache_line
    with pipeline.paused():
        # No backward pass comes that would unlock what an evaluation locks.
        assert not cached.lock_cache_line
        told.append("measured")
    assert cached.lock_cache_line
    assert told == ["detach", "measured", "attach"] and cached.lxu_cache_locations_list == []


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("caches")
    log = write_log(
        folder / "log",
        {"train": random_rows(8, Shape(users=12)), "validation": random_rows(8, Shape(users=5))},
    )
    done = launched("tests.programs.cache_cases", str(log), str(folder / "found.json"))
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    result: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return result


def test_steps_and_scores_are_the_same_ahead(found: dict[str, Any]) -> None:
    """Also after a pipeline was stopped with batches under way; on CUDA with caches, else without."""
    plain, ahead = found["plain"], found["ahead"]
    assert len(plain["scores"]) > 2 and len(plain["losses"]) > 6
    for what in ("losses", "scores"):
        assert np.allclose(np.hstack(ahead[what]), np.hstack(plain[what]), rtol=1e-3), what


@pytest.mark.gpu
def test_caches_are_filled_ahead_on_a_gpu(found: dict[str, Any]) -> None:
    assert found["ahead"]["kind"] == "prefetch"
    assert found["ahead"]["kernels"]["attention__item_id"] == "fused_uvm_caching"
    assert np.allclose(found["cached"]["losses"], found["plain"]["losses"], rtol=1e-3)
