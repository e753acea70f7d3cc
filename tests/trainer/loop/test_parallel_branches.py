"""What stands in the way of branches side by side on TorchRec's 2D parallelism; docs/schedules.md says it.

A release that changes one of these facts fails here, and the question is open again.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torchrec.distributed import model_parallel
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DMPCollection
from torchrec.distributed.types import ShardingEnv2D, ShardingPlan

from trainer.ranks.process_group import process_group


def test_replicated_groups_of_ranks_need_a_gpu_share_dense_gradients_and_save_other_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with process_group(device="cpu"):
        world, cpu = dist.group.WORLD, torch.device("cpu")
        assert world is not None
        with pytest.raises(AssertionError, match="only supports CUDA"):
            DMPCollection(
                nn.Linear(1, 1), cpu, ShardingPlan({}), world_size=1, sharding_group_size=1, global_pg=world
            )
        mine = dist.new_group([0])
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
        env = ShardingEnv2D(mine, mine, world, mesh)
        # The wrapper averages dense gradients over all branches, so that these would be one.
        wrapped: list[Any] = []

        class Wrapped(nn.Module):
            _set_params_and_buffers_to_ignore_for_model = staticmethod(lambda **_: None)

            def __init__(self, **given: Any) -> None:
                super().__init__()
                wrapped.append(given["process_group"])

        monkeypatch.setattr(model_parallel, "DistributedDataParallel", Wrapped)
        model = nn.Module()
        model._dmp_wrapped_module = nn.Linear(1, 1)
        DefaultDataParallelWrapper()._ddp_wrap(model, env, cpu, set())  # type: ignore[arg-type]
        assert wrapped == [world] and env.sharding_pg is mine
        # Checkpoints here are made of sharded tensors.
        assert env.output_dtensor
        # What would carry a merge by shares: all tensors of a table, each as a whole.
        assert callable(DMPCollection.set_all_reduce_hook)
