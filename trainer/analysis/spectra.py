"""How many of its dimensions a table uses: its singular values, beside those of a random table.

Rows that never had a gradient still hold their first weights, which are random: a table of many of them looks
healthy whatever was learned. So the rows that had one are measured by themselves, and are compared with a
random table of as many rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from embeddings.first_rows import FirstWeights, initial_rows_, table_seed
from trainer.quality.singular_values import Doubles, SingularValues, abundance, rank_me

# Random tables of more rows are not drawn row by row.
_DRAWN_ROWS = 1 << 16


@dataclass(frozen=True)
class Spectrum:
    """The singular values of `rows` rows of `dim` floats: min(rows, dim) of them, descending."""

    rows: int
    dim: int
    values: Doubles

    @cached_property
    def abundance(self) -> float:
        return abundance(self.values)

    @cached_property
    def rank_me(self) -> float:
        return rank_me(self.values)

    @property
    def by_largest(self) -> Doubles:
        """The values by the largest of them; zeros stay."""
        largest = self.values.max(initial=0.0)
        return self.values / largest if largest > 0 else self.values

    @property
    def largest_share(self) -> float:
        """Which part of the sum of squares lies in the largest direction; NaN for a table of zeros."""
        squares = self.values**2
        return float(squares.max(initial=0.0) / squares.sum()) if squares.any() else float("nan")


@dataclass(frozen=True)
class TableSpectrum:
    """What is known of one table.

    Attributes:
        whole: of all rows; trained: of those that ever had a gradient, or of all where nobody can tell.
        random: of a random table of as many rows as `trained`.
        tells: whether the optimizer can tell; broken: rows with NaN or infinity, which are in none of these.
    """

    whole: Spectrum
    trained: Spectrum
    random: Spectrum
    tells: bool
    broken: int

    @property
    def abundance_share(self) -> float:
        """Information abundance as a share of that of the random table; NaN where no row had a gradient."""
        return _share(self.trained.abundance, self.random.abundance)

    @property
    def rank_me_share(self) -> float:
        """The same of RankMe."""
        return _share(self.trained.rank_me, self.random.rank_me)


def table_spectrum(
    bands: Iterable[tuple[Tensor, Tensor | None]], dim: int, first: FirstWeights, seed: int
) -> TableSpectrum:
    """Measure a table in one pass.

    Args:
        bands: all its rows [n, dim], some at a time, each with which of them ever had a gradient (bool [n],
            None where that is not known).
        first: the distribution of the table's first weights, which is that of the random table.
        seed: of the random table, see `embeddings.first_rows.table_seed`.
    """
    trained, rest, tells = SingularValues(dim), SingularValues(dim), True
    with _one_thread():
        for rows, updated in bands:
            if updated is None or bool(updated.all()):
                tells = tells and updated is not None
                trained.add(rows)
            else:
                trained.add(rows[updated])
                rest.add(rows[~updated])
    of_trained = Spectrum(trained.rows, dim, trained.values())
    broken = trained.broken + rest.broken
    trained.merge([rest.triangle])
    whole = Spectrum(trained.rows + rest.rows, dim, trained.values())
    random = random_spectrum(of_trained.rows, dim, first, seed)
    return TableSpectrum(whole, of_trained, random, tells, broken)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Factorisations are so small that a second thread saves a fifth of the time, and on a machine with other
    work it waits most of it: there it takes twenty times the processor time.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def random_spectrum(rows: int, dim: int, first: FirstWeights, seed: int) -> Spectrum:
    """Of a table whose rows are first weights.

    Of many rows, R of the QR factorisation is drawn instead, by Bartlett's decomposition: above the diagonal
    there are normal numbers, on it roots of chi-squared ones with rows, rows - 1, ... degrees of freedom. For
    normal weights that is exact; for uniform ones the difference is of the order of 1 / rows.
    """
    if rows <= _DRAWN_ROWS:
        found, drawn = SingularValues(dim), torch.empty(rows, dim)
        found.add(initial_rows_(drawn, seed, first))
        return Spectrum(rows, dim, found.values())
    rng = np.random.default_rng(seed)
    triangle = np.triu(rng.normal(size=(dim, dim)), 1)
    triangle[np.diag_indices(dim)] = np.sqrt(rng.chisquare(rows - np.arange(dim)))
    deviation = first.scale if first.kind == "normal" else first.scale / 3**0.5
    values = np.linalg.svd(triangle * deviation, compute_uv=False)
    return Spectrum(rows, dim, values.astype(np.float64))


def random_seed(seed: int, table: str) -> int:
    """That of the random table beside a table, which shares no number with its first weights."""
    return table_seed(seed, f"random table beside {table}")


def _share(value: float, of: float) -> float:
    return value / of if of > 0 else float("nan")
