"""The K best columns of each row of a matrix product, exactly and without the matrix, on the CPU.

Stage one of a request is a product of its candidates and thousands of behaviors of which a few a candidate
are kept. Torch's operators write all scores and read them again, twice. The kernel, C code beside this file,
multiplies some keys at a time, while these and their scores lie in the cache, and goes on with what reaches a
bound: K groups of columns have a best score of at least the K-th largest of these. The plain form is its
reference, and what there is where it was not compiled.

What is kept follows from exact scores alone wherever rounding could decide (`Doubt`), so it is the same by
either form, by any instruction set, and for any number of threads.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.model.ops.threads import in_threads
from trainer.model.ops.top import Doubt, Floats, Ints, best_of_reaching, top_columns
from trainer.sealed_folder import voice

# Rows that one thread ranks before it takes the next ones: their scores stay in its cache.
_ROWS = 64
# Slacks from here on are of scores that may be too large for float32, if they are numbers at all.
_LARGEST = 2.0**100
_LIBRARY = "_top_products"
# `tandemrec_interface` of the code beside this file.
_INTERFACE = 1


class _Question(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "query", "beside", "slack")),
        *(
            (name, ctypes.c_int64)
            for name in ("columns", "width", "rows", "query_stride", "beside_stride", "k", "last")
        ),
    )


class _Answer(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("column", "count", "value", "place", "room"))


@dataclass(frozen=True)
class Kernel:
    """The compiled code.

    Attributes:
        lanes: numbers of a vector: 16 (AVX-512), 8 (AVX2) or 4 (any processor).
    """

    library: ctypes.CDLL
    lanes: int

    def pack(self, key_XD: Tensor, bias_X: Tensor | None) -> Tensor:
        """Keys as the kernel reads them."""
        columns, width = key_XD.shape
        packed = torch.empty(self.library.tandemrec_padded(columns) * (1 + width))
        bias = None if bias_X is None else bias_X.contiguous()
        self.library.tandemrec_pack(_at(key_XD), key_XD.stride(0), columns, width, _at(bias), _at(packed))
        return packed


@cache
def kernel() -> Kernel | None:
    """The kernel for this processor; None where it was not compiled, or from other code than lies here."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(_LIBRARY + suffix)
        if path.is_file():
            library = ctypes.CDLL(str(path))
            size, at = ctypes.c_int64, ctypes.c_void_p
            if getattr(library, "tandemrec_interface", int)() != _INTERFACE:
                voice.say(
                    f"search: {path.name} was compiled from an earlier version and is not used, torch's own "
                    "operators are; `pip install --no-deps -e .` compiles it anew"
                )
                return None
            library.tandemrec_lanes.restype = size
            library.tandemrec_padded.restype, library.tandemrec_padded.argtypes = size, [size]
            library.tandemrec_room.restype, library.tandemrec_room.argtypes = size, [size] * 4
            library.tandemrec_pack.restype = None
            library.tandemrec_pack.argtypes = [at, size, size, size, at, at]
            library.tandemrec_top.restype, library.tandemrec_top.argtypes = None, [size, at, at]
            return Kernel(library, library.tandemrec_lanes())
    return None


@dataclass(frozen=True)
class Piece:
    """Some rows of queries, and the keys that they are multiplied with.

    Attributes:
        first, last: rows [first, last) of all queries.
        key_XD: float32, at least one key, rows of contiguous numbers.
        bias_X: float32, added to the scores of a key; beside_CX: to a score; -inf for what is never kept.
    """

    first: int
    last: int
    key_XD: Tensor
    bias_X: Tensor | None = None
    beside_CX: Tensor | None = None

    def scores(self, query_CD: Tensor) -> Tensor:
        """All of them, [last - first, X], from all queries."""
        score_CX = query_CD[self.first : self.last] @ self.key_XD.T
        for added in (self.bias_X, self.beside_CX):
            score_CX = score_CX if added is None else score_CX + added
        return score_CX


@torch.no_grad()
def top_products(
    query_CD: Tensor, pieces: Sequence[Piece], k: int, doubt: Doubt, *, last: bool = False, by: Kernel | None
) -> tuple[Tensor, Tensor]:
    """The columns of the K best scores <query, key> + bias + beside of each row; ties go to the lower column.

    Args:
        query_CD: float32, rows of contiguous numbers.
        pieces: X keys at most; of a row in no piece nothing counts.
        doubt: of all rows, about the columns as they are returned.
        last: columns are counted from the last key of a piece, which is column 0.
        by: the kernel; None: torch's operators.

    Returns:
        int64 and bool, both [C, min(K, X)]: ascending; columns that do not count are X - 1.
    """
    width = max((piece.key_XD.shape[0] for piece in pieces), default=1)
    search = _Search(query_CD, pieces, min(k, width), width, doubt, last)
    # Numbers that are none, and scores that overflow, are for the plain form.
    small = bool(doubt.slack.max() < _LARGEST) if doubt.slack.numel() else True
    return search.plain() if by is None or not small else search.by_kernel(by)


