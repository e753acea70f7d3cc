"""Scores whose bits depend on candidate and behavior alone, for pairs that rounding could put in any order.

A matrix product rounds equal rows differently, depending on where in the matrix they lie, and so on all else
in the batch. What a search keeps must not: equal behaviors would be ranked by chance, and a request scored
differently alone and in company. So a search takes the fast product for what it is, right up to an error that
has a bound, and asks here only where scores lie closer than that.

Inner products are of whole numbers (`trainer.model.ops.whole`), exact in any order. Which pairs these are,
and whether any, is asked for on the way, so that a device makes the host wait: `Search.doubt` says when
that is worth it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from operator import itemgetter

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.model.ops.top import Doubt
from trainer.model.ops.whole import CELLS, ROUNDING, Rows, needed_places, whole_rows
from trainer.model.retrieve.score import AttentionVectors, DotScorer, FeatureProjection, MlpScorer, Scorer
from trainer.model.time import Marks, TimeEncoding
from trainer.model.windows import Selection, Windows

# Pairs that are scored at once, and so many that equal behaviors among them are worth looking for.
_PAIRS, _MANY = 1 << 20, 1 << 16


class PairScores:
    """The exact scores of candidates and columns of their windows.

    Args:
        scorer: whose scores; raw: the attention vectors before it encodes them; vectors: after that, as they
            were multiplied.
        windows: whose columns; newest first.
    """

    def __init__(
        self, scorer: Scorer, raw: AttentionVectors, vectors: AttentionVectors, windows: Windows
    ) -> None:
        self.scorer, self.raw, self.vectors, self.windows = scorer, raw, vectors, windows

    def doubt(self) -> Doubt:
        """Rows are candidates times heads, the heads of a candidate one after the other."""
        bias = self.scorer.window_bias(self.vectors, self.windows)
        finite = None if bias is None else bias.masked_fill(~self.windows.mask, 0.0)
        added = 0.0 if finite is None or not finite.numel() else float(finite.abs().max())
        if self.scorer.bias is not None and self.scorer.bias.of_target:
            added += self.scorer.bias.most()
        if isinstance(self.scorer, MlpScorer):
            error_CH = self._error_of_mlp(self.scorer, added)
        else:
            assert isinstance(self.scorer, DotScorer)
            error_CH = self._error_of_dot(self.scorer, added)
        return Doubt(2 * error_CH.flatten(), self.of)

    def of(self, row_M: Tensor, column_M: Tensor) -> Tensor:
        """float64 [M]."""
        parts = zip(row_M.split(_PAIRS), column_M.split(_PAIRS), strict=True)
        return torch.cat([self._of_some(*part) for part in parts])

    def _of_some(self, row_M: Tensor, column_M: Tensor) -> Tensor:
        candidate_M, head_M = row_M // self.scorer.heads, row_M % self.scorer.heads
        window_M = self.windows.of_candidate[candidate_M]

        def at(part: Tensor) -> Tensor:
            return part[window_M, column_M][:, None]

        index_M1, size = at(self.windows.index), self.windows.log_size
        kept = Selection(
            index_M1,
            torch.ones_like(index_M1, dtype=torch.bool),
            self.windows.marks.each(at),
            None if size is None else at(size),
        )
        if not isinstance(self.scorer, DotScorer):
            return self._in_double(candidate_M, kept)
        needed, place_M = needed_places(candidate_M, self.raw.query_CD.shape[0])
        encoding = self.scorer.encoding
        mapped_RD = self._mapped_queries(self.raw.query_CD[needed].float(), self.raw.group_C[needed])
        query = self._of_heads(mapped_RD, place_M, head_M)
        group_M = self.raw.group_C[candidate_M]
        vectors = AttentionVectors(self.raw.query_CD, self.raw.key_ND, group_M, self.raw.cross_N)
        score_M = self.scorer._kept_bias(vectors, kept)[:, 0].double()
        score_M = score_M + self._products(query, index_M1[:, 0], row_M)
        if encoding is not None:
            for name, index in encoding._indices(kept.marks, group_M):
                score_M = score_M + query.times(Rows.of(encoding.tables[name].double(), index[:, 0]))
        return score_M

    def of_windows(self) -> list[Tensor]:
        """Of each head, float64 [C, X] of all pairs; -inf where a window holds nothing.

        For scores that are inner products alone: others would take a layer in double precision a pair.
        """
        scorer, raw, windows = self.scorer, self.raw, self.windows
        assert isinstance(scorer, DotScorer)
        shared, of_candidate = scorer.bias is None or not scorer.bias.of_target, windows.of_candidates()
        if shared:
            own = None if scorer.bias is None else scorer.bias.shared(windows.marks)
            bias = scorer._besides(raw, windows, own).double().masked_fill(~windows.mask, -torch.inf)
        else:
            bias = scorer._kept_bias(raw, of_candidate).double().masked_fill(~of_candidate.mask, -torch.inf)
        if not raw.key_ND.shape[1]:
            # Time alone is scored.
            return [bias[windows.of_candidate] if shared else bias]
        query_CHD = self._rounded_heads(self._mapped_queries(raw.query_CD.float(), raw.group_C))
        key_NHD = self._rounded_heads(_mapped(scorer.key, raw.key_ND.float()))
        scores = []
        for head in range(scorer.heads):
            key_WXD = key_NHD[:, head][windows.index]
            score_WSX = windows.slots.spread(query_CHD[:, head]) @ key_WXD.transpose(1, 2)
            score_CX = windows.slots.collect(score_WSX + bias[:, None] if shared else score_WSX)
            score_CX = score_CX if shared else score_CX + bias
            if scorer.encoding is not None:
                marks, query_CD = of_candidate.marks, query_CHD[:, head]
                for part_CX in _of_encoding(scorer.encoding, query_CD, marks, raw.group_C):
                    score_CX = score_CX + part_CX
            scores.append(score_CX)
        return scores

    def _mapped_queries(self, query_RD: Tensor, group_R: Tensor) -> Tensor:
        """Queries as they are multiplied, float64: encoded, projected, scaled."""
        scorer = self.scorer
        assert isinstance(scorer, DotScorer)
        if scorer.encoding is not None:
            query_RD = scorer.encoding.target(query_RD, group_R)
        mapped_RD = _mapped(scorer.query, query_RD)
        return mapped_RD * scorer.scale(mapped_RD.shape[1])

    def _rounded_heads(self, rows_RD: Tensor) -> Tensor:
        """Rows rounded to whole numbers times a power of two, [R, heads, D]: their products are exact."""
        heads = self.scorer.heads
        whole, unit = whole_rows(rows_RD.reshape(rows_RD.shape[0] * heads, rows_RD.shape[1] // heads))
        return (whole * unit).view(rows_RD.shape[0], heads, whole.shape[1])

    def _products(self, query: Rows, index_M: Tensor, row_M: Tensor) -> Tensor:
        """Inner products of queries and behaviors' keys; of many, equal ones are multiplied once."""
        heads = self.scorer.heads
        kinds = self._kinds if index_M.numel() > _MANY else None
        if kinds is None or (int(row_M.max()) + 1) * len(kinds[1]) > index_M.numel():
            return query.times(self._keys(index_M, row_M % heads))
        kind_N, first = kinds
        pair_M = row_M * len(first) + kind_N[index_M]
        needed, place_M = needed_places(pair_M, (int(row_M.max()) + 1) * len(first))
        some = torch.empty_like(needed)
        some[place_M] = torch.arange(index_M.numel(), device=needed.device)
        keys = self._keys(first[needed % len(first)], row_M[some] % heads)
        return replace(query, place=query.place[some]).times(keys)[place_M]

    @cached_property
    def _kinds(self) -> tuple[Tensor, Tensor] | None:
        """Which keys are equal, by a hash of their bits; None where two different keys have one hash.

        int64 [N], the kind of each key, and [kinds], one key of each kind.
        """
        key_ND = self.raw.key_ND
        bits = key_ND.float().contiguous().view(torch.int32).to(torch.int64)
        rng = torch.Generator().manual_seed(0)
        factor = torch.randint(-(2**62), 2**62, (key_ND.shape[1],), generator=rng).to(bits.device) * 2 + 1
        kind_N = torch.unique((bits * factor).sum(1), return_inverse=True)[1]
        first = torch.empty(int(kind_N.max()) + 1, dtype=torch.int64, device=kind_N.device)
        first[kind_N] = torch.arange(kind_N.numel(), device=kind_N.device)
        return (kind_N, first) if bool((bits[first[kind_N]] == bits).all()) else None

    def _keys(self, index_M: Tensor, head_M: Tensor) -> Rows:
        needed, place_M = needed_places(index_M, self.raw.key_ND.shape[0])
        assert isinstance(self.scorer, DotScorer)
        mapped_RD = _mapped(self.scorer.key, self.raw.key_ND[needed].float())
        return self._of_heads(mapped_RD, place_M, head_M)

    def _of_heads(self, rows_RD: Tensor, place_M: Tensor, head_M: Tensor) -> Rows:
        heads = self.scorer.heads
        return Rows.of(rows_RD.unflatten(1, (heads, -1)).flatten(0, 1), place_M * heads + head_M)

    def _in_double(self, candidate_M: Tensor, kept: Selection) -> Tensor:
        """Scores that are no inner products: in double precision, rounded to float32.

        The order of adding up shows in them only where it decides to which of two floats is rounded.
        """
        scorer, parts = copy.deepcopy(self.scorer).double(), []
        vectors, cross_N = self.raw, self.raw.cross_N
        step = max(1, CELLS // max(1, self.raw.key_ND.shape[1] ** 2))
        for start in range(0, candidate_M.numel(), step):
            some = slice(start, start + step)
            encoded = scorer.encode(
                AttentionVectors(
                    vectors.query_CD[candidate_M[some]].double(),
                    vectors.key_ND[kept.index[some, 0]].double(),
                    vectors.group_C[candidate_M[some]],
                    None if cross_N is None else cross_N[kept.index[some, 0]].double(),
                )
            )
            each = torch.arange(encoded.query_CD.shape[0], device=kept.index.device)[:, None]
            size = None if kept.log_size is None else kept.log_size[some]
            pairs = Selection(each, kept.mask[some], kept.marks.each(itemgetter(some)), size)
            parts.append(scorer.of_kept(encoded, pairs)[:, 0, 0].float().double())
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device=candidate_M.device)

    def _of_windows(self, part_ND: Tensor) -> Tensor:
        """Rows of the windows' behaviors, where these are fewer than all."""
        index_WX = self.windows.index
        return part_ND if index_WX.numel() >= part_ND.shape[0] else part_ND[index_WX.flatten()]

    def _error_of_dot(self, scorer: DotScorer, added: float) -> Tensor:
        """Bound of how far a rounded score lies from the exact one, float32 [C, heads].

        It follows from the norms of the factors, and from those of the projections, if any; `added`: the most
        that is added to a product.
        """
        heads, raw = scorer.heads, self.raw
        query_CH, key_NH = (
            torch.linalg.vector_norm(part.float().unflatten(1, (heads, -1)), dim=2)
            if part.shape[1]
            else part.new_zeros(part.shape[0], heads)
            for part in (self.vectors.query_CD, self._of_windows(self.vectors.key_ND))
        )
        key_H = key_NH.amax(0)
        error_CH = query_CH * key_H
        if scorer.query is not None and scorer.key is not None:
            given = raw.query_CD, self._of_windows(raw.key_ND)
            given_C, given_N = (torch.linalg.vector_norm(part, dim=1) for part in given)
            scale = scorer.scale(self.vectors.query_CD.shape[1])
            error_CH = error_CH + query_CH * _size(scorer.key) * given_N.amax()
            error_CH = error_CH + (scale * _size(scorer.query) * given_C)[:, None] * key_H
        if scorer.encoding is not None:
            for table in scorer.encoding.tables.values():
                largest = torch.linalg.vector_norm(table.float(), dim=1).amax()
                error_CH = error_CH + torch.linalg.vector_norm(query_CH, dim=1, keepdim=True) * largest
        terms = raw.key_ND.shape[1] + self.vectors.key_ND.shape[1] + 16
        return terms * ROUNDING * (error_CH + added)

    def _error_of_mlp(self, scorer: MlpScorer, added: float) -> Tensor:
        query_C = torch.linalg.vector_norm(self.vectors.query_CD.float(), dim=1)
        key = torch.linalg.vector_norm(self._of_windows(self.vectors.key_ND).float(), dim=1).amax()
        given_C = 2 * (query_C + key) + query_C * key
        hidden_C = _size(scorer.first) * given_C + torch.linalg.vector_norm(scorer.first.bias)
        slope = max(1.0, float(scorer.slope.weight.abs().max()))
        score_C = slope * hidden_C * _size(scorer.last) + scorer.last.bias.abs().sum()
        terms = 4 * scorer.width + scorer.first.out_features + 16
        error_C: Tensor = terms * ROUNDING * (score_C / scorer.width + added)
        return error_C[:, None]


