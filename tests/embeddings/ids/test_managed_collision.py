"""Why `embeddings.ids` exists: what TorchRec 1.8's managed-collision modules do on a CPU.

A release that changes one of these is a reason to look at them again.
"""

from __future__ import annotations

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torchrec.distributed.mc_modules import create_mc_sharding
from torchrec.distributed.types import ShardingType
from torchrec.modules.hash_mc_modules import HashZchManagedCollisionModule
from torchrec.modules.mc_modules import LFU_EvictionPolicy, MCHManagedCollisionModule
from torchrec.sparse.jagged_tensor import JaggedTensor

CPU = torch.device("cpu")


def bags(*ids: int) -> dict[str, JaggedTensor]:
    return {"item": JaggedTensor(torch.tensor(ids), lengths=torch.ones(len(ids), dtype=torch.int64))}


def test_sorted_zch_sends_every_id_to_one_row_until_it_first_evicts() -> None:
    module = MCHManagedCollisionModule(8, CPU, LFU_EvictionPolicy(), eviction_interval=3).train()
    rows = []
    for _ in range(3):
        features = module.preprocess(bags(100, 200, 300))
        module.profile(features)
        rows.append(module.remap(features)["item"].values().tolist())
    assert rows[:2] == [[7, 7, 7], [7, 7, 7]] and len(set(rows[2])) == 3


def test_rows_of_a_fused_optimizer_cannot_be_reset() -> None:
    """What a sharded module calls for each id that gets a row, the first ones included."""
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(8, 4, EmbeddingLocation.HOST, ComputeDevice.CPU)], optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD
    )
    one, none = torch.tensor([1]), torch.tensor([0])
    with pytest.raises(NotImplementedError, match=r"fbgemm::reset_weight_momentum.*'CPU' backend"):
        tables.reset_embedding_weight_momentum(one, torch.tensor([0, 1]), none, none)


def test_multi_probe_zch_finds_ids_but_does_not_train() -> None:
    module = HashZchManagedCollisionModule(8, CPU, total_num_buckets=1)
    assert module.eval()(bags(100, 200))["item"].values().max() < 8
    with pytest.raises(RuntimeError, match="Expected readonly to be true, but got false"):
        module.train()(bags(100, 200))


def test_tables_must_lie_row_wise() -> None:
    for sharding in (ShardingType.TABLE_WISE, ShardingType.COLUMN_WISE):
        with pytest.raises(ValueError, match=f"Sharding not supported {sharding.value}"):
            create_mc_sharding(sharding.value, [], None)
