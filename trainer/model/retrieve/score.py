"""Scores of behaviors for a candidate: one function and one set of parameters for both stages.

A scorer encodes the attention vectors once a batch, then scores whole windows (stage one, or a model without
search) or gathered behaviors (stage two). Both give the same numbers up to rounding, which is what makes the
search consistent with the attention that follows it (TWIN, section 4.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trainer.config.model import BranchKeys
from trainer.model.ops.bags import dots, rows_at
from trainer.model.ops.precision import full, in_single_precision
from trainer.model.ops.tiling import tiling_of
from trainer.model.ops.traced import is_traced
from trainer.model.sizes import BranchSizes
from trainer.model.time import TimeBias, TimeEncoding
from trainer.model.time_vectors import borrow
from trainer.model.windows import Selection, Slots, Windows, one_each


@dataclass(frozen=True)
class AttentionVectors:
    """The attention vectors of a batch, before any scorer.

    Attributes:
        query_CD, key_ND: of candidates and behaviors; N is at least 1 (a padding row).
        group_C: int64 [C], each candidate's target group, 0 without groups.
        cross_N: float32 [N], additive score of each behavior from its cross features, or None.
        beside_ND: vectors of cross features that are a part of the behaviors' values, or None.
        known: what follows from the behaviors alone and was made before, by names that its users give
            (`Scorer.of_behaviors`, `Search.of_behaviors`): [N, *] each; None where nothing was.
    """

    query_CD: Tensor
    key_ND: Tensor
    group_C: Tensor
    cross_N: Tensor | None = None
    known: Mapping[str, Tensor] | None = None
    beside_ND: Tensor | None = None

    def known_or(self, name: str, make: Callable[[Tensor], Tensor]) -> Tensor:
        """What is known by this name, or else what follows from the keys."""
        if self.known is not None and name in self.known:
            return self.known[name]
        return make(self.key_ND)

    def in_full(self) -> AttentionVectors:
        """In single precision, where autocast halved the vectors."""
        return replace(self, query_CD=full(self.query_CD), key_ND=full(self.key_ND))


class Scorer(nn.Module):
    """What is common to all scorers: the score of marks and cross features, added to all heads alike.

    Args:
        bias: of the marks, or None.
    """

    heads: int = 1

    def __init__(self, bias: TimeBias | None) -> None:
        super().__init__()
        self.bias = bias

    def encode(self, vectors: AttentionVectors) -> AttentionVectors:
        """Whatever is computed once for the batch; what the other methods are given."""
        return vectors

    def of_behaviors(self, key_ND: Tensor) -> dict[str, Tensor]:
        """What `encode` makes of behaviors whatever the candidates, by name: [N, *] each."""
        return {}

    def over_windows(self, vectors: AttentionVectors, windows: Windows) -> Tensor:
        """Scores of whole windows, float32 [C, H, X]; -inf where the window holds nothing."""
        raise NotImplementedError

    def of_kept(self, vectors: AttentionVectors, kept: Selection) -> Tensor:
        """Scores of kept behaviors, float32 [C, H, K]; undefined where `kept.mask` is False."""
        raise NotImplementedError

    @property
    def shares_bias(self) -> bool:
        """Whether what is added to a window's scores is the same for all its candidates."""
        return self.bias is None or not self.bias.of_target

    def window_bias(self, vectors: AttentionVectors, windows: Windows) -> Tensor | None:
        """What is added to a window's columns for every candidate: [W, X], or None where that is nothing."""
        nothing = self.bias is None and vectors.cross_N is None and windows.log_size is None
        return None if nothing else self._window_bias(vectors, windows)

    def _window_bias(self, vectors: AttentionVectors, windows: Windows) -> Tensor:
        """The same, with -inf where the window holds nothing."""
        bias = None
        if self.bias is not None and not self.bias.of_target:
            bias = self.bias.shared(windows.marks)
        added = self._besides(vectors, windows, bias)
        return added.masked_fill(~windows.mask, -torch.inf)

    def _target_bias(self, vectors: AttentionVectors, windows: Windows) -> Tensor | None:
        """What is added besides for each candidate: [C, X], or None."""
        if self.bias is None or not self.bias.of_target:
            return None
        bias: Tensor = self.bias(windows.of_candidates().marks, vectors.group_C)
        return bias

    def _kept_bias(self, vectors: AttentionVectors, kept: Selection) -> Tensor:
        bias = None if self.bias is None else self.bias(kept.marks, vectors.group_C)
        return self._besides(vectors, kept, bias)

    @staticmethod
    def _besides(vectors: AttentionVectors, kept: Windows | Selection, bias: Tensor | None) -> Tensor:
        """The bias of marks, scores of cross features and ln of clusters' sizes, as far as there are any."""
        added = torch.zeros(kept.index.shape, device=kept.index.device) if bias is None else bias
        if vectors.cross_N is not None:
            added = added + rows_at(vectors.cross_N, kept.index)
        return added if kept.log_size is None else added + kept.log_size


