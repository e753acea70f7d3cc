"""Property tests draw the same examples every time, so that a failure here is a failure everywhere.

`pytest --hypothesis-profile=explore` draws new ones.
"""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterator
from functools import cache
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

import tests.programs.without_syncs  # noqa: F401, for what its import does

if TYPE_CHECKING:
    from tests.helpers.object_store import Store

# Mark -> GPUs that a test with it needs.
NEEDS_GPUS = {"gpu": 1, "gpu2": 2}

# How long an example takes is the machine's affair.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, deadline=None)
settings.load_profile("repeatable")


@cache
def gpus() -> tuple[int, str]:
    """The GPUs that tests can use, and what stands in the way of more."""
    from trainer.ranks.device import observe, obstacle

    machine = observe()
    problem = obstacle(machine)
    seen = len(machine.gpus)
    return (seen, f"torch sees {seen}") if problem is None else (0, problem[0])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need GPUs are skipped where there are none, or too few. Files with slow tests come first,
    so that workers that share files out end at about the same time.
    """
    for name, count in NEEDS_GPUS.items():
        for item in items:
            if item.get_closest_marker(name) and gpus()[0] < count:
                item.add_marker(pytest.mark.skip(reason=f"it needs {count} GPU(s), {gpus()[1]}"))
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """No collector walks what test files import: not meanwhile, and not afterwards, since it all stays."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        # What tests make is gone soon; a look for cycles after every 700 objects costs a tenth of their time.
        gc.set_threshold(20_000, 10, 10)
        gc.enable()


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    """An object store for the tests of a file."""
    from tests.helpers.object_store import served

    pytest.importorskip("s3fs", reason="needs requirements/s3.txt")
    pytest.importorskip("moto", reason="needs requirements/dev.txt")
    with served() as store:
        yield store


@pytest.fixture
def store(server: Store) -> Iterator[Store]:
    """Without faults and with no more attempts than a test has time for."""
    from trainer.storage.s3 import ObjectStore

    ObjectStore.clear_instance_cache()
    server.faults()
    server.seen()
    yield server
    server.faults()
