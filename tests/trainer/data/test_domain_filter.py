"""A reader of some domains reads what it would of a log in which there is nothing of the others."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from embeddings.errors import ConfigError
from tests.helpers.logs import CONTEXT, IN_PART, RICH, Row, enrich, observed_in_part, random_rows, write_log
from tests.trainer.data.test_reader import config
from trainer.data.batch import RequestBatch
from trainer.data.cursor import Cursor
from trainer.data.reader import SequenceLogReader, Step

# A domain of candidates, and one of requests.
DOMAINS = {"band": RICH["band"].rows, "city": CONTEXT["city"].rows}
PER_CANDIDATE = ("label_", "weight", "numeric_", "candidate_")


def without_others(row: Row, feature: str, domains: set[int]) -> Row:
    """The same user without candidates of other domains, and without requests that have no candidate left."""
    kept: list[list[int]] = []
    for request, count in enumerate(row["request_num_candidates"]):
        if feature == "city":
            kept.append(list(range(count)) if row["context_city"][request] in domains else [])
        else:
            kept.append([c for c, band in enumerate(row["candidate_band"][request]) if band in domains])
    left = [request for request, candidates in enumerate(kept) if candidates]
    new = dict(row)
    for name, values in row.items():
        if name.startswith(PER_CANDIDATE):
            new[name] = [[values[request][c] for c in kept[request]] for request in left]
        elif name.startswith(("request_", "context_")):
            new[name] = [values[request] for request in left]
    new["request_num_candidates"] = [len(kept[request]) for request in left]
    return {**new, "num_requests": len(left), "num_candidates": sum(new["request_num_candidates"])}


def rich_rows(seed: int) -> list[Row]:
    return observed_in_part(enrich(random_rows(seed), seed), seed)


def reader(
    log: Path, rank: int = 0, world_size: int = 1, limit: int = 0, **changes: Any
) -> SequenceLogReader:
    return SequenceLogReader(
        config(log, **changes), "train", None, rank=rank, world_size=world_size, seed=5, limit=limit
    )


def parts(value: Any) -> list[Any]:
    """Everything that a batch holds, as plain values; NaN as None, so that it equals itself."""
    found: list[Any] = []
    for field in fields(value):
        part = getattr(value, field.name)
        if isinstance(part, torch.Tensor):
            found.append([None if math.isnan(number) else number for number in part.flatten().tolist()])
        elif field.name in ("features", "context"):
            found += [part.keys(), part.values().tolist(), part.lengths().tolist()]
        elif isinstance(value, RequestBatch):
            found.append(part)
    return found


def as_values(steps: list[Step]) -> list[Any]:
    return [(parts(s.batch), s.counted, s.shares, s.last, (s.after.epoch, s.after.blocks)) for s in steps]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    feature=st.sampled_from(sorted(DOMAINS)),
    domains=st.sets(st.integers(0, 4), min_size=1, max_size=3),
    world_size=st.sampled_from([1, 2]),
    per_block=st.integers(1, 5),
    limit=st.sampled_from([0, 0, 20]),
)
def test_filtered_is_the_log_without_the_others(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    feature: str,
    domains: set[int],
    world_size: int,
    per_block: int,
    limit: int,
) -> None:
    folder, rows = tmp_path_factory.mktemp("logs"), rich_rows(seed)
    left = [without_others(row, feature, domains) for row in rows]
    assume(all(any(without_others(row, feature, {one})["num_requests"] for row in rows) for one in domains))
    changes = {"domain": feature, "requests_per_block": per_block, "workers": seed % 2}
    whole = write_log(folder / "whole", {"train": rows}, rich=True, **IN_PART)
    other = write_log(folder / "other", {"train": left}, rich=True, **IN_PART)
    for rank in range(world_size):
        filtered = reader(whole, rank, world_size, limit, **changes)
        # The counts of one rank alone would be those of its part.
        filtered.__dict__["by_domain"] = reader(whole, **changes).by_domain
        filtered = filtered.of_domains(domains)
        slow = reader(other, rank, world_size, limit, **changes)
        assert filtered.candidates == slow.candidates and filtered.sample == slow.sample
        found = as_values(list(filtered.steps()))
        assert found == as_values(list(slow.steps()))
        # From the middle on, too.
        middle = list(filtered.steps())[len(found) // 2].after
        assert as_values(list(filtered.steps(middle))) == found[len(found) // 2 + 1 :]


def test_counts_are_those_of_the_rows_and_ranks_add_them_up(tmp_path: Path) -> None:
    rows = rich_rows(3)
    log = write_log(tmp_path / "log", {"train": rows}, rich=True, **IN_PART)
    bands = Counter(band for row in rows for request in row["candidate_band"] for band in request)
    cities: Counter[int] = Counter()
    for row in rows:
        for city, count in zip(row["context_city"], row["request_num_candidates"], strict=True):
            cities[city] += count
    for feature, expected in (("band", bands), ("city", cities)):
        of_ranks = [reader(log, rank, 3, domain=feature).by_domain for rank in range(3)]
        added = sum((Counter(counts) for counts in of_ranks), Counter())
        assert added == expected == reader(log, domain=feature).by_domain
        assert list(reader(log, domain=feature).by_domain) == sorted(expected)


def test_a_position_belongs_to_its_domains(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", {"train": rich_rows(1)}, rich=True, **IN_PART)
    every = reader(log, domain="band")
    one, same, two = every.of_domains([1]), every.of_domains([2, 1]).of_domains([1, 1]), every.of_domains([2])
    assert one.order == same.order and one.plan == same.plan
    assert len({each.order for each in (every, one, two)}) == 3
    assert len({each.plan for each in (every, one, two)}) == 3


def test_passes_before_a_domains_own_do_not_change_its_order(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", {"train": rich_rows(1)}, rich=True, **IN_PART)
    every = reader(log, domain="band")

    def batches(first_epoch: int, epoch: int) -> list[Any]:
        steps = every.of_domains([0, 1], first_epoch).steps(Cursor(epoch=first_epoch + epoch))
        return [parts(step.batch) for step in steps]

    assert batches(0, 1) == batches(4, 1) != batches(4, 0)
    assert every.of_domains([1], 1).plan != every.of_domains([1]).plan


def test_unknown_domains_are_refused(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", {"train": rich_rows(1)}, rich=True, **IN_PART)
    with pytest.raises(ConfigError, match=r"no candidate of the split train has band = 7; there are those"):
        reader(log, domain="band").of_domains([1, 7])
    with pytest.raises(ConfigError, match="candidates have no domain"):
        reader(log).of_domains([1])
