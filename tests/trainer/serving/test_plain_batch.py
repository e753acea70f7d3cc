"""What is made in one go is the batch that training's collate makes, or nothing."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.lookup.jagged import OneIdBags, select_bags
from trainer.config.sections import DataConfig
from trainer.config.tasks import resolve_tasks
from trainer.data.domain import DomainColumn
from trainer.data.labels import TaskLabels
from trainer.data.living_ids import looked_up, with_rows
from trainer.data.rows import Columns
from trainer.log.bags import Bags
from trainer.log.schema import FeatureInfo
from trainer.serving.any_batch import any_batch
from trainer.serving.plain_batch import PlainBatches
from trainer.serving.request import History, Request

ROWS = 30


def drawn_request(rng: np.random.Generator, columns: Columns) -> Request:
    """Times repeat, and some behaviors are not older than the request."""
    n, count = int(rng.integers(0, 9)), int(rng.integers(1, 5))

    def bags(names: list[str], size: int) -> dict[str, Bags]:
        return {name: Bags(rng.integers(0, ROWS, size)) for name in names}

    return Request(
        int(rng.integers(0, 5)),
        History(np.sort(rng.integers(0, 12, n)), bags(list(columns.features), n)),
        int(rng.integers(0, 14)),
        bags(list(columns.features), count),
        count,
        bags(list(columns.context), 1),
        {name: rng.random(count, dtype=np.float32) for name in columns.numeric},
    )


def drawn_columns(features: int, context: int, domain: str) -> Columns:
    def named(kind: str, count: int) -> dict[str, FeatureInfo]:
        return {f"{kind}{place}": FeatureInfo(rows=ROWS) for place in range(count)}

    of_requests = domain == "context0"
    return Columns(
        named("feature", features),
        TaskLabels(resolve_tasks({}, ["click", "like"]), ()),
        named("context", context),
        numeric=["price", "age"][: features - 1],
        domain=DomainColumn(domain, of_requests, ROWS) if domain else None,
    )


def assert_equal(found: object, expected: object, name: str) -> None:
    if isinstance(found, OneIdBags):
        kjt = expected
        assert found.keys() == kjt.keys() and found.stride() == kjt.stride()  # type: ignore[attr-defined]
        assert found.length_per_key() == kjt.length_per_key()  # type: ignore[attr-defined]
        for part in ("values", "lengths", "offsets"):
            assert torch.equal(getattr(found, part)(), getattr(expected, part)()), name
        for key in found.keys():  # noqa: SIM118 - no dict
            for part in ("values", "lengths", "offsets"):
                own, other = (getattr(kjt[key], part)() for kjt in (found, expected))  # type: ignore[index]
                assert torch.equal(own, other), f"{name} {key} {part}"
    elif isinstance(found, torch.Tensor):
        assert isinstance(expected, torch.Tensor)
        assert found.dtype == expected.dtype and torch.equal(found, expected), name
    else:
        assert found == expected, name


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    features=st.integers(1, 3),
    context=st.integers(0, 2),
    requests=st.integers(1, 3),
    delay=st.sampled_from([0, 3]),
    domain=st.sampled_from(["", "feature0", "context0"]),
)
def test_it_is_the_batch_of_collate(
    seed: int, features: int, context: int, requests: int, delay: int, domain: str
) -> None:
    rng = np.random.default_rng(seed)
    columns = drawn_columns(features, context, domain if context or domain != "context0" else "")
    data = DataConfig.model_validate({"history_length": 5, "ingestion_delay": delay})
    drawn = [drawn_request(rng, columns) for _ in range(requests)]
    found, expected = PlainBatches(columns, data).of(drawn), any_batch(drawn, columns, data)
    assert found is not None and found.host_sizes == expected.host_sizes
    for field in fields(found):
        assert_equal(getattr(found, field.name), getattr(expected, field.name), field.name)
    # And so are bags selected from it, and rows in the place of its ids.
    chosen = torch.from_numpy(rng.integers(0, found.features.stride(), 7))
    assert_equal(select_bags(found.features, chosen), select_bags(expected.features, chosen, True), "chosen")
    rows = {name: rng.integers(0, ROWS, found.features.stride()) for name in ("feature0", "feature0@group")}
    assert_equal(with_rows(found, rows).features, with_rows(expected, rows).features, "rows")
    assert looked_up(found, {}) is found


@pytest.mark.parametrize("lacking", ["history", "candidates", "context", "several", "searched"])
def test_requests_that_are_not_plain_are_left_to_collate(lacking: str) -> None:
    columns = drawn_columns(2, 1, "")
    request = drawn_request(np.random.default_rng(0), columns)
    data = DataConfig.model_validate({"history_length": 5})
    if lacking == "history":
        history = replace(request.history, features={"feature0": request.history.features["feature0"]})
        request = replace(request, history=history)
    elif lacking == "several":
        several = Bags.of_lengths(np.arange(2 * request.count), [2] * request.count)
        request = replace(request, candidates=request.candidates | {"feature1": several})
    elif lacking == "searched":
        data = data.model_copy(update={"search": data.search.model_copy(update={"levels": ("feature0",)})})
    else:
        request = replace(request, **{lacking: {}})
    plain = drawn_request(np.random.default_rng(1), columns)
    assert PlainBatches(columns, data).of([plain, request]) is None
