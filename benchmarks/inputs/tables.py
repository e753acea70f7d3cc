"""Tables without sharding, with the weights that sharded ones start with."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from embeddings.first_rows import initial_rows_
from embeddings.groups import TableGroup
from embeddings.lookup.sharding import table_of


def initialise_unsharded(model: nn.Module, groups: Mapping[str, TableGroup], seed: int) -> None:
    """Give plain, unsharded tables the weights they would start with under any plan."""
    for group in groups.values():
        for table in group.tables:
            name = group.table_name(table)
            for parameter, weight in model.named_parameters():
                if table_of(parameter) == name or parameter.endswith(f".{name}"):
                    initial_rows_(weight.data, group.first_seed(seed, name), group.first)
