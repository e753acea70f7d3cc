"""Bytes that lookups in sharded tables send from rank to rank in one step.

What TorchRec 1.8 sends, per table. W ranks, L of them on a node; a lookup has B bags and I ids over all ranks
(one id a bag: I = B), each rank a W-th part of both; the table is D wide, a float on the wire has f bytes.
Bytes are counted once, where they leave a rank; what a rank keeps for itself is not counted.

*Ids* travel as a KeyedJaggedTensor: an int32 length a bag and an int64 id. Whoever holds a column of a row is
sent both. A `table_wise` owner receives all but its own part: (W-1)/W (4 B + 8 I); `column_wise` does so
for each of its S shards. `row_wise` sends an id only where its row lies, (W-1)/W 8 I, but the lengths of
every bag (a zero where the id is elsewhere) to every rank: (W-1) 4 B. `table_row_wise` does the same on the
L ranks of one node, which hold the rows: lengths L (1 - 1/W) 4 B; `grid_shard` for each of its S column
shards, a node each. (`TwSparseFeaturesDist`, `RwSparseFeaturesDist`, `TwRwSparseFeaturesDist`.)

Tables that are sharded in one way and look one feature up, as those of several sets or lanes do, have its
ids sent to a rank once (`embeddings.lookup.shared_ids`): so some tables send ids for the others, and these
send none.

*Vectors of bags.* `table_wise` and `column_wise` owners send every bag's vector home, (W-1)/W B D f
(`PooledEmbeddingsAllToAll`). With `row_wise` any rank might hold a part of any bag, so each rank fills a
[B, D] block, zeros where it has nothing, and a reduce-scatter adds the blocks up: each rank sends the parts
of the W-1 others, (W-1) B D f together, W times as much as one owner would send, directly or around a ring.
`table_row_wise` reduce-scatters on one node, (L-1) B D f, and sends the sums across the N = W/L nodes,
(N-1)/N B D f.

*Vectors of sequences.* An `EmbeddingCollection` returns each id's row from the one rank that has it, whatever
the sharding: (W-1)/W I D f (`SequenceEmbeddingsAllToAll`). It offers neither `table_row_wise` nor
`grid_shard`, which count as `row_wise` here.

*Gradients* go the same way back (all-to-all, or the all-gather that mirrors a reduce-scatter), so they are as
many bytes as the vectors. `data_parallel` sends neither ids nor vectors, but all-reduces the gradient of
the whole table: 2 (W-1) R D 4 around a ring for R rows.

Between GPUs a rank asks for each row of its sequences once (`Exchange` in embeddings.lookup.sharded), so that
I is smaller there by as many ids as stand in a rank's bags already; these formulae count them all.

Not counted: 16 bytes a pair of ranks that announce the sizes. Exact where ranks have equal parts; where they
do not, the owner's part of B differs from B/W. A padding with empty bags, where row-wise bags need one, adds
its bags to B.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from embeddings.groups import TableGroup
from embeddings.lookup.shared_ids import Placed, senders

LENGTH_BYTES, ID_BYTES = 4, 8


@dataclass(frozen=True)
class Lookup:
    """What a table is asked in one step: bags and ids, summed over all ranks."""

    bags: int
    ids: int


@dataclass(frozen=True)
class Traffic:
    """Bytes of one step, over all ranks: ids to the tables, vectors back, gradients to the tables."""

    ids: float = 0.0
    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        return self.ids + self.forward + self.backward

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.ids + other.ids, self.forward + other.forward, self.backward + other.backward)


def sending_ids(
    options: Iterable[tuple[str, str, Iterable[int]]], groups: Iterable[TableGroup], device: str
) -> dict[str, bool]:
    """Whether a table has its feature's ids sent; else it reads those that are sent for other sets.

    Args:
        options: name of a table, how it is sharded, and the ranks of its shards; device: `cpu` or `cuda`.
    """
    placed = {name: (sharding, tuple(ranks)) for name, sharding, ranks in options}
    found: dict[str, bool] = {}
    for group in groups:
        alike: dict[str, list[Placed]] = {}
        for table in group.all_tables:
            name = group.table_name(table)
            sharding, ranks = placed[name]
            alike.setdefault(sharding, []).append(Placed(name, table.feature, ranks))
        sending = {name for tables in alike.values() for name in senders(tables, device)}
        found |= {each.table: each.table in sending for tables in alike.values() for each in tables}
    return found


def traffic(
    shape: tuple[int, int],
    sharding: str,
    shards: int,
    lookup: Lookup,
    world_size: int,
    local_world_size: int,
    pooled: bool,
    wire: tuple[int, int] = (4, 4),
    sends_ids: bool = True,
) -> Traffic:
    """Bytes that leave ranks in one step for one table; see the top of this file for the derivation.

    Args:
        shape: rows and width of the whole table.
        sharding: TorchRec's name of the sharding type.
        shards: column shards; 1 unless the table is cut into columns.
        pooled: through an EmbeddingBagCollection, else through an EmbeddingCollection.
        wire: bytes of a float sent forward and backward (2 with quantized communication in half precision).
        sends_ids: see `sending_ids`.
    """
    rows, dim = shape
    if sharding == "data_parallel":
        return Traffic(backward=2.0 * (world_size - 1) * rows * dim * 4)
    if not pooled and sharding in ("table_row_wise", "grid_shard"):
        sharding = "row_wise"
    away = 1 - 1 / world_size
    if not pooled:
        floats = away * lookup.ids * dim
    elif sharding == "row_wise":
        floats = float((world_size - 1) * lookup.bags * dim)
    elif sharding in ("table_row_wise", "grid_shard"):
        nodes = world_size / local_world_size
        floats = ((local_world_size - 1) + (1 - 1 / nodes)) * lookup.bags * dim
    else:
        floats = away * lookup.bags * dim
    holders = {"row_wise": world_size, "table_row_wise": local_world_size, "grid_shard": local_world_size}
    copies = shards if sharding in ("column_wise", "table_column_wise", "grid_shard") else 1
    lengths = holders.get(sharding, 1) * lookup.bags * LENGTH_BYTES
    ids = away * copies * (lengths + lookup.ids * ID_BYTES) * sends_ids
    return Traffic(ids, floats * wire[0], floats * wire[1])
