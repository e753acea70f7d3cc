"""Models here are so small that a second thread only waits, and takes a processor for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.harness.timing import one_thread


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield
