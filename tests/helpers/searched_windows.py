"""Windows drawn for the kernel of stage one, and what must hold of what it keeps; on any device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.models import drawing
from trainer.model.retrieve.window_search import best_columns, fits, plain_best_columns
from trainer.model.time import Marks
from trainer.model.windows import Windows


@dataclass(frozen=True)
class Searched:
    """What a search is given."""

    query: Tensor
    key: Tensor
    windows: Windows
    bias: Tensor | None
    k: int

    def on(self, device: torch.device) -> Searched:
        """The same on a device."""
        windows = self.windows
        mask, index, of_candidate = (
            part.to(device) for part in (windows.mask, windows.index, windows.of_candidate)
        )
        lengths = None if windows.lengths is None else windows.lengths.to(device)
        marks = windows.marks.each(lambda part: part.to(device))
        there = Windows(index, mask, marks, None, of_candidate, lengths)
        bias = None if self.bias is None else self.bias.to(device)
        return Searched(self.query.to(device), self.key.to(device), there, bias, self.k)


@st.composite
def searched(draw: st.DrawFn) -> Searched:
    """Stretches or any rows; empty windows, windows of no candidate; many equal scores, NaN and -inf."""
    rng = drawing(draw(st.integers(0, 10_000)))
    windows, candidates = draw(st.integers(1, 3)), draw(st.integers(0, 7))
    width = draw(st.sampled_from([1, 5, 40, 256, 300, 1024, 1200, 2100]))
    dim, rows = draw(st.sampled_from([4, 12, 16, 36, 64])), width + 5
    length = torch.randint(0, width + 1, (windows,), generator=rng)
    if draw(st.booleans()):
        length[0] = width
    end = length + (torch.rand(windows, generator=rng) * (rows - length + 1)).long()
    step = torch.arange(width)
    mask, stretch = step < length[:, None], draw(st.booleans())
    index = torch.where(mask, end[:, None] - 1 - step, 0)
    if not stretch:
        mask = mask & (torch.rand(mask.shape, generator=rng) < draw(st.sampled_from([0.1, 0.9])))
        index = torch.randint(0, rows, mask.shape, generator=rng) * mask
    zero = torch.zeros_like(index)
    of_candidate = torch.randint(0, windows, (candidates,), generator=rng).sort().values
    made = Windows(index, mask, Marks(zero, zero, zero), None, of_candidate, length if stretch else None)
    # Few whole numbers: sums are exact in any order, and many are equal.
    most = draw(st.sampled_from([1, 3, 1000]))
    query, key = (torch.randint(-most, most + 1, (n, dim), generator=rng).float() for n in (candidates, rows))
    bias = None
    if draw(st.booleans()):
        bias = torch.randint(-2, 3, mask.shape, generator=rng).float().masked_fill(~mask, -torch.inf)
    elif draw(st.booleans()):
        # Scores with no float between them, high ones rare.
        key[:, 0] = 1 + (torch.rand(rows, generator=rng) ** 8 * 12).floor() * 2.0**-23
        query[:, 0] = torch.randint(0, 2, (candidates,), generator=rng) * 2.0 - 1
        query[:, 1:] = 0.0
    if draw(st.booleans()):
        key[torch.rand(rows, generator=rng) < 0.05] = draw(st.sampled_from([torch.nan, torch.inf]))
    return Searched(query, key, made, bias, draw(st.sampled_from([1, 3, 20, 33, 200])))


def check(given_to: Searched) -> None:
    """The kernel keeps what a ranking of all scores keeps."""
    assert fits(given_to.query, given_to.key, given_to.windows, given_to.k)
    column, mask = best_columns(given_to.query, given_to.key, given_to.windows, given_to.bias, given_to.k)
    score = all_scores(given_to)
    assert column.shape == mask.shape == (score.shape[0], min(given_to.k, score.shape[1]))
    assert column.dtype == torch.int64 and mask.dtype == torch.bool
    for c, row in enumerate(score.tolist()):
        wanted = slow(row, given_to.k)
        assert column[c][mask[c]].tolist() == wanted
        assert mask[c].tolist() == [j < len(wanted) for j in range(mask.shape[1])]
        assert (column[c][~mask[c]] == score.shape[1] - 1).all()


def all_scores(given_to: Searched) -> Tensor:
    """[C, X], pair by pair in double precision; NaN and inf are the best alike."""
    windows = given_to.windows
    rows = windows.index[windows.of_candidate]
    score = (given_to.key.double()[rows] * given_to.query.double()[:, None]).sum(2)
    if given_to.bias is not None:
        score = score + given_to.bias[windows.of_candidate]
    score = score.masked_fill(~windows.mask[windows.of_candidate], -torch.inf)
    return score.nan_to_num(torch.inf, torch.inf, -torch.inf)


def slow(row: list[float], k: int) -> list[int]:
    real = [x for x, value in enumerate(row) if value != -torch.inf]
    return sorted(sorted(real, key=lambda x: (-row[x], x))[:k])


@settings(max_examples=20, deadline=None, database=None, phases=[Phase.generate])
@seed(0)
@given(searched())
def check_drawn(given_to: Searched) -> None:
    check(given_to)


def check_plain(given_to: Searched) -> None:
    """Of scores that are no whole numbers, the plain form keeps the same; equal behaviors stay in order."""
    found, plain = (
        form(given_to.query, given_to.key, given_to.windows, given_to.bias, given_to.k)
        for form in (best_columns, plain_best_columns)
    )
    for mine, theirs in zip(found, plain, strict=True):
        assert torch.equal(mine, theirs)


def drawn_long(stretch: bool, dim: int = 32, width: int = 2500, candidates: int = 5) -> Searched:
    """Two windows of several spans, one of which has more candidates than a program takes."""
    rng = drawing(5)
    rows = width + 9
    length = torch.tensor([width, width - 100])
    step = torch.arange(width)
    mask = step < length[:, None]
    index = torch.where(mask, rows - 1 - step - torch.tensor([[0], [7]]), 0)
    of_candidate = torch.tensor([0] * (candidates - 1) + [1])
    zero = torch.zeros_like(index)
    made = Windows(index, mask, Marks(zero, zero, zero), None, of_candidate, length)
    query, key = (torch.randn(n, dim, generator=rng) for n in (candidates, rows))
    bias = torch.randn(mask.shape, generator=rng).masked_fill(~mask, -torch.inf)
    return Searched(query, key, made if stretch else replace(made, lengths=None), bias, 20)
