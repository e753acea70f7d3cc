"""The tables of a model as planning sees them: shapes, bytes, which module holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface

from embeddings.lookup.sharding import sharders
from embeddings.optimizers import RowOptimizer, optimizer_of


@dataclass(frozen=True)
class Table:
    """One embedding table.

    Attributes:
        name: unique in the model; module: path of the collection that holds it.
        rows, dim: its shape; weight_bytes: of one weight.
        optimizer: of its rows.
        pooled: whether its collection returns bags; else rows in sequence.
    """

    name: str
    module: str
    rows: int
    dim: int
    weight_bytes: int
    optimizer: RowOptimizer
    pooled: bool

    def weights(self, rows: int, columns: int) -> int:
        """Bytes of the weights of a shard."""
        return rows * columns * self.weight_bytes


def tables_of(model: nn.Module) -> dict[str, Table]:
    """All tables of the collections that TorchRec will shard, by name; meta tensors will do."""
    found: dict[str, Table] = {}
    by_type = {sharder.module_type: sharder for sharder in sharders()}
    for path, module in model.named_modules():
        sharder = by_type.get(type(module))
        if sharder is None:
            continue
        pooled = isinstance(module, EmbeddingBagCollectionInterface)
        for name, weight in sharder.shardable_parameters(module).items():
            rows, dim = weight.shape
            found[name] = Table(name, path, rows, dim, weight.element_size(), optimizer_of(weight), pooled)
    return found


def dense_bytes(model: nn.Module, tables: Mapping[str, Table]) -> int:
    """Bytes of everything that is not a table: every rank holds it whole."""
    modules = {table.module for table in tables.values()}
    return sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if not any(name.startswith(f"{module}.") for module in modules)
    )
