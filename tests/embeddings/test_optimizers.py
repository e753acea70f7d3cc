"""The records of row optimizers, beside FBGEMM's kernels and what else names such optimizers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.utils import optimizer_type_to_emb_opt_type

from embeddings.errors import ConfigError
from embeddings.groups import TableGroup, TableSpec
from embeddings.lookup.compile import make_collection
from embeddings.lookup.sharding import attach_optimizer
from embeddings.optimizers import ROW_OPTIMIZERS, FusedOptimizer, optimizer_of
from trainer.run_config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
ROWS, DIM = 6, 8


def kernels(optimizer: FusedOptimizer) -> SplitTableBatchedEmbeddingBagsCodegen:
    arguments = optimizer.arguments()
    return SplitTableBatchedEmbeddingBagsCodegen(
        [(ROWS, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=optimizer_type_to_emb_opt_type(optimizer.rule.kernel),
        learning_rate=arguments["lr"],
        **{name: value for name, value in arguments.items() if name != "lr"},
    )


@settings(deadline=None, max_examples=20)
@given(
    name=st.sampled_from([*ROW_OPTIMIZERS]),
    batches=st.lists(st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=9), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_kernels_do_what_the_record_says(name: str, batches: list[list[int]], seed: int) -> None:
    check_record(name, batches, seed)


def check_record(name: str, batches: list[list[int]], seed: int) -> None:
    """Compare weights and state of the kernel and of the plain update after batches of ids."""
    optimizer = FusedOptimizer(name, 0.1, eps=0.1)
    rule, tables = optimizer.rule, kernels(optimizer)
    random = torch.Generator().manual_seed(seed)
    (weight,) = tables.split_embedding_weights()
    weight.copy_(torch.randn(ROWS, DIM, generator=random))
    plain, state = weight.clone(), torch.zeros(rule.state_shape(ROWS, DIM))
    for ids in batches:
        slopes = torch.randn(len(ids), DIM, generator=random)
        vectors = tables(torch.tensor(ids), torch.arange(len(ids) + 1))
        (vectors * slopes).sum().backward()
        gradient = torch.zeros(ROWS, DIM).index_add_(0, torch.tensor(ids), slopes)
        plain -= 0.1 * rule.direction(gradient, state, 0.1)
    assert torch.allclose(tables.split_embedding_weights()[0], plain, rtol=0, atol=1e-5)
    (of_table,) = tables.split_optimizer_states() or ([],)
    kept = [part for part in of_table if part.numel()]
    assert [tuple(part.shape) for part in kept] == ([] if rule.state == "none" else [tuple(state.shape)])
    assert sum(part.nbytes for part in kept) == rule.state_bytes(ROWS, DIM)
    for part in kept:
        assert torch.allclose(part, state, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ROW_OPTIMIZERS)
def test_a_table_tells_its_optimizer(name: str) -> None:
    group = TableGroup("g", (TableSpec("item", ROWS, DIM),), FusedOptimizer(name))
    collection = make_collection(group, torch.device("meta"))
    attach_optimizer(collection, group.optimizer)
    (weight,) = collection.parameters()
    assert optimizer_of(weight) is ROW_OPTIMIZERS[name]
    assert optimizer_of(nn.Parameter(torch.zeros(1))) is ROW_OPTIMIZERS["sgd"]


def test_the_configuration_knows_every_record_and_no_other() -> None:
    for name in ROW_OPTIMIZERS:
        config = load_config(CONFIGS / "dare.toml", [f"groups.attention.optimizer={name}"])
        assert config.groups["attention"].optimizer == name
    with pytest.raises(
        ConfigError, match=r"groups\.attention.optimizer: must be 'rowwise_adagrad', 'adagrad'"
    ):
        load_config(CONFIGS / "dare.toml", ["groups.attention.optimizer=adam"])


def test_applied_twice_the_arguments_stay() -> None:
    """TorchRec changes the arguments that it is given."""
    optimizer = FusedOptimizer()
    before = optimizer.arguments()
    weight = nn.Parameter(torch.zeros(2, 4))
    apply_optimizer_in_backward(optimizer.rule.kernel, [weight], optimizer.arguments())
    weight._optimizer_kwargs[0]["lr"] = 7.0  # type: ignore[attr-defined]
    assert optimizer.arguments() == before
