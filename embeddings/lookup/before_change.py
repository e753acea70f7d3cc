"""Rows as they were before training changed them: copied when they are looked up for the first time.

Training changes rows that it looks up, and no others (`embeddings.lookup.touched`). So a copy of each row
before its first lookup is as good as a copy of the whole table, in the memory of the rows that are touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from embeddings.lookup.caches import drop_caches, flush_caches
from embeddings.lookup.touched import ShardKey, empty_bits, mark, watch

# Of rows that are combined at a time, in float64.
_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Rows:
    """Some rows of a shard of a table, in host memory; nobody changes them.

    Attributes:
        ids: int64 [n], ascending, each once; row 0 is the shard's first.
        parts: of each tensor that goes with the table, weights first, these rows [n, ...].
    """

    ids: Tensor
    parts: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + sum(part.nbytes for part in self.parts)

    def at(self, ids: Tensor, otherwise: Rows) -> tuple[Tensor, ...]:
        """The parts' rows `ids`; those that are not here come from `otherwise`, which has them all."""
        found = otherwise._take(ids)
        if len(self.ids):
            place = torch.searchsorted(self.ids, ids).clamp(max=len(self.ids) - 1)
            here = self.ids[place] == ids
            for mine, part in zip(self.parts, found, strict=True):
                part[here] = mine[place[here]]
        return found

    def _take(self, ids: Tensor) -> tuple[Tensor, ...]:
        place = torch.searchsorted(self.ids, ids)
        return tuple(part[place] for part in self.parts)


# What rows a set of shards has.
RowsOfShards = Mapping[ShardKey, Rows]


def combined(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """The mean of tensors by shares that add up to 1, computed in float64.

    It is taken around the one with the largest share, so that a share of 1 gives that tensor, and equal ones
    give themselves, to the bit.
    """
    largest = max(range(len(shares)), key=lambda place: shares[place])
    middle = values[largest]
    others = [
        (value, share)
        for place, (value, share) in enumerate(zip(values, shares, strict=True))
        if place != largest and share
    ]
    if not others:
        return middle
    total = middle.double()
    for value, share in others:
        total = total + share * (value.double() - middle.double())
    return total.to(middle.dtype)


def combined_rows(base: Rows, branches: Sequence[Rows], shares: Sequence[float]) -> Rows:
    """The rows of `base` as the mean of branches; a branch has those that it changed, all of them in base."""
    parts = tuple(torch.empty_like(part) for part in base.parts)
    for begin in range(0, len(base.ids), _AT_ONCE):
        ids = base.ids[begin : begin + _AT_ONCE]
        values = [branch.at(ids, base) for branch in branches]
        for part, *each in zip(parts, *values, strict=True):
            part[begin : begin + len(ids)] = combined(each, shares)
    return Rows(base.ids, parts)


class RowsBeforeChange:
    """Keeps the rows of a sharded model as they are now, as training goes on.

    Args:
        model: whose lookups are watched, once `begin` was called.
        parts: of each of its shards that `embeddings.lookup.touched.watch` knows, the tensors with a row for
            each of its rows: weights first, then the optimizer's state. They are written to in place.
    """

    def __init__(self, model: nn.Module, parts: Mapping[ShardKey, Sequence[Tensor]]) -> None:
        self._model, self._parts = model, {key: tuple(each) for key, each in parts.items()}
        self._watching = False
        self._bits: dict[ShardKey, Tensor] = {}
        self._kept: dict[ShardKey, list[Rows]] = {}
        self.rows = watch(model, self._before)
        if missing := set(self.rows) - set(self._parts):
            raise ValueError(f"no tensors of {', '.join(key.table for key in missing)} were given")

    def begin(self, kept: RowsOfShards | None = None) -> None:
        """Keep rows as they are from now on.

        Args:
            kept: rows that were kept by another one before a restart, which this one goes on from.
        """
        flush_caches(self._model)
        self._bits, self._kept, self._watching = {}, {}, True
        for key, rows in (kept or {}).items():
            self._add(key, rows)

    def end(self) -> None:
        """Keep nothing any more."""
        self._bits, self._kept, self._watching = {}, {}, False

    def before(self) -> dict[ShardKey, Rows]:
        """All rows that were looked up since `begin`, as they were then."""
        for key, pieces in self._kept.items():
            if len(pieces) > 1:
                ids, order = torch.cat([piece.ids for piece in pieces]).sort()
                columns = zip(*(piece.parts for piece in pieces), strict=True)
                self._kept[key] = [Rows(ids, tuple(torch.cat(column)[order] for column in columns))]
        return {key: pieces[0] for key, pieces in self._kept.items()}

    def changed(self) -> dict[ShardKey, Rows]:
        """Of those rows the ones that differ from what they were, as they are now."""
        flush_caches(self._model)
        found = {}
        for key, before in self.before().items():
            pieces = [
                self._differing(key, Rows(ids, tuple(parts)))
                for ids, *parts in zip(
                    before.ids.split(_AT_ONCE), *(part.split(_AT_ONCE) for part in before.parts), strict=True
                )
            ]
            columns = zip(*(piece.parts for piece in pieces), strict=True)
            ids = torch.cat([piece.ids for piece in pieces])
            found[key] = Rows(ids, tuple(torch.cat(column) for column in columns))
        return found

    def put(self, rows: RowsOfShards) -> None:
        """Write rows into the model's tensors."""
        for key, each in rows.items():
            for tensor, values in zip(self._parts[key], each.parts, strict=True):
                tensor.detach()[each.ids.to(tensor.device)] = values.to(tensor.device)
        drop_caches(self._model)

    def _before(self, key: ShardKey, ids: Tensor) -> None:
        if not self._watching:
            return
        new = ids.long().unique()
        if key in self._bits:
            bits = self._bits[key]
            new = new[(bits[new >> 3] >> (new & 7).to(torch.uint8)) & 1 == 0]
        if len(new):
            self._add(key, Rows(new.cpu(), self._now(key, new)), new)

    def _add(self, key: ShardKey, rows: Rows, ids: Tensor | None = None) -> None:
        ids = rows.ids.to(self._parts[key][0].device) if ids is None else ids
        mark(self._bits.setdefault(key, empty_bits(self.rows[key], ids.device)), ids)
        self._kept.setdefault(key, []).append(rows)

    def _now(self, key: ShardKey, ids: Tensor) -> tuple[Tensor, ...]:
        parts = self._parts[key]
        return tuple(part.detach()[ids.to(part.device)].cpu() for part in parts)

    def _differing(self, key: ShardKey, before: Rows) -> Rows:
        now = self._now(key, before.ids)
        differs = torch.zeros(len(before.ids), dtype=torch.bool)
        for old, new in zip(before.parts, now, strict=True):
            # Bytes, since zero has two forms that are equal.
            pair = (each.contiguous().view(torch.uint8).view(len(each), -1) for each in (old, new))
            differs |= torch.ne(*pair).any(1)
        return Rows(before.ids[differs], tuple(new[differs] for new in now))


def bytes_of(kept: Iterable[RowsOfShards]) -> int:
    """Host memory that rows take."""
    return sum(rows.nbytes for shards in kept for rows in shards.values())