def _mapped(module: nn.Module | None, rows_RD: Tensor) -> Tensor:
    """A projection of rows, float64 [R, ...]: the same for equal rows, wherever they lie."""
    if module is None:
        return rows_RD.double()
    if isinstance(module, FeatureProjection):
        parts = rows_RD.split(module.widths, dim=1)
        return torch.cat([_mapped(each, part) for each, part in zip(module.maps, parts, strict=True)], dim=1)
    assert isinstance(module, nn.Linear)
    (rows, unit), (weight, of_weight) = whole_rows(rows_RD.double()), whole_rows(module.weight.double())
    return rows @ weight.T * unit * of_weight.T


def _of_encoding(
    encoding: TimeEncoding, rounded_CD: Tensor, marks: Marks, group_C: Tensor
) -> Iterator[Tensor]:
    """Exact products of rounded queries with the encodings of their windows' behaviors, [C, X] each."""
    for name, table in encoding.tables.items():
        whole_RD, unit_R1 = whole_rows(table.double())
        rounded_RD = whole_RD * unit_R1
        if encoding.form == "joint":
            rows_GR = rounded_RD.view(encoding.groups, -1)
            of_group_CMD = F.embedding(group_C, rows_GR).unflatten(1, (encoding.rows[name], -1))
            product_CM = (of_group_CMD @ rounded_CD.unsqueeze(2)).squeeze(2)
        else:
            product_CM = rounded_CD @ rounded_RD.T
        yield product_CM.gather(1, marks.index(name))


def _size(module: nn.Module) -> Tensor:
    """The norm of all weights of a projection."""
    maps = list(module.maps) if isinstance(module, FeatureProjection) else [module]
    weights = [each.weight.flatten() for each in maps if isinstance(each, nn.Linear)]
    norm: Tensor = torch.linalg.vector_norm(torch.cat(weights))
    return norm
