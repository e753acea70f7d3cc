"""Which raw ids have a row, in the versions of a snapshot: written whole or as a delta, and read in layers.

    ids/<n>.safetensors   of map n: `ids` int64, ascending, and `rows` int64, the row of each in the tables;
                          of a delta those alone that are new or have another row, and beside them `gone`
                          int64, ascending, the ids that have no row any more

An id that loses its row between two versions and gets another one is among `ids` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from embeddings.errors import SnapshotError
from embeddings.ids.frozen import FrozenIds, places
from embeddings.ids.hashing import hashed
from embeddings.ids.rules import IdRules, Ids
from trainer.checkpoint.tensor_stream import TensorStream
from trainer.snapshot.manifest import SnapshotFile, SnapshotIds
from trainer.snapshot.rows import read_tensors

Int64s = npt.NDArray[np.int64]
_IDS, _ROWS, _GONE = "ids", "rows", "gone"
# Numbers that are written at once.
_MANY_IDS = 1 << 20
_NO_ROW = -1


@dataclass(frozen=True)
class Layer:
    """What one version says of a map; the arrays may be memory-mapped.

    Attributes:
        ids: ascending, that have a row since; rows: of each; gone: ascending, that have none any more.
    """

    ids: Ids
    rows: Int64s
    gone: Ids


@dataclass(frozen=True)
class LayeredIds:
    """The ids that have a row in a version: those of a whole one, and deltas laid over.

    Attributes:
        rules: of the map; layers: newest first.
    """

    rules: IdRules
    layers: tuple[Layer, ...] = ()

    def own_rows(self, wanted: Ids) -> Int64s:
        """The row of each id, which may repeat; -1 for those that have none of their own."""
        # Ascending, each once: binary searches then look at near places one after the other.
        distinct, of_wanted = np.unique(wanted, return_inverse=True)
        rows = np.full(distinct.size, _NO_ROW, dtype=np.int64)
        # Places of ids that no newer layer knows.
        left = np.arange(distinct.size)
        for layer in self.layers:
            place, here = places(layer.ids, distinct[left])
            rows[left[here]] = layer.rows[place[here]]
            left = left[~here]
            if layer.gone.size:
                left = left[~places(layer.gone, distinct[left])[1]]
        return rows[of_wanted]

    def look_up(self, wanted: Ids) -> Int64s:
        """The row of each id, which may repeat; that of others is a shared one, as in training."""
        rows = self.own_rows(wanted)
        none = np.flatnonzero(rows == _NO_ROW)
        rows[none] = self.rules.shared_row(hashed(wanted[none]))
        return rows

    def knows(self, wanted: Ids) -> npt.NDArray[np.bool_]:
        """Whether each id has a row of its own."""
        known: npt.NDArray[np.bool_] = self.own_rows(wanted) != _NO_ROW
        return known

    def whole(self) -> FrozenIds:
        """All ids and their rows, in memory."""
        ids, rows = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        for layer in reversed(self.layers):
            stay = ~(places(layer.ids, ids)[1] | places(layer.gone, ids)[1])
            ids = np.concatenate([ids[stay], layer.ids])
            rows = np.concatenate([rows[stay], layer.rows])
            order = np.argsort(ids, kind="stable")
            ids, rows = ids[order], rows[order]
        return FrozenIds(self.rules, ids, rows)


def write_ids(
    folder: Path, path: str, now: FrozenIds, described: SnapshotIds, base: LayeredIds | None
) -> tuple[SnapshotIds, SnapshotFile]:
    """Write a map whole, or what differs from that of the base where this is smaller.

    Args:
        path: of the file in the folder of the version; described: the map, with nothing yet of a delta.
    """
    layer = Layer(now.ids, now.rows, now.ids[:0])
    if base is not None:
        before = base.whole()
        delta = changes(before, now)
        entry = described.model_copy(
            update={"base_live": before.ids.size, "set": delta.ids.size, "gone": delta.gone.size}
        )
        if entry.size < described.size:
            layer, described = delta, entry
    arrays = {_IDS: layer.ids, _ROWS: layer.rows}
    if described.base_live is not None:
        arrays[_GONE] = layer.gone
    (folder / path).parent.mkdir(exist_ok=True)
    sizes = {name: array.size for name, array in arrays.items()}
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = dict.fromkeys(arrays, (torch.int64, ()))
    with TensorStream(folder / path, kinds, sizes) as stream:
        for name, array in arrays.items():
            for begin in range(0, array.size, _MANY_IDS):
                # Copied, since mapped arrays may not be written to.
                stream.append(name, torch.from_numpy(array[begin : begin + _MANY_IDS].copy()))
    return described, SnapshotFile(path=path, **stream.entry)


def changes(before: FrozenIds, now: FrozenIds) -> Layer:
    """What makes one map of another."""
    place, known = places(before.ids, now.ids)
    same = known.copy()
    same[known] = before.rows[place[known]] == now.rows[known]
    gone = ~places(now.ids, before.ids)[1]
    return Layer(now.ids[~same], now.rows[~same], before.ids[gone])


def read_ids(versions: Sequence[tuple[Path, str, SnapshotIds]], rules: IdRules) -> LayeredIds:
    """A map from the version that holds it whole, and the deltas after it laid over; memory-mapped.

    Args:
        versions: (folder, file, description), oldest first; the first is whole, the others are not.

    Raises:
        SnapshotError: a file does not hold what its manifest says, a delta does not fit what it follows, or
            two ids have one row.
    """
    below = LayeredIds(rules)
    taken, live = np.zeros(rules.rows, dtype=np.bool_), 0
    for folder, path, described in versions:
        layer = _read_layer(folder, path, described)
        problem = _problem(layer, below, taken, rules)
        if described.base_live not in (None, live):
            problem = "is a delta against something else"
        live = int(np.count_nonzero(taken))
        if problem or live != described.live:
            raise SnapshotError(folder / path, problem or "gives one row to several ids, or lacks some ids")
        below = LayeredIds(rules, (layer, *below.layers))
    return below


def _read_layer(folder: Path, path: str, described: SnapshotIds) -> Layer:
    tensors = read_tensors(folder, path)
    held, gone = described.held
    wanted = {_IDS: held, _ROWS: held} | ({} if described.base_live is None else {_GONE: gone})
    found = {name: tensor.numel() for name, tensor in tensors.items()}
    plain = all(tensor.dtype == torch.int64 and tensor.dim() == 1 for tensor in tensors.values())
    if found != wanted or not plain:
        raise SnapshotError(folder / path, f"holds {found}, expected int64 of {wanted}")
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    return Layer(arrays[_IDS], arrays[_ROWS], arrays.get(_GONE, np.zeros(0, dtype=np.int64)))


def _problem(layer: Layer, below: LayeredIds, taken: npt.NDArray[np.bool_], rules: IdRules) -> str:
    """What is wrong with a layer, and marks the rows that ids have with it; empty if nothing is.

    Args:
        taken: [rows], those that ids have below.
    """
    if not (_ascending(layer.ids) and _ascending(layer.gone)):
        return "names ids twice, or not in ascending order"
    rows = layer.rows
    if rows.size and (rows.min() < rules.shared_rows or rows.max() >= rules.rows):
        return f"names rows outside [{rules.shared_rows}, {rules.rows})"
    if places(layer.ids, layer.gone)[1].any():
        return "has ids that are there and gone"
    left = below.own_rows(layer.gone)
    if (left == _NO_ROW).any():
        return "takes rows from ids that have none"
    moved = below.own_rows(layer.ids)
    taken[left] = False
    taken[moved[moved != _NO_ROW]] = False
    if taken[rows].any():
        return "gives rows to ids that other ids have"
    taken[rows] = True
    return ""


def _ascending(ids: Ids) -> bool:
    # Compared, since a difference of two ids may not fit 64 bits.
    return bool((ids[1:] > ids[:-1]).all())
