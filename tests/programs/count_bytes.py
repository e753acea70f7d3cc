"""One of two ranks: counts the bytes that TorchRec hands to collectives, per collection and sharding type.

    torchrun --nproc-per-node=2 -m tests.programs.count_bytes ROWS DIM BAGS OUT.json

Writes {"bag row_wise fp32 fp32": [ids, vectors forward, gradients backward], ...}, summed over the ranks,
without what a rank keeps for itself and without the announcement of sizes. Ranks have equal parts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.harness.collectives import CollectiveCounter
from embeddings.lookup.rounding import Comms, codecs_of

# The dense kernel would return a row for every empty bag of a sequence.
FUSED = {"compute_kernel": "fused"}
# Each precision once in each direction.
COMMS = (Comms(), Comms("fp16", "bf16"), Comms("bf16", "fp16"))
PLACES = {
    "table_wise": table_wise(rank=0, **FUSED),
    "row_wise": row_wise(**FUSED),
    "column_wise": column_wise(ranks=[0, 1], **FUSED),
}


def sharded(kind: str, place: Any, rows: int, dim: int, comms: Comms) -> DistributedModelParallel:
    """A model of one table on all ranks."""
    shape = {"name": "t", "num_embeddings": rows, "embedding_dim": dim, "feature_names": ["f"]}
    codecs = codecs_of(comms)
    model, sharder = nn.Module(), EmbeddingCollectionSharder(qcomm_codecs_registry=codecs)
    model.e = EmbeddingCollection(tables=[EmbeddingConfig(**shape)])
    if kind == "bag":
        model.e = EmbeddingBagCollection(tables=[EmbeddingBagConfig(**shape)])
        sharder = EmbeddingBagCollectionSharder(qcomm_codecs_registry=codecs)
    for weight in model.e.parameters():
        apply_optimizer_in_backward(torch.optim.SGD, [weight], {"lr": 0.1})
    world = dist.get_world_size()
    plan = construct_module_sharding_plan(
        model.e, {"t": place}, local_size=world, world_size=world, device_type="cpu", sharder=sharder
    )
    device = torch.device("cpu")
    return DistributedModelParallel(model, device=device, plan=ShardingPlan({"e": plan}), sharders=[sharder])


def count(model: nn.Module, kind: str, bags: KeyedJaggedTensor) -> list[int]:
    """Bytes of one forward and backward, over all ranks."""
    with CollectiveCounter() as exchanged:
        got = model.e(bags)
        vectors = got.values() if kind == "bag" else got["f"].values()
        forward = len(exchanged.sent)
        vectors.sum().backward()
    back = exchanged.bytes_of(floats=True, since=forward)
    ids = exchanged.bytes_of(floats=False)
    total = torch.tensor([ids, exchanged.bytes_of(floats=True) - back, back])
    dist.all_reduce(total)
    numbers: list[int] = total.tolist()
    return numbers


def main() -> None:
    rows, dim, bags = map(int, sys.argv[1:4])
    dist.init_process_group("gloo")
    mine = bags // dist.get_world_size()
    # As many ids of one half of the rows as of the other, for row-wise ranks.
    ids = (torch.arange(mine) * (rows // 2) + torch.arange(mine) // 2) % rows
    kjt = KeyedJaggedTensor(keys=["f"], values=ids, lengths=torch.ones(mine, dtype=torch.int32))
    found = {
        f"{kind} {name} {comms.forward} {comms.backward}": count(
            sharded(kind, place, rows, dim, comms).module, kind, kjt
        )
        for kind in ("bag", "sequence")
        for name, place in PLACES.items()
        for comms in COMMS
    }
    if dist.get_rank() == 0:
        Path(sys.argv[4]).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
