"""Property tests draw the same examples every time, so that a failure here is a failure everywhere.

`pytest --hypothesis-profile=explore` draws new ones.
"""

from __future__ import annotations

import gc

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that workers that share files out end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """What all test files have imported stays, so no collector needs to walk it again."""
    gc.collect()
    gc.freeze()