class DotScorer(Scorer):
    """<query, key> / sqrt(D), plus the bias of marks (TWIN, DARE), or with encodings in both vectors (TIN).

    Args:
        query, key: projections of the attention vectors to [*, H * D], or None = as they are.
        heads: H.
        bias, encoding: how marks enter, either or none.
        temperature: what products are divided by besides.
        borrows: the encoding is that of the values, which have its parameters.
    """

    def __init__(
        self,
        query: nn.Module | None,
        key: nn.Module | None,
        heads: int,
        bias: TimeBias | None,
        encoding: TimeEncoding | None,
        temperature: float = 1.0,
        *,
        borrows: bool = False,
    ) -> None:
        super().__init__(bias)
        self.temperature = temperature
        self.query, self.key, self.heads = query, key, heads
        self.encoding: TimeEncoding | None
        if borrows:
            borrow(self, "encoding", encoding)
        else:
            self.encoding = encoding

    @property
    def shares_bias(self) -> bool:
        return self.encoding is None and super().shares_bias

    def _target_bias(self, vectors: AttentionVectors, windows: Windows) -> Tensor | None:
        bias = super()._target_bias(vectors, windows)
        if self.encoding is not None:
            marks = windows.of_candidates().marks
            added = self.encoding.scores(vectors.query_CD, marks, vectors.group_C)
            bias = added if bias is None else bias + added
        return bias

    def encode(self, vectors: AttentionVectors) -> AttentionVectors:
        query, key = vectors.query_CD, vectors.key_ND
        if self.encoding is not None:
            query = self.encoding.target(query, vectors.group_C)
        if self.query is not None and self.key is not None:
            query, key = self.query(query), vectors.known_or("key", self.key)
        return AttentionVectors(query * self.scale(query.shape[1]), key, vectors.group_C, vectors.cross_N)

    def scale(self, width: int) -> float:
        """What products of queries, `width` wide over all heads, are multiplied by."""
        return product_scale(width, self.heads, self.temperature)

    def of_behaviors(self, key_ND: Tensor) -> dict[str, Tensor]:
        return {} if self.query is None or self.key is None else {"key": self.key(key_ND)}

    def over_windows(self, vectors: AttentionVectors, windows: Windows) -> Tensor:
        """One batched product a head for all windows: the cost follows C x L, whatever a block holds."""
        with in_single_precision(vectors.key_ND.device):
            vectors, slots = vectors.in_full(), windows.slots
            bias = self._window_bias(vectors, windows)[:, None, :]
            beside = self._target_bias(vectors, windows)
            width = vectors.query_CD.shape[1] // self.heads
            scores = []
            for head in range(self.heads):
                part = slice(head * width, (head + 1) * width)
                key_WXD = rows_at(vectors.key_ND[:, part], windows.index)
                query_WSD = slots.spread(vectors.query_CD[:, part])
                score = slots.collect(torch.baddbmm(bias, query_WSD, key_WXD.transpose(1, 2)))
                scores.append(score if beside is None else score + beside)
            return scores[0][:, None] if self.heads == 1 else torch.stack(scores, dim=1)

    def of_kept(self, vectors: AttentionVectors, kept: Selection) -> Tensor:
        with in_single_precision(vectors.key_ND.device):
            vectors = vectors.in_full()
            bias = self._kept_bias(vectors, kept)
            if self.encoding is not None:
                bias = bias + self.encoding.scores(vectors.query_CD, kept.marks, vectors.group_C)
            if is_traced() and not vectors.key_ND.shape[1]:
                # Time alone is scored, and portable runtimes reshape no rows of nothing.
                return bias[:, None]
            if self.heads == 1:
                return (dots(vectors.query_CD, vectors.key_ND, kept.index) + bias)[:, None]
            # Heads are candidates and rows of their own, a head's width wide.
            each = torch.arange(self.heads, device=kept.index.device)
            index_CHK = kept.index[:, None] * self.heads + each[:, None]
            query, key = (
                part.unflatten(1, (self.heads, part.shape[1] // self.heads)).flatten(0, 1)
                for part in (vectors.query_CD, vectors.key_ND)
            )
            score_CHK = dots(query, key, index_CHK.flatten(0, 1)).view(index_CHK.shape)
            return score_CHK + bias[:, None]


def product_scale(width: int, heads: int, temperature: float) -> float:
    """What the inner products of `heads` heads, `width` wide together, are multiplied by."""
    return float(max(width // heads, 1) ** -0.5 / temperature)


class MlpScorer(Scorer):
    """DIN's learned attention: Linear(4D -> hidden), PReLU, Linear(hidden -> 1) on [q; k; q - k; q * k], / D.

    The first layer is applied in three parts, (A + C) q, (B - C) k and D (q * k), so that nothing of width 4D
    is built for each pair (a test compares with the plain form). The division by D and the softmax that
    follows are those of DARE's code; DIN's own weights are neither scaled nor normalised.
    """

    def __init__(self, width: int, hidden: int, bias: TimeBias | None) -> None:
        super().__init__(bias)
        self.first = nn.Linear(4 * width, hidden)
        self.slope = nn.PReLU()
        self.last = nn.Linear(hidden, 1)
        self.width = width

    def over_windows(self, vectors: AttentionVectors, windows: Windows) -> Tensor:
        """A few windows at a time, as many as the `Tiling` of the device has room for.

        Keys are multiplied once for all candidates of their window. Autocast halves the layers, not what is
        added to their scores.
        """
        tiling = tiling_of(vectors.key_ND.device)
        if is_traced():
            # How many windows there are is not known, so none are put off.
            groups = [slice(None)]
        else:
            cells = windows.index.shape[1] * self.first.out_features
            groups = tiling.groups(windows.host_counts, cells)
        score_of: Callable[..., Tensor] = self._side_by_side
        if torch.is_grad_enabled() and (tiling.always_again or len(groups) > 1):
            # Once more in the backward pass, which then keeps no [C, X, E].
            score_of = partial(checkpoint, score_of, use_reentrant=False, preserve_rng_state=False)
        parts = [score_of(*each) for each in _cut(vectors, windows, groups)]
        if not parts:
            parts.append(vectors.query_CD.new_zeros(0, windows.index.shape[1]))
        score = full(parts[0] if len(parts) == 1 else torch.cat(parts))
        with in_single_precision(score.device):
            score = score + rows_at(self._window_bias(vectors, windows), windows.of_candidate)
            bias = self._target_bias(vectors, windows)
        return (score if bias is None else score + bias)[:, None]

    def _side_by_side(self, query_CD: Tensor, key_WXD: Tensor, slots: Slots) -> Tensor:
        # The first layer with the query folded into its weights: a bias [C, E] and a map of a key [C, D, E].
        query, key, difference, product = self.first.weight.split(self.width, dim=1)
        of_query_CE = F.linear(query_CD, query + difference, self.first.bias)
        folded_CDE = (key - difference).T + query_CD.unsqueeze(2) * product.T
        folded = slots.spread(folded_CDE).transpose(1, 2).flatten(2)
        bias = slots.spread(of_query_CE).flatten(1)[:, None]
        hidden_WXSE = torch.baddbmm(bias, key_WXD, folded).unflatten(2, (slots.shape[1], -1))
        score_WXS = self.last(self.slope(hidden_WXSE)).squeeze(3) / self.width
        return slots.collect(score_WXS.transpose(1, 2))

    def of_kept(self, vectors: AttentionVectors, kept: Selection) -> Tensor:
        # As if what a candidate keeps were a window of its own.
        each = torch.arange(kept.index.shape[0], device=kept.index.device)
        key_CKD = rows_at(vectors.key_ND, kept.index)
        slots = Slots(each, each.shape[0], one_each(each.shape[0]))
        score_CK = full(self._side_by_side(vectors.query_CD, key_CKD, slots))
        with in_single_precision(score_CK.device):
            return (score_CK + self._kept_bias(vectors, kept))[:, None]


def _cut(
    vectors: AttentionVectors, windows: Windows, groups: Sequence[slice]
) -> Iterator[tuple[Tensor, Tensor, Slots]]:
    """Queries, keys and slots of each group of windows."""
    if len(groups) == 1:
        yield vectors.query_CD, rows_at(vectors.key_ND, windows.index), windows.slots
        return
    counts = windows.host_counts
    held = [sum(counts[each]) for each in groups]
    query, window = vectors.query_CD.split(held), windows.of_candidate.split(held)
    sizes = [each.stop - each.start for each in groups]
    key = rows_at(vectors.key_ND, windows.index).split(sizes)
    for place, each in enumerate(groups):
        slots = Slots(window[place] - each.start, sizes[place], counts[each])
        yield query[place], key[place], slots


def twin_projections(width: int, heads: int, head_dim: int) -> tuple[nn.Linear, nn.Linear]:
    """Bias-free maps of query and key, [width] -> [heads * head_dim]: one map at first, two once trained.

    On average the score of each head begins as that of the vectors before the maps, <q, k> / sqrt(width): of
    orthogonal maps alone it would be smaller by the number of heads, and of what a head has no room for.
    """
    out = heads * head_dim
    query, key = nn.Linear(width, out, bias=False), nn.Linear(width, out, bias=False)
    room = min(width, out) / width
    begin_alike(query, key, (heads / room * (head_dim / width) ** 0.5) ** 0.5)
    return query, key


def begin_alike(one: nn.Module, other: nn.Module, gain: float = 1.0) -> None:
    """Have the linear maps of two modules of equal build begin as the same orthogonal maps, times `gain`.

    From two independent draws the first inner products would be noise; from one they are those of the vectors
    before the maps, as far as there is room for them.
    """
    with torch.no_grad():
        for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
            nn.init.orthogonal_(mine, gain)
            theirs.copy_(mine)


class FeatureProjection(nn.Module):
    """One bias-free linear map of its own for each feature's part of the vector (DARE's `TWIN w/ proj.`)."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = list(widths)
        self.maps = nn.ModuleList(nn.Linear(width, width, bias=False) for width in widths)

    def forward(self, vector_ND: Tensor) -> Tensor:
        parts = vector_ND.split(self.widths, dim=1)
        return torch.cat([each(part) for each, part in zip(self.maps, parts, strict=True)], dim=1)


def build_scorer(settings: BranchKeys, sizes: BranchSizes) -> Scorer:
    """The scorer of both stages of a branch."""
    bias, encoding, of_values = sizes.score_time()
    if settings.score == "mlp":
        return MlpScorer(sizes.width, settings.score_hidden, bias)
    query: nn.Module | None = None
    key: nn.Module | None = None
    if settings.projection == "feature":
        query, key = FeatureProjection(sizes.attended), FeatureProjection(sizes.attended)
        begin_alike(query, key)
    elif settings.projection == "heads":
        query, key = twin_projections(sizes.width, settings.heads, settings.head_dim)
    return DotScorer(query, key, settings.heads, bias, encoding, settings.temperature, borrows=of_values)


def softmax_weights(score: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the kept behaviors only, last dimension; all zero where nothing was kept."""
    score = score.masked_fill(~mask, -1e30)
    return score.softmax(dim=-1) * mask


def sigmoid_weights(score: Tensor, mask: Tensor) -> Tensor:
    """Pointwise, unnormalised weights: how often counts, not only which. Zero for padding."""
    return score.masked_fill(~mask, 0.0).sigmoid() * mask


WEIGHTS = {"softmax": softmax_weights, "sigmoid": sigmoid_weights}
