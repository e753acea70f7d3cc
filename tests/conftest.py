"""Property tests draw the same examples every time, so that a failure here is a failure everywhere.

`pytest --hypothesis-profile=explore` draws new ones.
"""

from __future__ import annotations

import gc
from functools import cache

import pytest
from hypothesis import settings

# Mark -> GPUs that a test with it needs.
NEEDS_GPUS = {"gpu": 1, "gpu2": 2}

settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", derandomize=False)
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


def pytest_collection_finish() -> None:
    """What all test files have imported stays, so no collector needs to walk it again."""
    gc.collect()
    gc.freeze()
