"""Imports without the collector."""

from __future__ import annotations

import gc
import subprocess
import sys
from types import ModuleType

import pytest

from launch.quick_imports import quick_imports

FRESH = """
import gc
from launch.quick_imports import quick_imports
with quick_imports():
    assert not gc.isenabled()
    kept = [[] for _ in range(100)]
assert gc.isenabled() and gc.get_freeze_count() >= 100
"""


def test_the_collector_rests_for_the_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", sys.modules.get("torch", ModuleType("torch")))
    frozen = gc.get_freeze_count()
    with pytest.raises(ImportError), quick_imports():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen, "other objects than imports may die later"
    gc.disable()
    try:
        with quick_imports():
            pass
        assert not gc.isenabled(), "as it was"
    finally:
        gc.enable()


def test_what_a_fresh_process_imports_is_never_walked() -> None:
    assert subprocess.run([sys.executable, "-c", FRESH], check=False).returncode == 0