class _Search:
    """One question; arguments are those of `top_products`, but for `k`, which is at most the `width` X."""

    def __init__(
        self, query_CD: Tensor, pieces: Sequence[Piece], k: int, width: int, doubt: Doubt, last: bool
    ) -> None:
        self.query_CD, self.pieces, self.k, self.width = query_CD, pieces, k, width
        self.doubt, self.last, self.slack_C = doubt, last, doubt.slack.float().contiguous()
        self.column_CK = torch.full((query_CD.shape[0], k), width - 1)
        self.count_C = torch.zeros(query_CD.shape[0], dtype=torch.int64)

    def plain(self) -> tuple[Tensor, Tensor]:
        """By torch's own operators, a piece at a time."""
        mask_CK = torch.zeros(self.column_CK.shape, dtype=torch.bool)
        for piece in self.pieces:
            keys, here = piece.key_XD.shape[0], self.doubt.cut(piece.first, piece.last)
            here = here.mirrored(keys) if self.last else here
            column, mask = top_columns(piece.scores(self.query_CD), self.k, last=self.last, doubt=here)
            rows, own = slice(piece.first, piece.last), slice(column.shape[1])
            self.column_CK[rows, own] = column.masked_fill(~mask, self.width - 1)
            mask_CK[rows, own] = mask
        return self.column_CK, mask_CK

    def by_kernel(self, by: Kernel) -> tuple[Tensor, Tensor]:
        """What the kernel is sure of, and the rest by exact scores, of all pieces at once."""
        found = in_threads(lambda piece, _: self._of_piece(by, self.pieces[piece]), range(len(self.pieces)))
        if bool((self.count_C == self.k).all()):
            return self.column_CK, torch.ones(self.column_CK.shape, dtype=torch.bool)
        mask_CK = torch.arange(self.k) < self.count_C[:, None]
        self.column_CK.masked_fill_(~mask_CK, self.width - 1)
        close = [part for parts in found for part in parts]
        if close:
            row_R = np.concatenate([part.row for part in close])
            self.column_CK[row_R], mask_CK[row_R] = self._settled(torch.from_numpy(row_R), close)
        return self.column_CK, mask_CK

    def _of_piece(self, by: Kernel, piece: Piece) -> list[_Close]:
        packed = by.pack(piece.key_XD, piece.bias_X)
        rows = range(piece.first, piece.last, _ROWS)
        # Where there is one piece, its rows are shared out.
        found = in_threads(lambda begin, _: self._part(by, piece, packed, begin), rows)
        return [part for part in found if part is not None]

    def _part(self, by: Kernel, piece: Piece, packed: Tensor, begin: int) -> _Close | None:
        """Rank some rows; -> those among which rounding could decide."""
        rows, keys, width = min(_ROWS, piece.last - begin), piece.key_XD.shape[0], self.query_CD.shape[1]
        padded = by.library.tandemrec_padded(keys)
        room = by.library.tandemrec_room(keys, width, rows, self.k)
        rooms = value, place, _ = _rooms.of(rows * padded, room)
        beside = None if piece.beside_CX is None else piece.beside_CX[begin - piece.first :]
        asked = _Question(
            *(_at(part) for part in (packed, self.query_CD[begin:], beside, self.slack_C[begin:])),
            *(keys, width, rows, self.query_CD.stride(0)),
            *(0 if beside is None else beside.stride(0), self.k, self.last),
        )
        answer = _Answer(*(_at(part) for part in (self.column_CK[begin:], self.count_C[begin:], *rooms)))
        by.library.tandemrec_top(by.lanes, ctypes.byref(asked), ctypes.byref(answer))
        counts = self.count_C[begin : begin + rows].numpy()
        close = np.flatnonzero(counts < 0)
        if not close.size:
            return None
        spans = [slice(row * padded, row * padded - counts[row]) for row in close.tolist()]
        values, places = (np.concatenate([part[span] for span in spans]) for part in (value, place))
        # Of pieces with fewer keys than others the last ones are the last, too, where these come first.
        return _Close(close + begin, -counts[close], values, places + (self.width - keys) * self.last)

    def _settled(self, row_R: Tensor, close: Sequence[_Close]) -> tuple[Tensor, Tensor]:
        """Columns of these rows, and which count."""
        counts, value, place = (
            np.concatenate([getattr(part, name) for part in close]) for name in ("counts", "value", "place")
        )
        flat = np.repeat(np.arange(counts.size) * self.width, counts) + place
        here = self.doubt.mirrored(self.width) if self.last else self.doubt
        doubt = Doubt(self.slack_C[row_R], lambda row, column: here.exact(row_R[row], column))
        return best_of_reaching(flat, value, counts.size, self.width, self.k, last=self.last, doubt=doubt)


@dataclass(frozen=True)
class _Close:
    """Rows whose K best are not known for sure, and their scores that may be among them.

    Attributes:
        row: int64 [R], which rows; counts: int64 [R], scores of each.
        value, place: of all scores, the rows' one after the other: rounded, and their keys, ascending.
    """

    row: Ints
    counts: Ints
    value: Floats
    place: NDArray[np.int32]


class _Rooms(threading.local):
    """Memory of each thread that is used again: fresh pages would cost as much as filling them."""

    def __init__(self) -> None:
        self.value, self.place = np.empty(0, np.float32), np.empty(0, np.int32)
        self.room = np.empty(0, np.float32)

    def of(self, scores: int, room: int) -> tuple[Floats, NDArray[np.int32], Floats]:
        """Room for so many scores that may be among the best and their places, and so many floats besides."""
        if self.value.size < scores:
            # The kernel writes two places more than there are.
            self.value, self.place = np.empty(scores, np.float32), np.empty(scores + 2, np.int32)
        if self.room.size < room:
            self.room = np.empty(room, np.float32)
        return self.value, self.place, self.room


_rooms = _Rooms()


def _at(part: Tensor | NDArray[Any] | None) -> int | None:
    """Where its numbers begin."""
    if part is None:
        return None
    return part.data_ptr() if isinstance(part, Tensor) else part.ctypes.data
