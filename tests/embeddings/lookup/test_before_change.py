"""Rows kept at their first lookup are what whole copies of the tables would give, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.lookup.before_change import Rows, combined, combined_rows
from tests.helpers.launching import launched


def test_two_ranks_keep_restore_and_merge_what_whole_copies_do(tmp_path: Path) -> None:
    """By every sharding and row optimizer, with ids that repeat and ranks without ids."""
    done = launched("tests.programs.forked_rows", str(tmp_path), ranks=2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for rank in (0, 1):
        report = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert len(report) == 11 and {case: found for case, found in report.items() if found} == {}


shares_of = st.lists(st.floats(0, 1), min_size=2, max_size=4).filter(lambda each: sum(each) > 0.01)


@settings(deadline=None, max_examples=30)
@given(
    st.data(), shares_of, st.sampled_from([torch.float32, torch.float16, torch.float64]), st.integers(0, 99)
)
def test_rows_merge_as_whole_tables_do(
    data: st.DataObject, raw: list[float], dtype: torch.dtype, seed: int
) -> None:
    """Deltas of touched rows and whole tables give the same bits; untouched rows stay."""
    random = torch.Generator().manual_seed(seed)
    base = torch.randn(20, 3, generator=random, dtype=torch.float64).to(dtype)
    touched = torch.tensor(sorted(data.draw(st.sets(st.integers(0, 19), min_size=1))))
    shares = [each / sum(raw) for each in raw]
    tables, rows = [], []
    for _ in shares:
        own = torch.tensor(sorted(data.draw(st.sets(st.sampled_from(touched.tolist())))), dtype=torch.int64)
        table = base.clone()
        table[own] += torch.randn(len(own), 3, generator=random, dtype=torch.float64).to(dtype)
        tables.append(table)
        rows.append(Rows(own, (table[own],)))
    merged = combined_rows(Rows(touched, (base[touched],)), rows, shares)
    whole = base.clone()
    whole[touched] = merged.parts[0]
    assert torch.equal(whole, combined(tables, shares))
    exact = sum(share * table.double() for share, table in zip(shares, tables, strict=True))
    assert torch.allclose(whole.double(), exact, atol={torch.float16: 4e-3}.get(dtype, 1e-6))


@settings(deadline=None, max_examples=30)
@given(shares_of, st.integers(0, 99), st.sampled_from([torch.float32, torch.float16, torch.float64]))
def test_equal_branches_and_one_branch_alone_stay_to_the_bit(
    raw: list[float], seed: int, dtype: torch.dtype
) -> None:
    random = torch.Generator().manual_seed(seed)
    values = [torch.randn(50, generator=random).to(dtype) for _ in raw]
    shares = [each / sum(raw) for each in raw]
    assert torch.equal(combined([values[0]] * len(raw), shares), values[0])
    for place, value in enumerate(values):
        alone = [float(other == place) for other in range(len(raw))]
        assert torch.equal(combined(values, alone), value)
    # Sums of squares stay what they are.
    assert (combined([value.square() for value in values], shares) >= 0).all()
