"""The log that most tests of serving ask of, and a snapshot of it: fixtures of folders of such tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.logs import Shape, enrich, random_rows, write_log
from tests.helpers.models import preset
from tests.helpers.serving import snapshot_of
from trainer.snapshot import Snapshot

ROWS = enrich(random_rows(4, Shape(users=10)), 5)
WITH_CONTEXT = ("model.roles.context=context", "groups.context.dim=8")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that a log may have; one split."""
    return write_log(tmp_path_factory.mktemp("served") / "log", {"train": ROWS}, rich=True)


@pytest.fixture(scope="module")
def snapshot(log: Path) -> Snapshot:
    """A model that reads the request's context too. A test that spoils it makes its own."""
    return snapshot_of(preset("dare", log, *WITH_CONTEXT))
