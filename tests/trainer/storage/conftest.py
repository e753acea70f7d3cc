"""The bucket of the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.object_store import Store, served


@pytest.fixture(scope="session")
def server() -> Iterator[Store]:
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
