"""Stage one for serving: one request at a time.

Training scores all windows of a batch at once, padded to the longest. A server has few requests of very
different length and up to 50,000 behaviors each, so here every window is scored alone, candidates in chunks,
which bounds memory and makes a request independent of its company. The result is that of the search it
stands for (property test), whatever the scorer and the kind of search.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.model.retrieve.score import AttentionVectors
from trainer.model.retrieve.search import Query, Search
from trainer.model.time import Marks
from trainer.model.windows import Selection, Windows

# Scores held at once.
_CELLS = 8 << 20


class WindowSearch(Search):
    """The same as `inner`, window by window."""

    def __init__(self, inner: Search) -> None:
        super().__init__(inner.k)
        self.inner = inner

    def of_behaviors(self, key_ND: Tensor) -> dict[str, Tensor]:
        return self.inner.of_behaviors(key_ND)

    def select(self, query: Query) -> Selection:
        windows, count = query.windows, query.vectors.query_CD.shape[0]
        lengths = windows.mask.sum(1).tolist()
        # After a hard search every candidate has a short window of its own: together they are cheaper.
        if not count or (len(lengths) == count > 1 and windows.index.numel() <= _CELLS):
            selection: Selection = self.inner(query)
            return selection
        parts = []
        for window, (begin, end) in enumerate(windows.spans):
            if end > begin:
                single = _single_window(query, window, lengths[window], begin, end)
                for found in self._of_window(single):
                    missing = self.k - found[0].shape[1]
                    parts.append([F.pad(each, (0, missing)) for each in found] if missing else found)
        joined = parts[0] if len(parts) == 1 else [torch.cat(each) for each in zip(*parts, strict=True)]
        return _kept(windows, *joined)

    def _of_window(self, query: Query) -> Iterator[Sequence[Tensor]]:
        """Columns of each candidate, and which count."""
        count, held = query.vectors.query_CD.shape[0], self.inner.held(query)
        size = max(1, _CELLS // held) if held else count
        for begin in range(0, count, size):
            yield self.inner.columns(_candidates(query, begin, min(begin + size, count)))


def per_window(search: Search) -> Search:
    """The search that serves in place of one of training; one that keeps whole windows stays as it is."""
    return search if search.keeps_all or isinstance(search, WindowSearch) else WindowSearch(search)


def _kept(windows: Windows, column_CK: Tensor, mask_CK: Tensor) -> Selection:
    """`Windows.columns`; faster where a single stretch is kept from and no candidate keeps less than K."""
    if windows.lengths is None or windows.index.shape[0] > 1 or not bool(mask_CK.all()):
        return windows.columns(column_CK, mask_CK)
    marks, nothing = windows.marks, windows.marks.level[:1, :1].expand(column_CK.shape)
    age_CK = marks.age.take(column_CK)
    found = Marks((column_CK + 1).to(marks.position.dtype), age_CK, nothing)
    return Selection(windows.index[0, 0] - column_CK, mask_CK, found)


def _single_window(query: Query, window: int, length: int, begin: int, end: int) -> Query:
    """One window, cut to its own length, and its candidates."""
    part, whole = slice(window, window + 1), query.windows

    def cut(each: Tensor) -> Tensor:
        return each[part, : max(length, 1)]

    size = None if whole.log_size is None else cut(whole.log_size)
    of_candidate = torch.zeros(whole.of_candidate.numel(), dtype=torch.int64, device=whole.index.device)
    marks, lengths = whole.marks.each(cut), None if whole.lengths is None else whole.lengths[part]
    windows = Windows(cut(whole.index), cut(whole.mask), marks, size, of_candidate, lengths)
    return _candidates(replace(query, windows=windows), begin, end)


def _candidates(query: Query, begin: int, end: int) -> Query:
    """Some candidates of one window."""
    chosen = slice(begin, end)

    def cut(vectors: AttentionVectors) -> AttentionVectors:
        return replace(vectors, query_CD=vectors.query_CD[chosen], group_C=vectors.group_C[chosen])

    windows = replace(query.windows, of_candidate=query.windows.of_candidate[chosen])
    ids_C = None if query.ids_C is None else query.ids_C[chosen]
    return replace(query, vectors=cut(query.vectors), raw=cut(query.raw), windows=windows, ids_C=ids_C)
